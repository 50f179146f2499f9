"""A small process that outlives `serve` for a moment: `kill -9` of `serve` leaves nothing of its Ray behind.

It waits for the end of a pipe whose other end `serve` alone holds, so that the kernel tells it of any death. Then
it kills every process that inherited the mark which `serve` put into its environment, and removes Ray's folder.
It is no child of `serve` and in a session of its own: neither Ctrl-C nor what `serve` does to its children reaches
it. Run as a script it needs the standard library alone, and starts in 30 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "EXPERTMESH_GUARDED"  # in the environment of all that is to end with `serve`: Ray's folder
_RAY_TITLE = b"ray::"
_CLEAN_S = 10.0
_PAUSE_S = 0.02


class Guardian:
    """`serve`'s side. What `serve` starts from now on is guarded."""

    def __init__(self, folder: str) -> None:
        """`folder`: Ray's own for this cluster, removed at the end."""
        folder = os.path.realpath(folder)
        watched, self._alive = os.pipe()
        self._over, said = os.pipe()
        script = [sys.executable, "-I", "-S", __file__, folder]
        subprocess.run(script, stdin=watched, stdout=said, start_new_session=True, check=True)
        os.close(watched)
        os.close(said)
        os.environ[MARK] = folder

    def close(self) -> None:
        """Have it clean up what is left, and end. Returns when it has."""
        del os.environ[MARK]
        os.close(self._alive)
        select.select([self._over], [], [], _CLEAN_S)
        os.close(self._over)


def _guard(folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        continue
    deadline_s = time.monotonic() + _CLEAN_S
    while (left := _left(folder)) and time.monotonic() < deadline_s:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)
    shutil.rmtree(folder, ignore_errors=True)


def _left(folder: str) -> list[int]:
    """Living processes that are to end."""
    found = []
    for process in Path("/proc").iterdir():
        # A process may end while it is looked at; another user's cannot be, and is none of ours.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if process.name.isdigit() and _is_ours(process, folder):
                found.append(int(process.name))
    return found


def _is_ours(process: Path, folder: str) -> bool:
    """It inherited the mark; or it is one of Ray's that write to the folder: the title that Ray gives a process
    may lie over what was its environment."""
    if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
        return True
    has_title = (process / "cmdline").read_bytes().startswith(_RAY_TITLE)
    return has_title and any(_is_within(link, folder) for link in (process / "fd").iterdir())


def _is_within(link: Path, folder: str) -> bool:
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        return os.readlink(link).startswith(f"{folder}/")
    return False


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # `serve` has waited for this one: the other is nobody's child
    _guard(sys.argv[1])
