"""An attention worker as a plain object: orders and placements in, steps run, results out. No threads."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attention_workers import bad_words, sampler
from attention_workers.attention_model import AttentionModel, Microbatch
from attention_workers.book import Book
from attention_workers.decode import Experts, decode_step
from attention_workers.guides import GrammarTrouble
from attention_workers.microbatch import split
from attention_workers.microbatch_choice import MICROBATCHES_MAX, MicrobatchChoice, kind_of
from attention_workers.sequence import Sequence, Span
from attention_workers.staging import DirectExperts, StagedExperts, to_host
from attention_workers.step import StepResult, TokenDelta
from attention_workers.step_trace import StepTrace
from attention_workers.trace_records import Snapshot
from router.dispatcher import Dispatcher

SCORED_ROWS = 32
"""Rows of a prompt whose logits are held at once: 26 MB for 200,000 tokens."""

_UNSOUND = "the model's logits are not finite"


class AttentionWorker:
    """Owns keys and values. `book` says what runs, `model` computes it, `dispatcher` reaches the experts."""

    def __init__(
        self, model: AttentionModel, book: Book, dispatcher: Dispatcher, microbatches: int | Literal["auto"]
    ) -> None:
        self.model = model
        self.book = book
        self.dispatcher = dispatcher
        self.microbatches = MicrobatchChoice(microbatches, model.config.num_layers)
        self.trace = StepTrace(dispatcher)
        self._experts = _experts(model, dispatcher, MICROBATCHES_MAX if microbatches == "auto" else microbatches)
        self._parts = 0  # microbatches of the last step
        self.steps = 0
        self.tokens = 0

    @property
    def reaches_all_experts(self) -> bool:
        """Whether every expert has a holder that is not lost: a step can be computed, as far as is known."""
        return self.dispatcher.placement.is_covered_without(self.dispatcher.lost)

    @torch.inference_mode()
    def step(self, result: StepResult) -> bool:
        """Run one step of what the book holds, adding to `result`. False when there was nothing to compute.

        Raises ExpertsUnavailable from the dispatcher: then nothing was sampled, and the same step may be tried
        again; keys and values written meanwhile are overwritten with the same bits.
        """
        began_s = time.monotonic()
        spans = self.book.compose(result)
        if not spans:
            return False
        num_decodes = sum(span.is_decode for span in spans)
        num_prompt_rows = sum(span.count for span in spans) - num_decodes
        logits, batches = self._compute(spans)
        self.book.computed(spans, result)
        for batch, rows in zip(batches, logits, strict=True):
            self._score(batch, result)
            self._sample(batch, rows, result)
        self.steps += 1
        self.book.pace.observe(num_decodes, num_prompt_rows, time.monotonic() - began_s)
        return True

    def _compute(self, spans: list[Span]) -> tuple[list[Tensor], list[Microbatch]]:
        """Logits [n, V] of each microbatch, in as many as were chosen."""
        rows = sum(span.count for span in spans)
        kind = kind_of(rows, has_prompts=rows > len(spans))
        parts = split(spans, self.microbatches.choose(kind, len(spans)))
        self._parts = len(parts)
        batches = [self.model.begin(part) for part in parts]
        self.trace.begin(kind, rows, len(spans))
        logits = to_host(decode_step(self.model, batches, self._experts, self.trace))
        self.microbatches.measured(kind, len(parts), rows, self.trace.end(len(parts)))
        return logits, batches

    def gauges(self) -> dict[str, float]:
        """Of recent steps: the share of their time that was wait for experts, and exchange. From any thread."""
        return {
            "exposed_wait_share": round(self.trace.wait_share, 4),
            "exchange_share": round(self.trace.exchange_share, 4),
            "microbatches": self._parts,
        }

    def snapshot(self, worker: str) -> Snapshot:
        """What the trace holds, by the worker's name. From any thread."""
        return self.trace.snapshot(worker, self.microbatches.explain())

    def _score(self, batch: Microbatch, result: StepResult) -> None:
        """Logprobs of prompts, where they are wanted: before any token."""
        for span, row in batch.scored:
            sequence, wanted = span.sequence, span.scores
            for first in wanted[::SCORED_ROWS]:
                positions = range(first, min(first + SCORED_ROWS, wanted.stop))
                logits = self.model.unembed_rows(batch, row + first - 1 - span.first, len(positions))
                if not torch.isfinite(logits).all():
                    self.book.fail(sequence, _UNSOUND, result)
                    break
                tokens = [sequence.tokens[position] for position in positions]
                found = sampler.prompt_logprobs(logits, tokens, sequence.start.num_prompt_logprobs)
                self.book.scored(sequence, first, found, result)

    def _sample(self, batch: Microbatch, logits: Tensor, result: StepResult) -> None:
        sequences: list[Sequence] = [span.sequence for span in batch.spans if span.samples]
        sound = torch.isfinite(logits).all(-1)
        if batch.scored:
            sound &= torch.tensor([s.start.attempt in self.book.sequences for s in sequences], dtype=torch.bool)
        if not sound.all():
            for sequence in [s for s, is_sound in zip(sequences, sound.tolist(), strict=True) if not is_sound]:
                sequences.remove(sequence)
                if sequence.start.attempt in self.book.sequences:  # else its prompt's logits were not finite
                    self.book.fail(sequence, _UNSOUND, result)
            logits = logits[sound]
        sequences, logits, guided = self._guided(sequences, logits, result)
        tokens = [_next_token(s, row, mask) for s, row, mask in zip(sequences, logits, guided, strict=True)]
        found = sampler.logprobs(logits, tokens, [s.start.num_logprobs for s in sequences])
        for sequence, token, logprob in zip(sequences, tokens, found, strict=True):
            delta = TokenDelta(
                sequence.start.attempt, sequence.num_generated, (token,), (logprob,) if logprob else ()
            )
            self.book.sampled(sequence, token, delta, result)
            if sequence.guide is not None and sequence.start.attempt in self.book.sequences:
                sequence.guide.follow(token)
            self.tokens += 1

    def _guided(
        self, sequences: list[Sequence], logits: Tensor, result: StepResult
    ) -> tuple[list[Sequence], Tensor, list[np.ndarray | None]]:
        """The sequences that can go on with their logits, and what their grammars allow."""
        kept, masks = [], list[np.ndarray | None]()
        for row, sequence in enumerate(sequences):
            try:
                masks.append(sequence.guide.allowed() if sequence.guide is not None else None)
            except GrammarTrouble as trouble:
                self.book.fail(sequence, str(trouble), result)
            else:
                kept.append(row)
        if len(kept) == len(sequences):
            return sequences, logits, masks
        return [sequences[row] for row in kept], logits[kept], masks


def _experts(model: AttentionModel, dispatcher: Dispatcher, microbatches: int) -> Experts[Any]:
    """The dispatcher, with what lies between the model's device and the links."""
    if model.device.type == "cpu":
        return dispatcher
    if dispatcher.device == model.device:
        return DirectExperts(dispatcher)
    config = model.config
    return StagedExperts(
        dispatcher, model.device, microbatches=microbatches, hidden=config.hidden_size,
        num_ranks=config.experts_per_token, dtype=model.dtype,
    )  # fmt: skip


def _next_token(sequence: Sequence, logits: Tensor, by_grammar: np.ndarray | None) -> int:
    """logits [V]: those of the sequence's last token. `by_grammar`: what may follow, [V]; None: all."""
    start, position = sequence.start, sequence.num_generated
    params = start.sampling
    ruled_out = start.stop_token_ids if position < start.min_tokens else ()
    if ruled_out or params.reshapes or by_grammar is not None:
        if params.penalises:
            sequence.counts.follow(sequence.tokens, len(start.prompt))
        bad = bad_words.completions(params.bad_words, sequence.tokens, len(start.prompt))
        logits = sampler.shaped(logits, params, ruled_out, sequence.counts, bad, by_grammar)
    return sampler.sample(logits, position, params)
