"""`nccl`: rows from GPU to GPU by two communicators of one pair, one for each direction.

Why two: NCCL keeps the operations of a communicator in order, whatever their streams, and a sending kernel ends
only when its peer receives. With one for both directions two ends that send at once, as they do with two
microbatches, would each wait behind their own send. With one for each, a send waits for earlier sends of its
direction and for the peer's host thread, which receives as soon as it reads the header; and a header is published
only when its send is enqueued. So no receive waits for what was not sent, and no circle can close (decision 11).

Joining happens aside, from the hello on: a peer that never joins costs its place among the pairs, and no time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from torch import Tensor

from router.config import RouterConfig
from router.errors import GpuError, LinkRefused, TransportError
from router.transport.aside import Aside
from router.transport.base import LinkIdentity
from router.transport.cuda import UNIQUE_ID_BYTES, Comm, Gpu
from router.transport.frame import FrameLimits, Region
from router.transport.lane import Lane, Pairs
from router.transport.link import occupied_bytes_max
from router.transport.watch import RUNG, Watch

_GRACE_S = 5.0  # for threads aside when an end closes


class PairRegion(Region):
    """Frames without rows: these are received when their frame is read, and sent when it is written."""

    def __init__(self, buffer: memoryview, limits: FrameLimits, lane: PairLane) -> None:
        super().__init__(buffer, limits)
        self._lane = lane

    def rows(self, _offset: int, num_rows: int, width: int) -> Tensor:
        return self._lane.receive(num_rows, width)

    def put_rows(self, _offset: int, rows: Tensor, _nbytes: int) -> None:
        self._lane.send(rows)


class PairLane(Lane):
    kind = "nccl"

    def __init__(self, lanes: PairLanes, ids: tuple[bytes, ...] = ()) -> None:
        """ids: of the communicator of parcels and of that of replies, if this end has them made: the expert's,
        since NCCL keeps a thread for an id until both ranks have come, and experts refuse before they make one."""
        self._lanes, self._ids = lanes, ids
        self._sends_parcels = not ids
        self.key = b"".join(ids)
        self._guard = threading.Lock()  # of what follows, which threads aside and callbacks touch
        self._comms: list[Comm] = []  # of parcels and of replies, as they are joined
        self._failed = ""
        self._is_joining = self._is_open = self._closed = False
        self._until_s = 0.0
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch: Watch | None = None

    @property
    def bell(self) -> int:
        return self._bell

    def complete(self, key: bytes) -> None:
        if len(key) != 2 * UNIQUE_ID_BYTES:
            raise LinkRefused(f"nccl: a key of {len(key)} bytes; must be {2 * UNIQUE_ID_BYTES}")
        self._ids = (key[:UNIQUE_ID_BYTES], key[UNIQUE_ID_BYTES:])
        self.begin()

    def begin(self) -> None:
        """Join, aside."""
        self._is_joining = True
        self._until_s = time.monotonic() + self._lanes.join_timeout_s
        self._lanes.aside.start(self._join, "exchange-nccl-join")

    def is_open(self) -> bool:
        with self._guard:
            if self._failed:
                raise TransportError(f"nccl: {self._failed}")
            if not self._is_open and time.monotonic() > self._until_s:
                raise TransportError(f"nccl: the peer has not joined within {self._lanes.join_timeout_s:g} s "
                                     "(connect_timeout_s)")  # fmt: skip
            is_open = self._is_open
        if self.posted > self.arrived:
            for comm in self._comms:
                if why := comm.error():
                    raise TransportError(f"nccl: {why}")
        return is_open

    def join(self, watch: Watch) -> None:
        self._watch = watch
        watch.add(self._bell, RUNG)

    def incoming(self, buffer: memoryview, limits: FrameLimits) -> Region:
        return PairRegion(buffer, limits, self)

    def outgoing(self, buffer: memoryview, limits: FrameLimits) -> Region:
        return PairRegion(buffer, limits, self)

    def send(self, rows: Tensor) -> None:
        """Replies are copied first: who computed them uses their memory again."""
        if len(rows):
            if not self._sends_parcels:
                rows = rows.clone()
            self._call(self._comms[0 if self._sends_parcels else 1].send, rows.contiguous(), lambda: None)

    def receive(self, num_rows: int, width: int) -> Tensor:
        """[num_rows, width], memory into which announced rows begin to come. Raises TransportError beyond the
        capacity."""
        identity, gpu = self._lanes.identity, self._lanes.gpu
        nbytes = num_rows * width * identity.dtype.itemsize
        if self.held_bytes + nbytes > self._lanes.held_max:
            raise TransportError(f"nccl: the peer sends {nbytes} bytes of rows beside {self.held_bytes} held; at "
                                 f"most {self._lanes.held_max}")  # fmt: skip
        rows = gpu.empty((num_rows, width), identity.dtype)
        if num_rows:
            self.held_bytes += nbytes
            self.posted += 1
            self._call(self._comms[1 if self._sends_parcels else 0].receive, rows, self._arrive)
        return rows

    def done_reading(self, nbytes: int) -> None:
        """Its memory is torch's, which knows the stream that reads."""
        self.held_bytes -= nbytes

    def close(self, *, peer_has_left: bool = False) -> None:  # noqa: ARG002
        """Communicators are aborted aside, so that a kernel that waits for the dead lets go."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            is_joining = self._is_joining
            comms = list(self._comms)
        if self._watch is not None:
            self._watch.remove(self._bell)
        os.close(self._bell)
        if not is_joining:
            self._lanes.aside.start(self._let_go, "exchange-nccl-end")
        for comm in comms if is_joining else ():  # wakes the thread that joins, which sees to the rest
            self._lanes.aside.start(comm.abort, "exchange-nccl-abort")

    # --- other threads -----------------------------------------------------------------------

    def _join(self) -> None:
        """Both ends join in the same order."""
        failed = ""
        try:
            for unique_id, sends in zip(self._ids, (self._sends_parcels, not self._sends_parcels), strict=True):
                comm = self._lanes.gpu.join(unique_id, 0 if sends else 1)
                with self._guard:
                    self._comms.append(comm)
                    if self._closed:
                        break
                comm.meet()
        except GpuError as error:
            failed = str(error)
        with self._guard:
            self._is_joining = False
            self._failed, self._is_open = failed, not failed
            was_closed = self._closed
            self._ring()
        if was_closed:
            self._let_go()

    def _let_go(self) -> None:
        """Give the pair back when nothing is left of it. Each communicator is aborted on a thread of its own: what
        one frees may wait for the other's kernels, which only its own abort ends."""
        threads = [threading.Thread(target=comm.abort, name="exchange-nccl-abort") for comm in self._comms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._lanes.pairs.give_back()

    def _arrive(self) -> None:
        with self._guard:
            self.arrived += 1
            self._ring()

    def _ring(self) -> None:
        """Guarded: once closed the bell's number may be another's."""
        if not self._closed:
            os.eventfd_write(self._bell, 1)

    @staticmethod
    def _call(
        operation: Callable[[Tensor, Callable[[], None]], None], rows: Tensor, done: Callable[[], None]
    ) -> None:
        try:
            operation(rows, done)
        except GpuError as error:
            raise TransportError(f"nccl: {error}") from error


class PairLanes:
    kind = "nccl"

    def __init__(self, gpu: Gpu, identity: LinkIdentity, config: RouterConfig, pairs: Pairs) -> None:
        self.gpu, self.identity = gpu, identity
        self.held_max = occupied_bytes_max(config)
        self.join_timeout_s = config.connect_timeout_s
        self.aside = Aside()
        self.pairs = pairs

    def offer(self, ring_bytes: int) -> Lane:  # noqa: ARG002
        self.pairs.take()
        return PairLane(self)

    def accept(self, key: bytes, ring_bytes: int) -> Lane:  # noqa: ARG002
        self.pairs.take()
        try:
            lane = PairLane(self, (self.gpu.unique_id(), self.gpu.unique_id()))
        except GpuError as error:
            self.pairs.give_back()
            raise LinkRefused(f"nccl: {error}") from error
        lane.begin()
        return lane

    def close(self) -> None:
        self.aside.close(_GRACE_S)
