"""Processes of the cluster by number: ending those that would not hear a word, seeing which have ended."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil

BEHIND = 5
"""Niceness of a thread whose work can wait for those who serve: a third of their share where cores are scarce."""

_RAY_TITLE = "ray::"  # how Ray names the processes of its actors


def step_back() -> None:
    """This thread, and those it starts, for good: on Linux niceness is a thread's own."""
    os.nice(BEHIND)


def import_behind(*names: str) -> None:
    """Import these modules behind those who serve: a worker's start is two seconds of a core, most of them torch's
    import, and beside what it is to replace few are idle."""
    with ThreadPoolExecutor(1, "importing", step_back) as aside:
        for name in names:
            aside.submit(importlib.import_module, name).result()


def end_process(pid: int) -> None:
    """SIGKILL, if the process is one of Ray's: a number may be another's by now."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(pid).cmdline()[:1] and psutil.Process(pid).cmdline()[0].startswith(_RAY_TITLE):
            os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    """Also when nobody has waited for it yet."""
    try:
        return has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def has_ended(process: psutil.Process) -> bool:
    """Also when nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
