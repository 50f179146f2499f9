"""The handful of CUDA and NCCL calls that the exchange makes, as a seam: the real ones are in cupy_gpu.py.

Nothing here imports cupy, and nothing loads it before a GPU is asked for. A GPU belongs to one end; its calls come
from one thread at a time, but for `join`, `Comm.meet` and `Comm.abort`, which may never return and are therefore
called aside (aside.py).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from router.errors import GpuUnavailable

_log = logging.getLogger(__name__)

GPU_KINDS = ("nccl", "cuda_ipc")
UNIQUE_ID_BYTES = 128


class Memory(Protocol):
    """Device memory that two processes share."""

    tensor: Tensor  # [nbytes] uint8
    handle: bytes  # by which another process opens it; empty: it was opened, and is another's

    def close(self) -> None:
        """Let go of it: freed, or another's unmapped, with the last tensor that views it. Idempotent."""


class Comm(Protocol):
    """One rank of a communicator of two, of which rank 0 only sends and rank 1 only receives: on a stream of its
    own, in the order of the calls."""

    def meet(self) -> None:
        """Send or receive a first element, and wait for it: NCCL connects two ranks at first use, and the call
        blocks until both make it. Raises GpuError; so it does when aborted."""

    def send(self, rows: Tensor, done: Callable[[], None]) -> None:
        """Enqueue, behind what the current stream computes now. `rows` is kept until sent. `done` is called from
        another thread, after what was done before it; never once aborted."""

    def receive(self, rows: Tensor, done: Callable[[], None]) -> None:
        """Enqueue, behind nothing but earlier ones. `rows` is from `Gpu.empty`."""

    def error(self) -> str:
        """What has gone wrong since; empty: nothing known."""

    def abort(self) -> None:
        """End what is enqueued, finished or not, and free everything. May block. Idempotent."""


class Gpu(Protocol):
    device: torch.device

    def allocate(self, nbytes: int) -> Memory:
        """Raises GpuError."""

    def open(self, handle: bytes, nbytes: int) -> Memory:
        """Raises GpuError if it cannot be mapped here: another host, or GPUs that do not reach each other."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory to receive into, contents undefined; may be computed with on the current stream once received."""

    def finish(self) -> None:
        """Wait until the current stream has done all that was asked of it. Waits for no peer."""

    def unique_id(self) -> bytes:
        """Of a communicator to be: UNIQUE_ID_BYTES. Raises GpuError."""

    def join(self, unique_id: bytes, rank: int) -> Comm:
        """Blocks until the other rank has joined, which may be never. Raises GpuError."""


def gpu_for(kind: str, device: torch.device) -> Gpu | None:
    """What rows of this transport travel between; None: through the host. Raises GpuUnavailable.

    "auto" goes through the host where cupy is missing, and says so.
    """
    if kind in GPU_KINDS and device.type != "cuda":
        raise GpuUnavailable(
            f"transport (--transport): {kind!r}, but the device is {device}; accepted with it: auto, shm, grpc"
        )
    if device.type != "cuda" or kind not in (*GPU_KINDS, "auto"):
        return None
    if missing := why_no_cupy():
        if kind != "auto":
            raise GpuUnavailable(f"transport (--transport): {kind!r}, but {missing}")
        _log.warning("rows between GPUs pass through the host: %s", missing)
        return None
    from router.transport.cupy_gpu import CupyGpu

    return CupyGpu(device)


def why_no_cupy() -> str:
    """Why GPUs cannot exchange rows; empty: cupy is installed."""
    if importlib.util.find_spec("cupy") is not None:
        return ""
    return "cupy is not installed; install the extra `gpu`: pip install 'expertmesh[gpu]' (package cupy-cuda12x)"
