"""What an attention worker is told and what it answers: orders in, tokens and reports out. No tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, order=True)
class AttemptId:
    """One placement of one sequence on a worker; the higher number wins."""

    request_id: str
    index: int
    number: int


class FinishReason(enum.IntEnum):
    STOP = 1  # eos or a stop token id
    LENGTH = 2
    CANCELLED = 3  # by plan
    FAILED = 4  # given up by the worker; `detail` says why


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0: the highest logit
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    min_p: float = 0.0  # of the likeliest token's probability; 0: all
    repetition_penalty: float = 1.0  # over prompt and generated tokens; 1: none
    frequency_penalty: float = 0.0  # this and the next over generated tokens; 0: none
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit), each token once
    allowed_token_ids: tuple[int, ...] = ()  # nothing else is sampled; none: all are
    bad_words: tuple[tuple[int, ...], ...] = ()  # none of these is ever generated to its end

    @property
    def penalises(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)

    @cached_property
    def reshapes(self) -> bool:
        """Whether any logit may be another than the model's."""
        return bool(self.logit_bias or self.allowed_token_ids or self.bad_words or self.penalises)

    @cached_property
    def allowed(self) -> np.ndarray:
        """`allowed_token_ids` as an index: [n] int64."""
        return np.array(self.allowed_token_ids, np.int64)


@dataclass(frozen=True)
class Grammar:
    """What the generated tokens must be together: a thought, where it can end, and behind it `text`."""

    text: str  # as llguidance reads it; empty: anything
    eos: tuple[int, ...]  # what may follow when it is complete
    thought_ends: tuple[int, ...] = ()  # the first to come ends the thought; none: there is no thought
    thought_tokens_max: int = 0  # then the first of its ends is forced
    barred: tuple[int, ...] = ()  # from the thought


@dataclass(frozen=True)
class Start:
    """Run this sequence until it ends by itself or is stopped."""

    attempt: AttemptId
    gateway_address: str
    prompt: tuple[int, ...]
    accepted: tuple[int, ...]  # tokens the gateway already holds: given, never sampled again
    sampling: Sampling
    stop_token_ids: frozenset[int]
    max_tokens: int  # generated tokens in all, accepted ones included
    num_logprobs: int | None  # None: none; 0: the sampled token's; n: and the n likeliest
    priority: int = 0  # lower runs earlier
    arrival: int = 0  # orders equals
    min_tokens: int = 0  # generated tokens before which no stop token is sampled
    cache_salt: str = ""  # cached blocks are shared among those of one salt
    num_prompt_logprobs: int = 0  # with each of the prompt's tokens that is scored, so many likeliest
    score_from: int = 0  # logprobs of the prompt's tokens are wanted from here on; 0: of none
    handle: int = 0  # names this start in what the scheduler is told
    grammar: Grammar | None = None  # None: any tokens


@dataclass(frozen=True)
class Plan:
    """A change to what the worker runs. Numbered without gaps within (term, worker incarnation)."""

    term: int
    number: int
    fingerprint: str
    incarnation: int
    starts: tuple[Start, ...] = ()
    stops: tuple[AttemptId, ...] = ()
    step_tokens_max: int = 512
    chunk_tokens_max: int = 256
    send_state: bool = False
    inter_token_s: float = 0.0  # how long a step with prompt rows may take; 0: in proportion to one without
    draining: bool = False  # nothing more comes


@dataclass(frozen=True)
class Logprobs:
    """Of one sampled token, and of the likeliest tokens at its position, likeliest first."""

    sampled: float
    top: tuple[tuple[int, float], ...] = ()


class PromptLogprob(NamedTuple):
    """Of one of the prompt's tokens: its rank (1: no token was likelier), and the likeliest, likeliest first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenDelta:
    """New tokens of one sequence from `position` on; 0 is the first generated token.

    Or logprobs of its prompt's tokens from `prompt_position` on, which come before any token.
    """

    attempt: AttemptId
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    finish: FinishReason | None = None
    detail: str = ""
    num_cached: int = 0  # with position 0: prompt tokens whose keys and values were cached
    prompt_position: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    attempt: AttemptId
    reason: FinishReason
    num_tokens: int
    detail: str = ""
    handle: int = 0


@dataclass(frozen=True)
class RunningSequence:
    attempt: AttemptId
    num_tokens: int
    prompt_done: bool
    arrival: int
    handle: int


@dataclass
class StepResult:
    """What one step, or the plans before it, brought about."""

    deltas: dict[str, list[TokenDelta]] = field(default_factory=dict)  # by gateway address
    completions: list[Completion] = field(default_factory=list)
    prompts_done: list[int] = field(default_factory=list)  # handles
    paused: list[AttemptId] = field(default_factory=list)
    undelivered: list[AttemptId] = field(default_factory=list)  # their gateway could not be reached
    state: list[RunningSequence] | None = None  # asked for, or a plan did not follow
    kept: list[int] = field(default_factory=list)  # hints of cached blocks that came; with `state` of all
    evicted: list[int] = field(default_factory=list)  # and of those that went

    def is_news(self) -> bool:
        """Whether the scheduler must hear of it now."""
        lists = (self.completions, self.prompts_done, self.paused, self.undelivered, self.kept, self.evicted)
        return any(lists) or self.state is not None
