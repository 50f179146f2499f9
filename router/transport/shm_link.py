"""The two ends of one shared-memory link: frames in rings, bells to wake the other side, capacity.

A link is the socket its handshake used (whose closing says that the peer is gone), a segment of two rings, and
two eventfds: bells. A bell is only ever added to and watched for edges, never read. Capacity is kept by the
attention end alone: it sends a parcel only if the reply will find room, so an expert end never waits for room.
Nothing here blocks, and no peer is trusted: what cannot be raises TransportError, and the link is given up.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from router.config import RouterConfig
from router.errors import FrameError, TransportError
from router.placement import EpochId, Member
from router.transport import frame
from router.transport.base import LinkIdentity, Parcel, Peer, Refusal, RefusalReason
from router.transport.shm_ring import ENTRIES, RingReader, RingWriter, Segment, Span, aligned
from router.transport.tickets import Outcome


@dataclass(frozen=True)
class Wiring:
    """What a handshake yields. The descriptors belong to the link from then on."""

    sock: socket.socket
    parcels_bell: int  # eventfd rung when parcels were published
    replies_bell: int
    segment: Segment

    def close(self) -> None:
        self.sock.close()
        os.close(self.parcels_bell)
        os.close(self.replies_bell)


class Answer(NamedTuple):
    """One outcome off the ring; its span is freed when nobody reads it any more."""

    ticket: int
    parcel_index: int
    outcome: Outcome
    span: Span


class AttentionLink:
    def __init__(self, peer: Peer, identity: LinkIdentity, config: RouterConfig, wiring: Wiring) -> None:
        self.peer = peer
        self.wiring = wiring
        self.unanswered: dict[tuple[int, int], int] = {}  # (ticket, index) -> routes
        self._sender = identity.member
        self._limits = frame.limits_of(identity, config)
        self._parcels_max = config.parcels_in_flight_max
        self._parcels = RingWriter(wiring.segment.parcels)
        self._parcels_region = frame.Region(wiring.segment.parcels.frames, self._limits)
        self.replies = RingReader(wiring.segment.replies)
        self._replies_region = frame.Region(wiring.segment.replies.frames, self._limits)
        self._occupied_max = self._parcels.size // 2
        self._promised_bytes = 0  # room kept for the replies of the unanswered

    def send(self, parcel: Parcel, index: int) -> Refusal | None:
        """None: sent. A refusal: nothing was."""
        malformed = frame.why_malformed(parcel, self._limits)
        if malformed:
            return Refusal(RefusalReason.MALFORMED, malformed)
        num_routes = parcel.route_rows.shape[0]
        nbytes = frame.parcel_bytes(parcel.rows.shape[0], num_routes, self._limits)
        promise = self._promise(num_routes)
        if max(nbytes, promise) > self._occupied_max:
            return Refusal(RefusalReason.MALFORMED, f"parcel of {nbytes} bytes, reply of {promise}: at most "
                           f"{self._occupied_max}; raise link_bytes_max")  # fmt: skip
        if len(self.unanswered) >= self._parcels_max:
            return Refusal(RefusalReason.OVERLOADED, f"{len(self.unanswered)} parcels in flight")
        if (
            self._promised_bytes + self.replies.held_bytes + promise > self._occupied_max
            or len(self.unanswered) + self.replies.held_frames >= ENTRIES
        ):
            return Refusal(RefusalReason.OVERLOADED, "no room for the reply")
        offset = self._parcels.claim(nbytes)
        if offset is None:
            return Refusal(RefusalReason.OVERLOADED, "no room for the parcel")
        frame.write_parcel(self._parcels_region, offset, parcel, index, self._limits)
        self._parcels.publish()
        os.eventfd_write(self.wiring.parcels_bell, 1)
        self.unanswered[parcel.ticket, index] = num_routes
        self._promised_bytes += promise
        return None

    def poll(self) -> Answer | None:
        """The next answer, if one is there."""
        found = self.replies.next()
        if found is None:
            return None
        offset, nbytes = found
        header = frame.read_header(self._replies_region, offset, nbytes, self._limits)
        num_routes = self.unanswered.get((header.ticket, header.parcel_index))
        wanted = (frame.REFUSAL, 0) if header.kind == frame.REFUSAL else (frame.REPLY, num_routes)
        if num_routes is None or (header.kind, header.num_routes) != wanted:
            raise FrameError(f"frame: kind {header.kind} with {header.num_routes} routes for parcel "
                             f"{header.parcel_index} of ticket {header.ticket}: not asked for")  # fmt: skip
        if header.sender != self.peer.member.incarnation or header.to != self._sender.incarnation:
            raise FrameError(f"frame: from incarnation {header.sender} to {header.to}")
        outcome = frame.read_answer(self._replies_region, offset, header)
        del self.unanswered[header.ticket, header.parcel_index]
        self._promised_bytes -= self._promise(num_routes)
        return Answer(header.ticket, header.parcel_index, outcome, self.replies.take(nbytes))

    def _promise(self, num_routes: int) -> int:
        """The most room that the answer to a parcel may take."""
        return aligned(max(frame.reply_bytes(num_routes, self._limits), frame.REFUSAL_BYTES_MAX))


class ExpertLink:
    def __init__(self, sender: Member, identity: LinkIdentity, config: RouterConfig, wiring: Wiring) -> None:
        self.sender = sender
        self.wiring = wiring
        self.closed = False
        self._own = identity.member
        self._limits = frame.limits_of(identity, config)
        self._parcels = RingReader(wiring.segment.parcels)
        self._parcels_region = frame.Region(wiring.segment.parcels.frames, self._limits)
        self._replies = RingWriter(wiring.segment.replies)
        self._replies_region = frame.Region(wiring.segment.replies.frames, self._limits)

    def poll(self) -> ShmParcel | None:
        """The next parcel, if one is there."""
        found = self._parcels.next()
        if found is None:
            return None
        offset, nbytes = found
        header = frame.read_header(self._parcels_region, offset, nbytes, self._limits)
        if header.kind != frame.PARCEL:
            raise FrameError(f"frame: kind {header.kind}; must be {frame.PARCEL}, a parcel")
        if header.sender != self.sender.incarnation or header.to != self._own.incarnation:
            raise FrameError(f"frame: from incarnation {header.sender} to {header.to}")
        rows, route_rows, route_experts = frame.read_parcel(self._parcels_region, offset, header)
        return ShmParcel(
            self.sender, self._own, EpochId(header.term, header.number), header.ticket, header.layer,
            rows, route_rows, route_experts, self, header.parcel_index, self._parcels.take(nbytes),
        )  # fmt: skip

    def reply(self, parcel: ShmParcel, rows: Tensor) -> None:
        offset = self._claim(parcel, frame.reply_bytes(rows.shape[0], self._limits))
        frame.write_reply(self._replies_region, offset, parcel, parcel.index, rows, self._limits)
        self._publish(parcel)

    def refuse(self, parcel: ShmParcel, reason: RefusalReason, detail: str) -> None:
        encoded = frame.encode_detail(detail)
        offset = self._claim(parcel, frame.HEADER_BYTES + len(encoded))
        frame.write_refusal(self._replies_region, offset, parcel, parcel.index, reason, encoded, self._limits)
        self._publish(parcel)

    def _claim(self, parcel: ShmParcel, nbytes: int) -> int:
        if parcel.span.freed:
            raise ValueError(f"parcel {parcel.index} of ticket {parcel.ticket}: answered already")
        offset = self._replies.claim(nbytes)
        if offset is None:
            raise TransportError("link: no room for a reply; the peer did not keep to its capacity")
        return offset

    def _publish(self, parcel: ShmParcel) -> None:
        self._parcels.free(parcel.span)
        self._replies.publish()
        os.eventfd_write(self.wiring.replies_bell, 1)


@dataclass(frozen=True)
class ShmParcel(Parcel):
    link: ExpertLink = field(repr=False)
    index: int  # its place in the ticket
    span: Span = field(repr=False)
