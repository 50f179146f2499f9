"""CUDA and NCCL through cupy and torch: the one file of the exchange that imports cupy.

torch owns memory to compute with, and the stream that computes; cupy lends what torch does not: device memory with
a handle for other processes, and NCCL's two-sided calls. Not run on hardware yet (docs/decisions/0011).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import torch
from cupy.cuda import nccl, runtime
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from router.errors import GpuError

_log = logging.getLogger(__name__)

ENVIRONMENT = {
    "NCCL_MAX_CTAS": "1",  # one channel for each communicator: one block of threads while it carries rows
    "NCCL_MAX_P2P_NCHANNELS": "1",
    "NCCL_NVLS_ENABLE": "0",  # is for many ranks, and takes memory
}
"""What NCCL reads when it is first used, unless the environment says otherwise. What CUDA itself must be told
before it begins is in the worker's environment: CUDA_DEVICE_MAX_CONNECTIONS and CUDA_MODULE_LOADING."""

_PROCESS = os.urandom(16)
"""A process may not open its own handle: it knows them by this."""
_POLL_S = 0.0005
_ERRORS: tuple[type[Exception], ...] = (runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError)
if nccl.available:
    _ERRORS += (nccl.NcclError,)
_DTYPES = {torch.float32: "NCCL_FLOAT32", torch.bfloat16: "NCCL_BFLOAT16", torch.uint8: "NCCL_UINT8"}


@contextmanager
def _as_gpu_error() -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise GpuError(str(error)) from error


def _require_nccl() -> None:
    if not nccl.available:
        raise GpuError(
            "cupy finds no libnccl.so.2; torch built for CUDA brings it, or the package nvidia-nccl-cu12"
        )


class _Freed:
    """Owns a pointer: frees it with the last tensor that views it."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free = free

    def __del__(self) -> None:
        self._free()


class CupyMemory:
    def __init__(
        self, pointer: int, nbytes: int, handle: bytes, device: torch.device, free: Callable[[], None]
    ) -> None:
        self.handle = handle
        owned = cupy.cuda.UnownedMemory(pointer, nbytes, _Freed(free), device.index)
        array = cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(owned, 0))
        self.tensor: Tensor = from_dlpack(array)  # keeps `array`
        if self.tensor.data_ptr() != pointer:
            raise GpuError(f"memory at {pointer:#x} cannot be viewed without a copy")

    def close(self) -> None:
        self.tensor = torch.empty(0)


class CupyGpu:
    def __init__(self, device: torch.device) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._arriving = cupy.cuda.Stream(non_blocking=True)
        self._arrivals = torch.cuda.ExternalStream(self._arriving.ptr, device=device)

    def allocate(self, nbytes: int) -> CupyMemory:
        with _as_gpu_error(), cupy.cuda.Device(self.device.index):
            pointer = runtime.malloc(nbytes)
            try:
                shared = runtime.ipcGetMemHandle(pointer)
            except _ERRORS:
                runtime.free(pointer)
                raise
        handle = _PROCESS + pointer.to_bytes(8, "little") + shared
        return CupyMemory(pointer, nbytes, handle, self.device, lambda: runtime.free(pointer))

    def open(self, handle: bytes, nbytes: int) -> CupyMemory:
        process, pointer, shared = handle[:16], int.from_bytes(handle[16:24], "little"), handle[24:]
        if process == _PROCESS:
            return CupyMemory(pointer, nbytes, b"", self.device, lambda: None)
        if len(shared) != 64:
            raise GpuError(f"a memory handle of {len(handle)} bytes; must be 88")
        with _as_gpu_error(), cupy.cuda.Device(self.device.index):
            mapped = runtime.ipcOpenMemHandle(shared)
        return CupyMemory(mapped, nbytes, b"", self.device, lambda: runtime.ipcCloseMemHandle(mapped))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of the arrivals' own pool, so that nothing received waits for what is computed; and not given out again
        before what computes with it is done."""
        with torch.cuda.stream(self._arrivals):
            rows = torch.empty(shape, dtype=dtype, device=self.device)
        rows.record_stream(torch.cuda.current_stream(self.device))
        return rows

    def finish(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def unique_id(self) -> bytes:
        _require_nccl()
        with _as_gpu_error():
            unique_id: bytes = nccl.get_unique_id()
        return unique_id

    def join(self, unique_id: bytes, rank: int) -> CupyComm:
        _require_nccl()
        with _as_gpu_error(), cupy.cuda.Device(self.device.index):
            return CupyComm(nccl.NcclCommunicator(2, unique_id, rank), rank, self)


class CupyComm:
    def __init__(self, comm: Any, rank: int, gpu: CupyGpu) -> None:
        self._comm, self._peer, self._gpu = comm, 1 - rank, gpu
        self._stream = cupy.cuda.Stream(non_blocking=True)  # a queue of its own: torch's come from a small pool
        self._held: list[Tensor] = []  # enqueued, by order
        self._guard = threading.Lock()
        self._aborted = False

    def meet(self) -> None:
        done = torch.cuda.Event()
        first = torch.zeros(1, dtype=torch.uint8, device=self._gpu.device)
        with cupy.cuda.Device(self._gpu.device.index):
            call = self._comm.send if self._peer == 1 else self._comm.recv
            with _as_gpu_error():
                call(first.data_ptr(), 1, nccl.NCCL_UINT8, self._peer, self._stream.ptr)
            done.record(torch.cuda.ExternalStream(self._stream.ptr, device=self._gpu.device))
        while not done.query():
            if self._aborted:
                raise GpuError("aborted")
            time.sleep(_POLL_S)

    def send(self, rows: Tensor, done: Callable[[], None]) -> None:
        computed = torch.cuda.current_stream(self._gpu.device).record_event()
        with _as_gpu_error():
            runtime.streamWaitEvent(self._stream.ptr, computed.cuda_event)
        self._enqueue(self._comm.send, rows, done)

    def receive(self, rows: Tensor, done: Callable[[], None]) -> None:
        self._enqueue(self._comm.recv, rows, done)

    def _enqueue(self, call: Callable[..., None], rows: Tensor, done: Callable[[], None]) -> None:
        with _as_gpu_error():
            dtype = getattr(nccl, _DTYPES[rows.dtype])
            call(rows.data_ptr(), rows.numel(), dtype, self._peer, self._stream.ptr)
            self._held.append(rows)
            self._stream.launch_host_func(self._passed, done)

    def _passed(self, done: Callable[[], None]) -> None:
        """On a thread of CUDA's, which may call nothing of CUDA."""
        self._held.pop(0)
        done()

    def error(self) -> str:
        try:
            self._comm.check_async_error()
        except nccl.NcclError as error:
            return str(error)
        return ""

    def abort(self) -> None:
        with self._guard:
            if self._aborted:
                return
            self._aborted = True
        try:
            self._comm.abort()
            self._stream.synchronize()
        except _ERRORS as error:  # the peer may be why, and nobody waits for this
            _log.warning("a communicator ended with %s", error)
