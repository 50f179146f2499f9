"""The two ends of one shared-memory link: frames in rings, bells to wake the other side.

A link is the socket its handshake used (whose closing says that the peer is gone), a segment of two rings, and
two eventfds: bells. A bell is only ever added to and watched for edges, never read. A pulse is a count in the
segment: it takes no room in a ring, and nobody has to take it out.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from torch import Tensor

from router.config import RouterConfig
from router.errors import PeerGone, TransportError
from router.placement import Member
from router.transport import frame
from router.transport.base import LinkIdentity, Parcel, Peer, RefusalReason, Spent
from router.transport.lane import Lane
from router.transport.link import AttentionLink, ExpertLink, Incoming, LinkedParcel, Span
from router.transport.shm_bell import ring
from router.transport.shm_ring import ENTRIES, RingReader, RingWriter, Segment, aligned
from router.transport.watch import HUNG_UP, RUNG, Watch


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


class _Wires:
    """One side's hold on the wiring: hears of the peer's end, and lets go once."""

    def __init__(self, wiring: Wiring, bell: int, lane: Lane | None) -> None:
        self.wiring = wiring
        self._lane = lane
        self._gone = ""  # why the peer is, once it is
        self._interrupted = False
        self._has_left = False
        self._bell = bell
        self._watch: Watch | None = None
        self._closed = False

    def join(self, watch: Watch) -> None:
        self._watch = watch
        watch.add(self.wiring.sock.fileno(), HUNG_UP, self._hear)
        watch.add(self._bell, RUNG)
        if self._lane is not None:
            self._lane.join(watch)

    def _hear(self) -> None:
        """The socket became readable, on which the peer has nothing to say."""
        try:
            said = self.wiring.sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            self._has_left = True
            self._gone = f"the peer's socket: {error}"
        else:
            self._interrupted, self._has_left = bool(said), not said
            self._gone = "the peer has closed its socket"

    def refuse_gone(self) -> None:
        if self._interrupted:
            raise TransportError("link: the peer speaks out of turn")
        if self._gone:
            raise PeerGone(self._gone)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.remove(self.wiring.sock.fileno())
            self._watch.remove(self._bell)
        if self._lane is not None:  # before the socket, whose closing says that it was done
            self._lane.close(peer_has_left=self._has_left)
        self.wiring.close()


class ShmAttentionLink(AttentionLink):
    def __init__(
        self, peer: Peer, identity: LinkIdentity, config: RouterConfig, wiring: Wiring, lane: Lane | None = None
    ) -> None:
        super().__init__(peer, identity, config, lane)
        self.kind = lane.kind if lane else "shm"
        self._wires = _Wires(wiring, wiring.replies_bell, lane)
        self._pulses = wiring.segment.pulses
        self._pulses_seen = 0
        self._parcels = RingWriter(wiring.segment.parcels)
        self._parcels_region = (lane.outgoing if lane else frame.Region)(
            wiring.segment.parcels.frames, self._limits
        )
        self._replies = RingReader(wiring.segment.replies)
        self._replies_region = (lane.incoming if lane else frame.Region)(
            wiring.segment.replies.frames, self._limits
        )

    def join(self, watch: Watch) -> None:
        self._wires.join(watch)

    def free(self, span: Span) -> None:
        if self._lane is not None and not span.freed:
            self._lane.done_reading(span.apart_bytes)
        self._replies.free(span)

    def close(self) -> None:
        self._wires.close()

    def _footprint(self, nbytes: int) -> int:
        return aligned(nbytes)

    def _has_room_for_reply(self, promised: int) -> bool:
        return (
            promised + self._replies.held_bytes <= self._occupied_max
            and len(self.unanswered) + self._replies.held_frames < ENTRIES
        )

    def _put(self, parcel: Parcel, index: int, nbytes: int) -> bool:
        offset = self._parcels.claim(nbytes)
        if offset is None:
            return False
        frame.write_parcel(self._parcels_region, offset, parcel, index, self._limits)
        self._parcels.publish()
        ring(self._wires.wiring.parcels_bell)
        return True

    def _next(self) -> Incoming | None:
        found = self._replies.next()
        pulses = self._pulses[0]
        if found is not None or pulses != self._pulses_seen:
            self._pulses_seen = pulses
            self.heard_s = time.monotonic()
        if found is None:
            self._wires.refuse_gone()
            return None
        return Incoming(self._replies_region, *found)

    def _take(self, nbytes: int) -> Span:
        return self._replies.take(nbytes)


class ShmExpertLink(ExpertLink):
    def __init__(
        self, sender: Member, identity: LinkIdentity, config: RouterConfig, wiring: Wiring,
        lane: Lane | None = None,
    ) -> None:  # fmt: skip
        super().__init__(sender, identity, config, lane)
        self._wires = _Wires(wiring, wiring.parcels_bell, lane)
        self._pulses = wiring.segment.pulses
        self._parcels = RingReader(wiring.segment.parcels)
        self._parcels_region = (lane.incoming if lane else frame.Region)(
            wiring.segment.parcels.frames, self._limits
        )
        self._replies = RingWriter(wiring.segment.replies)
        self._replies_region = (lane.outgoing if lane else frame.Region)(
            wiring.segment.replies.frames, self._limits
        )

    @property
    def owes(self) -> bool:
        return self._parcels.has_more

    def pulse(self) -> None:
        self._pulses[0] = (self._pulses[0] + 1) % 2**64
        self._ring()

    def join(self, watch: Watch) -> None:
        self._wires.join(watch)

    def close(self) -> None:
        self._wires.close()

    def _refuse_gone(self) -> None:
        self._wires.refuse_gone()

    def _next(self) -> Incoming | None:
        found = self._parcels.next()
        if found is None:
            self._wires.refuse_gone()
            return None
        return Incoming(self._parcels_region, *found)

    def _take(self, nbytes: int) -> Span:
        return self._parcels.take(nbytes)

    def _reply(self, parcel: LinkedParcel, rows: Tensor, spent: Spent) -> None:
        offset = self._claim(frame.reply_bytes(rows.shape[0], self._limits))
        frame.write_reply(self._replies_region, offset, parcel, parcel.index, rows, spent, self._limits)
        self._publish(parcel)

    def _refuse(self, parcel: LinkedParcel, reason: RefusalReason, detail: bytes) -> None:
        offset = self._claim(frame.HEADER_BYTES + len(detail))
        frame.write_refusal(self._replies_region, offset, parcel, parcel.index, reason, detail, self._limits)
        self._publish(parcel)

    def _claim(self, nbytes: int) -> int:
        offset = self._replies.claim(nbytes)
        if offset is None:
            raise TransportError("link: no room for a reply; the peer did not keep to its capacity")
        return offset

    def _publish(self, parcel: LinkedParcel) -> None:
        if self._lane is not None:
            self._lane.done_reading(parcel.span.apart_bytes)
        self._parcels.free(parcel.span)
        self._replies.publish()
        self._ring()

    def _ring(self) -> None:
        ring(self._wires.wiring.replies_bell)
