"""Addresses that outlive one process: ports that nobody else is handed, and taking one from an earlier life.

The kernel frees it when that life has ended, which for one that is frozen or slow to die is after its successor
has begun. So a successor asks again for a bounded time; then it ends, and the next begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_PAUSE_S = 0.1
_QUIET_PORTS = range(20_000, 32_000)
_TRIED_MAX = 200


def quiet_ports(host: str, count: int) -> list[int]:
    """Free TCP ports, below what the kernel gives to outgoing connections and above what Ray gives to workers:
    nobody is handed them between our look and the bind, nor between two lives of who holds them.

    Raises OSError if hardly one is free.
    """
    ports: list[int] = []
    for port in random.sample(_QUIET_PORTS, _TRIED_MAX):
        if len(ports) == count:
            return ports
        with contextlib.suppress(OSError), socket.create_server((host, port)):
            ports.append(port)
    raise OSError(
        f"{host}: of {_TRIED_MAX} ports from {_QUIET_PORTS.start} to {_QUIET_PORTS.stop} hardly one is free"
    )


async def take(begin: Callable[[], Awaitable[T]], refused: type[Exception], wait_s: float) -> T:
    """`begin()`, again and again for `wait_s` while it raises `refused`; then that is raised."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + wait_s
    while True:
        try:
            return await begin()
        except refused:
            if loop.time() >= deadline_s:
                raise
        await asyncio.sleep(_PAUSE_S)
