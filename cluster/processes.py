"""Processes of the cluster by number: ending those that would not hear a word, seeing which have ended."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil

_RAY_TITLE = "ray::"  # how Ray names the processes of its actors


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
