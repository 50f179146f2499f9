"""`cuda_ipc`: rows copied between GPUs of one host, or between two processes on one GPU.

Each direction has a ring of device memory as long as its ring of host memory, and the rows of a frame lie in it
at the frame's own offset: room, order and credit are the host ring's, and are kept once. The host pages where the
rows would lie are never touched, hence never resident.

Each end owns what it reads and maps what it writes: who survives a death reads only its own memory. A frame is
published when the copy of its rows is done, and given back when the stream that read them is: both are waits for
our own GPU alone, which no peer can prolong.
"""

from __future__ import annotations

import time
from collections import deque

from torch import Tensor

from router.config import RouterConfig
from router.errors import GpuError, LinkRefused
from router.transport.cuda import Gpu, Memory
from router.transport.frame import FrameLimits, Region
from router.transport.lane import Lane, Pairs


class MirrorRegion(Region):
    """Frames in host memory, their rows at the same offsets on the device."""

    def __init__(self, buffer: memoryview, limits: FrameLimits, gpu: Gpu, memory: Memory) -> None:
        super().__init__(buffer, limits, memory.tensor.view(limits.dtype))
        self._gpu = gpu

    def put_rows(self, offset: int, rows: Tensor, _nbytes: int) -> None:
        if len(rows):
            self.rows(offset, *rows.shape).copy_(rows)
            self._gpu.finish()


class MirrorLane(Lane):
    kind = "cuda_ipc"

    def __init__(self, lanes: MirrorLanes, ring_bytes: int) -> None:
        self._lanes, self._ring_bytes = lanes, ring_bytes
        self._own: Memory | None = lanes.allocate(ring_bytes)
        self._theirs: Memory | None = None
        self.key = self._own.handle

    def complete(self, key: bytes) -> None:
        try:
            self._theirs = self._lanes.gpu.open(key, self._ring_bytes)
        except GpuError as error:
            raise LinkRefused(f"cuda_ipc: the peer's memory cannot be mapped: {error}") from error

    def incoming(self, buffer: memoryview, limits: FrameLimits) -> Region:
        assert self._own is not None
        return MirrorRegion(buffer, limits, self._lanes.gpu, self._own)

    def outgoing(self, buffer: memoryview, limits: FrameLimits) -> Region:
        assert self._theirs is not None
        return MirrorRegion(buffer, limits, self._lanes.gpu, self._theirs)

    def done_reading(self, nbytes: int) -> None:  # noqa: ARG002
        self._lanes.gpu.finish()

    def close(self, *, peer_has_left: bool = False) -> None:
        if self._own is None:
            return
        self._lanes.gpu.finish()
        if self._theirs is not None:
            self._theirs.close()
        self._lanes.retire(self._own, peer_has_left=peer_has_left)
        self._own = self._theirs = None


class MirrorLanes:
    kind = "cuda_ipc"

    def __init__(self, gpu: Gpu, config: RouterConfig, pairs: Pairs) -> None:
        self.gpu = gpu
        self._pairs = pairs
        self._grace_s = config.connect_timeout_s
        self._retired: deque[tuple[float, Memory]] = deque()  # when it may be freed

    def offer(self, ring_bytes: int) -> Lane:
        return MirrorLane(self, ring_bytes)

    def accept(self, key: bytes, ring_bytes: int) -> Lane:
        lane = MirrorLane(self, ring_bytes)
        try:
            lane.complete(key)
        except LinkRefused:
            lane.close()
            raise
        return lane

    def allocate(self, ring_bytes: int) -> Memory:
        while self._retired and self._retired[0][0] <= time.monotonic():
            self._free_oldest()
        self._pairs.take()
        try:
            return self.gpu.allocate(ring_bytes)
        except GpuError as error:
            self._pairs.give_back()
            raise LinkRefused(f"cuda_ipc: no device memory for a ring of {ring_bytes} bytes: {error}") from error

    def retire(self, memory: Memory, *, peer_has_left: bool) -> None:
        """Let go of it; if the peer lives, when it has had time to unmap it: CUDA leaves undefined what becomes of
        memory freed while mapped elsewhere. Until then it counts as a pair."""
        if peer_has_left:
            memory.close()
            self._pairs.give_back()
        else:
            self._retired.append((time.monotonic() + self._grace_s, memory))

    def _free_oldest(self) -> None:
        self._retired.popleft()[1].close()
        self._pairs.give_back()

    def close(self) -> None:
        while self._retired:
            self._free_oldest()
