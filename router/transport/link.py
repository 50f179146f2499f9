"""The two ends of one link, whatever carries its frames: who may send how much, and what may be an answer.

Capacity is kept by the attention end alone: it sends a parcel only if the reply will find room, so an expert
end never waits for room. Half of `link_bytes_max` may be occupied in either direction. Nothing here blocks, and
no peer is trusted: what cannot be raises TransportError, and the link is given up.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from router.config import RouterConfig
from router.errors import FrameError, TransportError
from router.placement import EpochId, Member
from router.transport import frame
from router.transport.base import LinkIdentity, Parcel, Peer, Refusal, RefusalReason, Spent
from router.transport.lane import Lane
from router.transport.tickets import Outcome
from router.transport.watch import Watch

HOST = torch.device("cpu")
_ARRIVING_MAX = 64  # frames read whose rows are still on their way


def occupied_bytes_max(config: RouterConfig) -> int:
    """Of frames in one direction of one link, hence of one frame too."""
    return config.link_bytes_max // 2


class Span:
    """A frame taken and read in place, until freed."""

    __slots__ = ("apart_bytes", "freed", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.apart_bytes = 0  # of rows that came beside it
        self.freed = False


class Incoming(NamedTuple):
    """A frame that has arrived, not yet taken."""

    region: frame.Region
    offset: int
    nbytes: int


class Answer(NamedTuple):
    """One outcome; `span` is freed when nobody reads it any more."""

    ticket: int
    parcel_index: int
    outcome: Outcome
    span: Span


class AttentionLink(ABC):
    kind: str

    def __init__(
        self, peer: Peer, identity: LinkIdentity, config: RouterConfig, lane: Lane | None = None, *,
        rows_apart: bool = False,
    ) -> None:  # fmt: skip
        """`lane`: of its rows, open; None: they are in its frames. `rows_apart`: frames keep no room for rows."""
        self.peer = peer
        self._lane = lane
        self._arriving: deque[tuple[int, Answer]] = deque()  # (receive that must be done, answer)
        self.unanswered: dict[tuple[int, int], tuple[int, int]] = {}  # (ticket, index) -> rows of its reply, bytes
        self.heard_s = time.monotonic()  # when the last answer or pulse came
        self._sender = identity.member
        self._limits = frame.limits_of(identity, config, rows_apart=rows_apart)
        self._parcels_max = config.parcels_in_flight_max
        self._occupied_max = occupied_bytes_max(config)
        self._in_flight_bytes = 0  # of the unanswered
        self._promised_bytes = 0  # room kept for their replies

    def send(self, parcel: Parcel, index: int) -> Refusal | None:
        """None: sent. A refusal: nothing was."""
        malformed = frame.why_malformed(parcel, self._limits)
        if malformed:
            return Refusal(RefusalReason.MALFORMED, malformed)
        num_answers, num_rows = self._limits.answer_rows(parcel), parcel.rows.shape[0]
        nbytes = frame.parcel_bytes(num_rows, parcel.route_rows.shape[0], self._limits)
        nbytes += num_rows * self._limits.sent_apart_bytes
        promise = self._promise(num_answers)
        if max(nbytes, promise) > self._occupied_max:
            return Refusal(RefusalReason.MALFORMED, f"parcel of {nbytes} bytes, reply of {promise}: at most "
                           f"{self._occupied_max}; raise link_bytes_max")  # fmt: skip
        if len(self.unanswered) >= self._parcels_max:
            return Refusal(RefusalReason.OVERLOADED, f"{len(self.unanswered)} parcels in flight")
        if not self._has_room_for_reply(self._promised_bytes + promise):
            return Refusal(RefusalReason.OVERLOADED, "no room for the reply")
        if not self._put(parcel, index, nbytes):
            return Refusal(RefusalReason.OVERLOADED, "no room for the parcel")
        self.unanswered[parcel.ticket, index] = num_answers, nbytes
        self._in_flight_bytes += nbytes
        self._promised_bytes += promise
        return None

    def poll(self) -> Answer | None:
        """The next answer, if one is there. Raises TransportError once the peer is gone and all is read."""
        if self._lane is None:
            return self._read()
        self._lane.is_open()  # or raises
        return arrived_in_turn(self._lane, self._arriving, self._read)

    def _read(self) -> Answer | None:
        """The next answer; its rows may still be arriving."""
        found = self._next()
        if found is None:
            return None
        header = frame.read_header(found.region, found.offset, found.nbytes, self._limits)
        num_answers, nbytes = self.unanswered.get((header.ticket, header.parcel_index), (None, 0))
        wanted = (frame.REFUSAL, 0) if header.kind == frame.REFUSAL else (frame.REPLY, num_answers)
        if num_answers is None or (header.kind, header.num_routes) != wanted:
            raise FrameError(f"frame: kind {header.kind} with {header.num_routes} rows for parcel "
                             f"{header.parcel_index} of ticket {header.ticket}: not asked for")  # fmt: skip
        if header.sender != self.peer.member.incarnation or header.to != self._sender.incarnation:
            raise FrameError(f"frame: from incarnation {header.sender} to {header.to}")
        outcome, apart = apart_counted(
            self._lane,
            lambda: frame.read_answer(found.region, found.offset, header, self._limits, time.perf_counter_ns()),
        )
        del self.unanswered[header.ticket, header.parcel_index]
        self._in_flight_bytes -= nbytes
        self._promised_bytes -= self._promise(num_answers)
        span = self._take(found.nbytes)
        span.apart_bytes = apart
        return Answer(header.ticket, header.parcel_index, outcome, span)

    def _promise(self, num_answers: int) -> int:
        """The most room that the answer to a parcel may take, with so many rows."""
        in_frames = max(frame.reply_bytes(num_answers, self._limits), frame.REFUSAL_BYTES_MAX)
        return self._footprint(in_frames) + num_answers * self._limits.row_apart_bytes

    @abstractmethod
    def join(self, watch: Watch) -> None:
        """Have `watch` wake when something comes. Once."""

    @abstractmethod
    def free(self, span: Span) -> None:
        """Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Leave the watch, and let the peer know. Idempotent."""

    @abstractmethod
    def _footprint(self, nbytes: int) -> int:
        """What a frame of so many bytes occupies."""

    @abstractmethod
    def _has_room_for_reply(self, promised: int) -> bool: ...

    @abstractmethod
    def _put(self, parcel: Parcel, index: int, nbytes: int) -> bool:
        """Send it, unless there is no room."""

    @abstractmethod
    def _next(self) -> Incoming | None:
        """The next frame, not yet taken; refreshes `heard_s`."""

    @abstractmethod
    def _take(self, nbytes: int) -> Span: ...


class ExpertLink(ABC):
    def __init__(
        self, sender: Member, identity: LinkIdentity, config: RouterConfig, lane: Lane | None = None, *,
        rows_apart: bool = False,
    ) -> None:  # fmt: skip
        """As an AttentionLink's, but the lane may still be opening."""
        self.sender = sender
        self.closed = False
        self._unanswered = 0  # parcels taken
        self._parcels_max = config.parcels_in_flight_max
        self._lane = lane
        self._arriving: deque[tuple[int, LinkedParcel]] = deque()
        self._own = identity.member
        self._limits = frame.limits_of(identity, config, rows_apart=rows_apart)

    def poll(self) -> LinkedParcel | None:
        """The next parcel, if one is there. Raises TransportError once the peer is gone and all is read."""
        if self._lane is None:
            return self._read()
        if not self._lane.is_open():
            self._refuse_gone()
            return None
        return arrived_in_turn(self._lane, self._arriving, self._read)

    def begin(self) -> None:
        """Begin to receive all rows that are announced: until then the peer's GPU waits to send them."""
        if self._lane is not None and self._lane.is_open():
            while begin_next(self._lane, self._arriving, self._read):
                pass

    def _read(self) -> LinkedParcel | None:
        """The next parcel; its rows may still be arriving."""
        found = self._next()
        if found is None:
            return None
        header = frame.read_header(found.region, found.offset, found.nbytes, self._limits)
        if header.kind != frame.PARCEL:
            raise FrameError(f"frame: kind {header.kind}; must be {frame.PARCEL}, a parcel")
        if header.sender != self.sender.incarnation or header.to != self._own.incarnation:
            raise FrameError(f"frame: from incarnation {header.sender} to {header.to}")
        if self._unanswered >= self._parcels_max:
            raise TransportError(f"link: more than {self._parcels_max} parcels in flight (parcels_in_flight_max)")
        read, apart = apart_counted(
            self._lane, lambda: frame.read_parcel(found.region, found.offset, header, self._limits)
        )
        self._unanswered += 1
        span = self._take(found.nbytes)
        span.apart_bytes = apart
        return LinkedParcel(
            self.sender, self._own, EpochId(header.term, header.number), header.ticket, header.layer,
            read.rows, read.route_rows, read.route_experts, self, header.parcel_index, span,
            route_weights=read.route_weights,
        )  # fmt: skip

    def answer(self, parcel: LinkedParcel, rows: Tensor, spent: Spent) -> None:
        """rows: [r, H] or sums [n, H], checked. Raises TransportError if the peer did not keep to its capacity."""
        self._refuse_twice(parcel)
        self._reply(parcel, rows, spent)

    def refuse(self, parcel: LinkedParcel, reason: RefusalReason, detail: str) -> None:
        """As `answer`."""
        self._refuse_twice(parcel)
        self._refuse(parcel, reason, frame.encode_detail(detail))

    def _refuse_twice(self, parcel: LinkedParcel) -> None:
        if parcel.span.freed:
            raise ValueError(f"parcel {parcel.index} of ticket {parcel.ticket}: answered already")
        self._unanswered -= 1

    @abstractmethod
    def _refuse_gone(self) -> None:
        """Raises TransportError once the peer has gone."""

    @property
    @abstractmethod
    def owes(self) -> bool:
        """Whether the peer waits for anything of ours, taken or not."""

    @abstractmethod
    def pulse(self) -> None:
        """A sign of life. Dropped if the peer does not take what came before."""

    @abstractmethod
    def join(self, watch: Watch) -> None:
        """Have `watch` wake when something comes. Once."""

    @abstractmethod
    def close(self) -> None:
        """Leave the watch, and let the peer know. Idempotent."""

    @abstractmethod
    def _next(self) -> Incoming | None: ...

    @abstractmethod
    def _take(self, nbytes: int) -> Span: ...

    @abstractmethod
    def _reply(self, parcel: LinkedParcel, rows: Tensor, spent: Spent) -> None: ...

    @abstractmethod
    def _refuse(self, parcel: LinkedParcel, reason: RefusalReason, detail: bytes) -> None: ...


@dataclass(frozen=True)
class LinkedParcel(Parcel):
    link: ExpertLink = field(repr=False)
    index: int  # its place in the ticket
    span: Span = field(repr=False)


R = TypeVar("R")


def apart_counted(lane: Lane | None, read: Callable[[], R]) -> tuple[R, int]:
    """What was read, and how many bytes of rows come beside it."""
    if lane is None:
        return read(), 0
    held_bytes = lane.held_bytes
    return read(), lane.held_bytes - held_bytes


def arrived_in_turn(lane: Lane, arriving: deque[tuple[int, R]], read: Callable[[], R | None]) -> R | None:
    """The next of what was read whose rows are there."""
    while not (arriving and arriving[0][0] <= lane.arrived):
        if not begin_next(lane, arriving, read):
            return None
    return arriving.popleft()[1]


def begin_next(lane: Lane, arriving: deque[tuple[int, R]], read: Callable[[], R | None]) -> bool:
    """Begin to receive the rows of the next frame. False: none is announced, or enough are on their way."""
    found = read() if len(arriving) < _ARRIVING_MAX else None
    if found is not None:
        arriving.append((lane.posted, found))
    return found is not None


class Greeting(Protocol):
    """A hello that was said and not yet answered."""

    def fileno(self) -> int:
        """Readable once the answer is there, or none will come."""

    def welcomed(self) -> AttentionLink | Greeting:
        """Read the answer; a greeting: there is another to wait for. Raises LinkRefused with the peer's reason;
        then nothing is left of it."""

    def close(self) -> None:
        """Give up waiting."""


class Dialer(Protocol):
    """How an attention end reaches experts by one transport."""

    scheme: str  # what its addresses begin with

    def greet(self, peer: Peer, address: str) -> Greeting:
        """Say hello, without waiting. Raises LinkRefused if the peer cannot be reached this way."""

    def close(self) -> None:
        """When all its links are closed. Idempotent."""


Admit = Callable[[ExpertLink], None]


class Door(Protocol):
    """How an expert end is reached by one transport."""

    address: str

    def open(self, watch: Watch, linked: Callable[[], Collection[Member]], admit: Admit) -> None:
        """Greet strangers within the watch's waits, from now on. `linked`: who is, right then."""

    def close(self) -> None:
        """Nobody comes in any more, and what was answered is on its way."""

    def let_go(self) -> None:
        """When all its links are closed, too. Leaves nothing. Idempotent."""
