"""Taking an address that an earlier life of the same process may still hold.

The kernel frees it when that life has ended, which for one that is frozen or slow to die is after its successor
has begun. So a successor asks again for a bounded time; then it ends, and the next begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_PAUSE_S = 0.1


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
