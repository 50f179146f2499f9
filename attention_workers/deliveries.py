"""Completed means delivered: which completions wait for a gateway's word, and which are told at once. Pure.

A sequence that has ended is kept from the scheduler until its gateway has acknowledged the batch with its last
token: what the scheduler hears of as completed is never wanted again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from attention_workers.step import AttemptId, Completion, FinishReason, StepResult, TokenDelta


@dataclass(frozen=True)
class Batch:
    """What one step brought for one gateway."""

    deltas: list[TokenDelta]
    completions: list[Completion]  # of sequences whose last tokens these are


def parted(result: StepResult) -> tuple[dict[str, Batch], list[Completion]]:
    """The batches by gateway address, and the completions that wait for none of them."""
    batches, held = {}, set()
    for address, deltas in result.deltas.items():
        ended = {delta.attempt for delta in deltas if delta.finish is not None}
        completions = [c for c in result.completions if c.attempt in ended and c.reason != FinishReason.CANCELLED]
        held |= {c.attempt for c in completions}
        batches[address] = Batch(deltas, completions)
    return batches, [c for c in result.completions if c.attempt not in held]


class Deliveries:
    """Batches sent over one stream to one gateway, numbered from 1, until it has acknowledged them."""

    def __init__(self, backlog_max: int) -> None:
        self.backlog_max = backlog_max
        self.number = 0  # of the last batch sent
        self._unacknowledged: deque[tuple[int, list[Completion]]] = deque()

    def __len__(self) -> int:
        return len(self._unacknowledged)

    def send(self, completions: list[Completion]) -> bool:
        """A batch is to go. False when the gateway has fallen too far behind: then it has not gone."""
        self._unacknowledged.append((self.number + 1, completions))
        if len(self._unacknowledged) > self.backlog_max:
            return False
        self.number += 1
        return True

    def acknowledge(self, number: int) -> list[Completion]:
        """All batches up to this one have been taken. Returns what is completed with that."""
        completed: list[Completion] = []
        while self._unacknowledged and self._unacknowledged[0][0] <= number:
            completed += self._unacknowledged.popleft()[1]
        return completed

    def undelivered(self) -> list[AttemptId]:
        """Sequences that ended here, but whose last tokens may not have arrived."""
        return [c.attempt for _, completions in self._unacknowledged for c in completions]
