"""One event loop for all tests of a process, as a real process has.

grpc.aio keeps one poller for all loops; an event that comes in late for a loop that a test has closed would be
raised inside the next test.
"""

import asyncio
import atexit
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_runner = asyncio.Runner()
atexit.register(_runner.close)


def run(work: Coroutine[Any, Any, T]) -> T:
    """What it leaves running ends with it, so that nothing of one test is met by the next."""
    return _runner.run(_whole(work))


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    finally:
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left)
