"""What the scheduler is told, and what it orders: plain values, no wire types.

Identities are named tuples rather than dataclasses: they are dictionary keys ten thousand times a
round, and a tuple hashes and compares in C. Everything is immutable.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class Incarnation(NamedTuple):
    """One life of one process. `number` grows with every restart under the same id."""

    id: str
    number: int

    def __str__(self) -> str:
        return f"{self.id}#{self.number}"


SequenceKey: TypeAlias = tuple[str, int]
"""Of a sequence, whatever its attempt: (request id, index)."""


class AttemptId(NamedTuple):
    """One placement of one sequence on a worker. Opened by the gateway; the higher number wins."""

    request_id: str
    index: int  # type: ignore[assignment]  # which of the request's n sequences; not tuple.index
    number: int  # 1 for the first placement

    def __str__(self) -> str:
        return f"{self.request_id}/{self.index}@{self.number}"


class FinishReason(enum.IntEnum):
    """Why a worker ended a sequence. Values as on the wire."""

    STOP = 1  # eos or a stop token id
    LENGTH = 2
    CANCELLED = 3  # by plan, or because its gateway refused the tokens
    FAILED = 4


class RejectCode(enum.IntEnum):
    """Why a submission is refused. Values as on the wire."""

    OVERLOADED = 1
    NOT_READY = 2
    TOO_LARGE = 3
    WRONG_MODEL = 4


class CloseReason(enum.IntEnum):
    """Why an attempt ended without its worker finishing it. Values as on the wire."""

    WORKER_LOST = 1  # open the next attempt
    PREEMPTED = 2  # open the next attempt
    FAILED = 3  # tell the client
    DEADLINE = 4  # tell the client: its time is up


# What is said by gateways.


@dataclass(frozen=True)
class Sibling:
    """One of a request's n sequences."""

    index: int
    attempt: int
    seed: int
    accepted: Sequence[int]  # tokens the gateway already holds: given, never sampled again
    score_from: int = 0  # logprobs of the prompt's tokens are wanted from here on; 0: of none


@dataclass(frozen=True)
class Submission:
    """A request, or what is left of one. Its siblings are admitted or refused together."""

    request_id: str
    fingerprint: str
    prompt: Sequence[int]
    max_tokens: int  # generated tokens of each sibling in all, accepted ones included
    spec: object  # carried to the worker unread
    siblings: tuple[Sibling, ...]
    priority: int  # lower runs earlier
    resume: bool  # a further attempt, or one said again to a scheduler that may not know it
    num_bytes: int  # encoded: no less than what starting any one sibling takes in a plan
    tenant: str = ""  # whose share of the cluster serves it
    cache_salt: str = ""  # cached blocks are shared among those of one salt
    time_left_s: float = 0.0  # until its deadline, when it was heard; 0: it has none
    waited_s: float = 0.0  # since its gateway first submitted it
    hints: dict[int, list[int]] = field(default_factory=dict, compare=False, repr=False)
    """By tokens of a block: what `prefixes.hints_of` made of the prompt, kept."""


@dataclass(frozen=True)
class GatewayJoined:
    gateway: Incarnation
    token_address: str  # where its sequences' tokens go


@dataclass(frozen=True)
class GatewayLost:
    """Its link ended. It keeps its requests while its lease lasts."""

    gateway: Incarnation


@dataclass(frozen=True)
class Submitted:
    gateway: Incarnation
    submission: Submission


@dataclass(frozen=True)
class CancelRequested:
    gateway: Incarnation
    request_id: str


@dataclass(frozen=True)
class FinishRequested:
    """The gateway found a stop string: nothing more is wanted of this sequence."""

    gateway: Incarnation
    attempt: AttemptId


# What is said by attention workers.


class Blocks(NamedTuple):
    """Counts in a worker's two block spaces: of layers that attend to everything, and to a window."""

    full: int
    sliding: int

    def plus(self, other: Blocks) -> Blocks:
        return Blocks(self.full + other.full, self.sliding + other.sliding)

    def minus(self, other: Blocks) -> Blocks:
        return Blocks(self.full - other.full, self.sliding - other.sliding)

    def fits(self, room: Blocks) -> bool:
        return self.full <= room.full and self.sliding <= room.sliding


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker can hold."""

    block_tokens: int
    blocks_total: int
    sequences_max: int
    model_len_max: int
    sliding_blocks_total: int = 0
    sliding_window: int = 0
    """Tokens that a sliding layer sees, the current one included; 0 where no layer slides."""
    prefix_cache: bool = False
    """Whether it keeps blocks cached."""

    @property
    def tokens_max(self) -> int:
        """The longest sequence, prompt and answer together, that can ever run here."""
        return min(self.model_len_max, self.block_tokens * self.blocks_total)

    def blocks_for(self, num_tokens: int, chunk_tokens_max: int) -> Blocks:
        """What a sequence of so many tokens takes at most while it is computed in such chunks.

        In the sliding space that is a window and a chunk, wherever they begin; the worker cuts chunks to what
        its space holds, so never more than that.
        """
        full = -(-num_tokens // self.block_tokens)
        if not self.sliding_window:
            return Blocks(full, 0)
        seen = self.sliding_window - 1 + chunk_tokens_max
        overlapped = -(-(seen - 1) // self.block_tokens) + 1
        return Blocks(full, min(full, overlapped, self.sliding_blocks_total))


class Running(NamedTuple):
    attempt: AttemptId
    num_tokens: int  # prompt and generated
    prompt_done: bool
    arrival: int  # this and the next as its start said, in whichever term
    handle: int


class Endings(NamedTuple):
    """Sequences that a worker has ended, as columns."""

    handles: Sequence[int] = ()
    reasons: Sequence[int] = ()  # FinishReason of each
    num_tokens: Sequence[int] = ()  # generated in all, by each
    details: Sequence[str] = ()  # of those that FAILED, in order


NO_ENDINGS = Endings()


@dataclass(frozen=True)
class WorkerReported:
    """What changed at a worker since its last report, and its counts."""

    worker: Incarnation
    term: int  # newest scheduler term it has seen
    plan_number: int  # last plan of that term it applied
    refused_orders: int  # plans refused in this life
    blocks_free: int  # free, or cached and given up on demand
    num_paused: int
    tokens: int  # sampled in this life
    experts_missing: bool = False  # it can compute nothing now: some expert has no live holder
    draining: bool = False  # as the last plan it applied said
    prompts_done: Sequence[int] = ()  # handles
    undelivered: tuple[AttemptId, ...] = ()  # dropped: their gateway could not be reached
    endings: Endings = NO_ENDINGS
    state: tuple[Running, ...] | None = None  # everything it runs
    sliding_blocks_free: int = 0
    paused: tuple[AttemptId, ...] = ()  # gave up their blocks since, the last in order first
    kept: Sequence[int] = ()  # hints of blocks that have been cached since it last said so; of all, with `state`
    evicted: Sequence[int] = ()  # and of those that are so no more


@dataclass(frozen=True)
class WorkerJoined:
    """A worker's link began: no earlier plan is still under way to it."""

    worker: Incarnation
    fingerprint: str
    limits: WorkerLimits
    report: WorkerReported  # with its state


@dataclass(frozen=True)
class WorkerLost:
    """Its link ended. Its sequences are given back when it does not return within the deadline."""

    worker: Incarnation


# What is said by the controller, and by time.


@dataclass(frozen=True)
class MembersExpected:
    """The attention workers that live, or are being started, as the controller knows them. Said again with every
    change, and to every new term."""

    workers: frozenset[Incarnation]
    draining: frozenset[Incarnation] = frozenset()
    """Of them: these are given nothing more, and are emptied. Each says to the controller when it is empty."""


@dataclass(frozen=True)
class Tick:
    """The inbox is drained: judge deadlines now."""


Event: TypeAlias = (
    GatewayJoined | GatewayLost | Submitted | CancelRequested | FinishRequested
    | WorkerJoined | WorkerLost | WorkerReported | MembersExpected | Tick
)  # fmt: skip


# What the scheduler orders.


@dataclass(frozen=True)
class Start:
    attempt: AttemptId
    gateway_address: str
    prompt: Sequence[int]
    accepted: Sequence[int]
    spec: object
    seed: int  # takes the place of the spec's own
    priority: int
    arrival: int  # count of admissions, over all terms: orders equals
    handle: int  # names this start in reports: no other has it, in no term
    score_from: int = 0


@dataclass(frozen=True)
class Plan:
    """A change to what a worker runs. Numbered without gaps within (term, worker)."""

    number: int
    starts: tuple[Start, ...]
    stops: tuple[AttemptId, ...]
    step_tokens_max: int
    chunk_tokens_max: int
    inter_token_s: float
    send_state: bool  # answer with all that runs
    draining: bool = False  # nothing is started there any more, until a plan says otherwise


@dataclass(frozen=True)
class SendPlan:
    to: Incarnation
    plan: Plan


@dataclass(frozen=True)
class Welcome:
    to: Incarnation
    model_len_max: int  # longest sequence some worker can run; 0: none has joined


@dataclass(frozen=True)
class Accept:
    to: Incarnation
    request_id: str
    queued_before: int  # sequences ahead of its first


@dataclass(frozen=True)
class Reject:
    to: Incarnation
    request_id: str
    code: RejectCode
    message: str
    retry_after_s: float  # 0: trying again will not help


@dataclass(frozen=True)
class CloseAttempt:
    to: Incarnation
    attempt: AttemptId
    reason: CloseReason
    detail: str


@dataclass(frozen=True)
class DropLink:
    """End this peer's stream; what it holds is settled when it joins again."""

    to: Incarnation
    reason: str


Command: TypeAlias = SendPlan | Welcome | Accept | Reject | CloseAttempt | DropLink
