"""Processes of a benchmark: spawned, spoken to over a pipe, gone when left, whatever happened.

A child ends when its pipe does, so it outlives its parent by at most what it was asked last. Ctrl-C is the
parent's alone: a child inherits it blocked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.errors import BenchmarkError

_END_S = 10.0  # a killed process is gone long before


class Spawned:
    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        """`target(pipe, *arguments)`: a module's function. It answers each order with one message."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, target, arguments), name=name, daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, order: Any) -> None:
        try:
            self._pipe.send(order)
        except OSError as error:
            raise self._gone() from error

    def hear(self, timeout_s: float) -> Any:
        """Its next message. Raises BenchmarkError if it failed, is gone, or says nothing for so long."""
        try:
            if not self._pipe.poll(timeout_s):
                raise BenchmarkError(f"{self.name}: no word within {timeout_s:g} s")
            said = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if isinstance(said, BenchmarkError):
            raise said
        return said

    def ask(self, order: Any, timeout_s: float) -> Any:
        self.tell(order)
        return self.hear(timeout_s)

    def end(self) -> None:
        self._process.kill()
        self._process.join(_END_S)
        self._process.close()
        self._pipe.close()

    def _gone(self) -> BenchmarkError:
        self._process.join(_END_S)
        return BenchmarkError(f"{self.name}: the process has ended with exit code {self._process.exitcode}")


@contextlib.contextmanager
def spawned(name: str, target: Callable[..., None], *arguments: Any) -> Iterator[Spawned]:
    child = Spawned(name, target, *arguments)
    try:
        yield child
    finally:
        child.end()


def _run(pipe: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The child. What ends it is told before it goes."""
    try:
        target(pipe, *arguments)
    except (EOFError, BrokenPipeError):
        return  # the parent has gone
    except Exception as error:
        pipe.send(BenchmarkError(f"{multiprocessing.current_process().name}: {type(error).__name__}: {error}"))
        raise
