"""One event loop for all tests of a process, as a real process has.

grpc.aio keeps one poller for all loops; an event that comes in late for a loop that a test has closed would be
raised inside the next test.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_runner = asyncio.Runner()


def run(work: Coroutine[Any, Any, T]) -> T:
    return _runner.run(work)
