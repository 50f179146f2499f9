"""A GPU for machines that have none: the calls of `router/transport/cuda.py`, between real processes.

Device memory is a memfd, whose handle another process opens. A communicator is a socket, and keeps what matters of
NCCL: joining blocks until the peer has joined; operations run in order, behind the caller's back; a send ends only
when its receive has been posted; and whoever waits for a peer that has died waits for ever, until aborted.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import secrets
import select
import socket
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from router.errors import GpuError
from router.transport.cuda import UNIQUE_ID_BYTES


class StandInMemory:
    def __init__(self, descriptor: int, nbytes: int, *, is_own: bool) -> None:
        if os.fstat(descriptor).st_size != nbytes:
            raise GpuError(f"{os.fstat(descriptor).st_size} bytes; must be {nbytes}")
        self.handle = f"{os.getpid()}/{descriptor}".encode() if is_own else b""
        self.tensor = torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)
        self._descriptor = descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self.tensor = torch.empty(0, dtype=torch.uint8)  # the mapping goes with its last view


class StandInGpu:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.receives = 0  # posted
        self._made: dict[bytes, socket.socket] = {}  # ids made here and not joined yet

    def allocate(self, nbytes: int) -> StandInMemory:
        descriptor = os.memfd_create("expertmesh-device")
        os.ftruncate(descriptor, nbytes)
        return StandInMemory(descriptor, nbytes, is_own=True)

    def open(self, handle: bytes, nbytes: int) -> StandInMemory:
        try:
            process, descriptor = map(int, handle.decode().split("/"))
            opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise GpuError(f"handle: {error}") from error
        try:
            return StandInMemory(opened, nbytes, is_own=False)
        except GpuError:
            os.close(opened)
            raise

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def finish(self) -> None:
        pass

    def unique_id(self) -> bytes:
        unique_id = secrets.token_hex(16).encode().ljust(UNIQUE_ID_BYTES, b".")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_name(unique_id))
        listener.listen(1)
        self._made[unique_id] = listener
        return unique_id

    def join(self, unique_id: bytes, rank: int) -> StandInComm:
        listener = self._made.get(unique_id)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if listener is None:
                sock.connect(_name(unique_id))
            else:
                sock.close()
                sock, _ = listener.accept()
        except OSError as error:
            sock.close()
            raise GpuError(f"join: {error}") from error
        finally:
            if listener is not None:
                self._made.pop(unique_id, listener).close()
        return StandInComm(sock, rank, self)

    def end_joining(self) -> None:
        """What a test needs and NCCL has not: joins that wait for a peer fail, and ids not joined are let go."""
        for listener in list(self._made.values()):
            with contextlib.suppress(OSError):  # joined meanwhile
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def _name(unique_id: bytes) -> bytes:
    return b"\0expertmesh/stand-in/" + unique_id[:32]


class StandInComm:
    def __init__(self, sock: socket.socket, rank: int, gpu: StandInGpu) -> None:
        sock.setblocking(False)
        self._sock, self._rank, self._gpu = sock, rank, gpu
        self._asked: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._abort = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="stand-in stream")
        self._thread.start()

    def meet(self) -> None:
        met = threading.Event()
        first = torch.zeros(1, dtype=torch.uint8)
        (self.send if self._rank == 0 else self.receive)(first, met.set)
        while not met.wait(0.005):
            if self._thread is None or not self._thread.is_alive():
                raise GpuError("aborted")
        self._gpu.receives = 0

    def send(self, rows: Tensor, done: Callable[[], None]) -> None:
        assert self._rank == 0, "this communicator only receives"
        self._asked.put((lambda: self._send(rows), done))

    def receive(self, rows: Tensor, done: Callable[[], None]) -> None:
        assert self._rank == 1, "this communicator only sends"
        self._gpu.receives += 1
        self._asked.put((lambda: self._receive(rows), done))

    def error(self) -> str:
        return ""

    def abort(self) -> None:
        with self._guard:
            if self._thread is None:
                return
            os.eventfd_write(self._abort, 1)
            self._asked.put(None)
            self._thread.join()
            self._thread = None
            self._sock.close()
            os.close(self._abort)

    # --- the stream's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (asked := self._asked.get()) is not None:
                operation, done = asked
                operation()
                done()
        except _Aborted:
            return

    def _send(self, rows: Tensor) -> None:
        self._take(1)  # the receive is posted
        left = memoryview(rows.view(torch.uint8).numpy().reshape(-1)).cast("B")
        while left:
            self._wait(select.POLLOUT)
            try:
                left = left[self._sock.send(left) :]
            except OSError:
                self._hang()

    def _receive(self, rows: Tensor) -> None:
        try:
            self._sock.send(b"!")
        except OSError:
            self._hang()
        into = rows.view(torch.uint8).view(-1)
        into.copy_(torch.frombuffer(self._take(into.numel()), dtype=torch.uint8))

    def _take(self, nbytes: int) -> bytearray:
        taken = bytearray()
        while len(taken) < nbytes:
            self._wait(select.POLLIN)
            try:
                came = self._sock.recv(nbytes - len(taken))
            except OSError:
                came = b""
            if not came:
                self._hang()
            taken += came
        return taken

    def _hang(self) -> None:
        """As a kernel does that waits for the dead."""
        self._wait(0)

    def _wait(self, events: int) -> None:
        waiting = select.poll()
        waiting.register(self._abort, select.POLLIN)
        if events:
            waiting.register(self._sock, events)
        waiting.poll()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._abort)
            raise _Aborted


class _Aborted(Exception):
    pass
