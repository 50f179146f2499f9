"""The seam between the front door and the scheduler: what the gateway asks, and what it is told.

Implemented by `gateway.link` over gRPC, and in tests by an engine that runs in the same loop.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import Refusal
from gateway.request import Grammar, Sampling, TokenDelta


class CloseReason(enum.Enum):
    WORKER_LOST = "worker_lost"  # open the next attempt
    PREEMPTED = "preempted"  # open the next attempt
    FAILED = "failed"  # tell the client
    DEADLINE = "deadline"  # tell the client: its time is up


@dataclass(frozen=True)
class Sibling:
    """One of a request's n sequences: its attempt, its own seed, the tokens accepted so far."""

    index: int
    attempt: int
    seed: int
    accepted: tuple[int, ...] = ()
    score_from: int = 0  # logprobs of the prompt's tokens are wanted from here on; 0: of none


@dataclass(frozen=True)
class Submission:
    """Sequences to be placed together. `max_tokens` counts the accepted tokens too."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling  # its seed is each sibling's own
    stop_token_ids: frozenset[int]
    max_tokens: int
    num_logprobs: int | None
    siblings: tuple[Sibling, ...]
    priority: int = 0
    tenant: str = ""
    resume: bool = False  # further attempts, or a claim after a gap: never refused for load
    min_tokens: int = 0
    cache_salt: str = ""
    num_prompt_logprobs: int = 0  # with each of the prompt's tokens that is scored, so many likeliest
    time_left_s: float = 0.0  # until its deadline; 0: it has none
    waited_s: float = 0.0  # since it was first submitted
    grammar: Grammar | None = None


class Receiver(Protocol):
    """What the port tells the gateway. Called in the event loop; none of it waits."""

    def deliver(self, delta: TokenDelta) -> bool:
        """New tokens. False: refused, the worker may drop the attempt."""

    def close_attempt(self, request_id: str, index: int, attempt: int, reason: CloseReason, detail: str) -> None:
        """The attempt brings no more tokens."""

    def refuse(self, request_id: str, error: Refusal) -> None:
        """A resumed or claimed request was rejected."""

    def claims(self) -> list[Submission]:
        """Everything unfinished, submissions not answered yet included, with its current attempts, as resumes."""


class SchedulerPort(Protocol):
    @property
    def not_ready(self) -> str:
        """Why nothing can be submitted now; empty when it can."""

    @property
    def model_len_max(self) -> int:
        """Longest prompt and answer together that a worker can hold, in tokens; 0: not known yet."""

    async def submit(self, submission: Submission) -> int:
        """Queue a new request; returns how many were queued before it. Bounded wait.

        Raises Overloaded, NotReady or TooLarge; then nothing is queued once `cancel` was called.
        """

    def resume(self, submission: Submission) -> None:
        """Place further attempts. Lost while there is no scheduler: it asks for `claims` when it is back."""

    def cancel(self, request_id: str) -> None:
        """Nothing more of the request is wanted. May be lost: what is refused on delivery ends too."""

    def finish(self, request_id: str, index: int, attempt: int, position: int) -> None:
        """Nothing after `position` is wanted: a stop string was found. May be lost, as `cancel`."""
