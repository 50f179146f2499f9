"""The exchange protocol: what an attention worker and an expert worker may ask of a transport.

Two verbs per end. An attention worker dispatches parcels and combines their replies; an expert worker
receives parcels and replies. Every transport passes the one conformance suite in `tests/contracts`.

One thread at a time uses an end; from another thread only `AttentionEnd.prepare` and `ExpertEnd.wake` may be
called. Waits are kept to the millisecond above. Which epochs and experts are refused is the expert worker's
business, not the transport's.

Legend: n rows of one parcel · r routes of one parcel (a row goes to one or more experts) · H hidden · P what a
row takes on its way to the experts (router.rows).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from router.config import Replies, RowsSent
from router.placement import EpochId, Member


@dataclass(frozen=True)
class LinkIdentity:
    """Who an end is and what its links carry: both ends of a link must agree on all but the member."""

    member: Member
    fingerprint: str  # of the checkpoint
    token: str = field(repr=False)  # of the cluster; empty: none
    hidden: int  # H
    dtype: torch.dtype  # of rows, both ways
    rows: RowsSent = "plain"
    replies: Replies = "rows"


@dataclass(frozen=True)
class Peer:
    """An expert worker as an attention worker reaches it."""

    member: Member
    address: str


@dataclass(frozen=True)
class Parcel:
    """Rows of one microbatch at one layer bound for one expert worker, each row sent once.

    The rows must not change until the ticket is combined.
    """

    sender: Member
    to: Member
    epoch: EpochId
    ticket: int  # the sender's number for the dispatch this belongs to, never used again
    layer: int
    rows: Tensor  # [n, P]
    route_rows: Tensor  # [r] int32: which of the n rows
    route_experts: Tensor  # [r] int32: which expert computes it
    route_weights: Tensor | None = field(default=None, kw_only=True)  # [r] float32, where sums are the reply


class RefusalReason(enum.IntEnum):
    """Why a parcel has no rows in reply."""

    PEER_LOST = 1  # socket closed, process gone
    DEADLINE = 2  # no answer within the time given
    STALE_EPOCH = 3  # the epoch is retired
    NOT_RESIDENT = 4  # an expert it names is not held (any more)
    WRONG_INCARNATION = 5  # addressed to an earlier life of the worker, or sent by one
    OVERLOADED = 6  # beyond the link's capacity
    MALFORMED = 7  # sizes, dtype or ids that do not fit


class Spent(NamedTuple):
    """What an expert worker did with a parcel, by its own clock: no two machines' clocks are ever compared."""

    queued_ns: int = 0  # from when it was taken in until its batch began
    computed_ns: int = 0  # of that batch, whoever else's parcels were joined to it


UNTIMED = Spent()


@dataclass(frozen=True)
class Reply:
    rows: Tensor  # [r, H], in the order of the parcel's routes; or their weighted sums [n, H], of its rows
    spent: Spent = UNTIMED
    heard_ns: int = 0  # when the attention end found it, by `time.perf_counter_ns`


@dataclass(frozen=True)
class Refusal:
    reason: RefusalReason
    detail: str = ""


@dataclass(frozen=True)
class Ticket:
    """Parcels in flight. Combined once, then released."""

    number: int
    parcels: tuple[Parcel, ...]


class Link(Protocol):
    def close(self) -> None:
        """Idempotent. To the peer it is our death."""


@dataclass
class Prepared:
    """Links that stand but are not used yet: adopted once, or else closed."""

    peers: tuple[Peer, ...]  # all that were asked for
    links: dict[Peer, Any]  # the new ones; each a Link of the end that prepared it
    failed: dict[Member, str]  # who could not be linked, and why

    def close(self) -> None:
        """Idempotent, and nothing to do once adopted."""
        while self.links:
            self.links.popitem()[1].close()


class AttentionEnd(Protocol):
    device: torch.device  # where rows of parcels and replies lie

    def prepare(self, peers: Sequence[Peer], timeout_s: float) -> Prepared:
        """Shake hands with those of `peers` that are not linked yet. Links in use notice nothing.

        All handshakes share `timeout_s`; nobody else is waited for. At most one thread prepares, and what it
        has prepared is adopted or closed before it prepares again.
        """

    def adopt(self, prepared: Prepared) -> dict[Member, str]:
        """Make its peers the peers: new links are used, those of absent peers closed, others kept. At once.

        Returns the peers that are not linked, with the reason; the others are usable. A link that has
        broken is not made again: loss is final per incarnation.
        """

    def dispatch(self, parcels: Sequence[Parcel]) -> Ticket:
        """Send, and return at once. A parcel that cannot be sent is refused at `combine`.

        At least one parcel, all of one fresh ticket number. Beyond a link's capacity nothing of that
        parcel is sent.
        """

    def combine(self, ticket: Ticket, timeout_s: float) -> list[Reply | Refusal]:
        """One outcome per parcel, in order.

        A peer that owes an outcome and is silent for `timeout_s` is given up: neither an answer nor a pulse
        came. All together never wait beyond `combine_total_s`. After a halt of our own everyone is given the
        time again.

        Reply rows may be views of the link's memory: valid until `release(ticket)`.
        """

    def release(self, ticket: Ticket) -> None:
        """The replies of this ticket are no longer read; combined or not. Idempotent."""

    def lost(self) -> frozenset[Member]:
        """Peers whose link has broken since they were adopted."""

    def transports(self) -> dict[Member, str]:
        """What kind of link serves each peer that is linked. From any thread."""

    def close(self) -> None:
        """Idempotent. Leaves no thread, descriptor or segment."""


class ExpertEnd(Protocol):
    address: str  # what Peer.address says
    device: torch.device  # where rows of parcels and replies lie

    def receive(self, timeout_s: float) -> Parcel | None:
        """The next parcel of any peer, fairly between them; None when none came in time.

        Its tensors may be views of the link's memory: valid until `reply` or `refuse`, which take this
        very object, once.
        """

    def reply(self, parcel: Parcel, rows: Tensor, spent: Spent = UNTIMED) -> None:
        """rows: [r, H], or sums [n, H], of the link's dtype, free to be reused afterwards. A peer that has gone
        meanwhile is not an error. `spent` is told to the peer, for its trace."""

    def refuse(self, parcel: Parcel, reason: RefusalReason, detail: str = "") -> None:
        """Answer without rows. `detail` is cut to what a frame may carry."""

    def pulse(self) -> None:
        """Tell the peers whose parcels wait or are held that this worker is at work, and see to the door.

        Cheap: does something at most every quarter of `combine_timeout_s`. To be called within long work.
        """

    def wake(self) -> None:
        """Make a `receive` that waits in another thread, or else the next one, return None at once.

        Not while another thread is in `close`.
        """

    def close(self) -> None:
        """Idempotent. Leaves no thread, descriptor or segment."""
