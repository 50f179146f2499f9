"""Ending processes of the cluster by number, when they would not hear a word."""

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
