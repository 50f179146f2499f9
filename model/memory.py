"""How much memory this process may still take, and a clear refusal before it takes more."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


class NotEnoughMemory(Exception):
    """What was wanted, how much it needs, how much there is."""


def available_bytes() -> int:
    """Free on the machine, or what the container's limit leaves if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(_CGROUP_USED.read_text()))
    except FileNotFoundError:
        return free  # no container limit
    return max(free, 0)


def require(needed: int, what: str, remedy: str) -> None:
    """Raise NotEnoughMemory unless `needed` bytes can be taken."""
    free = available_bytes()
    if needed > free:
        raise NotEnoughMemory(
            f"{what} need {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are available; {remedy}"
        )
