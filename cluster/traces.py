"""Step traces on their way from attention workers to whoever asks the controller for them.

Not the controller's business: nothing is decided by them. One question at a time, so that no more than
`BYTES_MAX` of records is ever under way; who does not answer in time is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.events import SendTrace
from router.membership import Traced
from router.placement import Member

BYTES_MAX = 32 << 20  # of all workers' records, uncompressed
SECONDS_MAX = 60.0


class Traces:
    """Lives in the controller's event loop."""

    def __init__(self, send: Callable[[Member, SendTrace], None], term: int) -> None:
        """`send`: puts the order on the member's stream, if it has one. `term`: of the controller. No two ask
        under the same number, so an answer to one never passes for an answer to the next."""
        self._send = send
        self._asking = asyncio.Lock()
        self._number = term << 32
        self._owing: set[Member] = set()
        self._came: dict[str, bytes] = {}
        self._all_came = asyncio.Event()

    async def ask(
        self, members: Sequence[Member], seconds: float, timeout_s: float
    ) -> tuple[dict[str, bytes], list[str]]:
        """Traces by worker, and who did not answer within `timeout_s`. Raises TimeoutError while others ask."""
        async with asyncio.timeout(timeout_s) as limit:
            async with self._asking:
                self._number += 1
                self._owing, self._came = set(members), {}
                self._all_came.clear()
                for member in members:
                    self._send(member, SendTrace(self._number, seconds, BYTES_MAX // len(members)))
                limit.reschedule(None)
                if members:
                    await self._wait(timeout_s)
                came, owing = self._came, sorted(member.id for member in self._owing)
                self._owing, self._came = set(), {}
                return came, owing

    async def _wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_came.wait()
        except TimeoutError:
            return

    def answered(self, member: Member, report: Traced) -> None:
        """What is late, or was not asked for, is dropped."""
        if report.number != self._number or member not in self._owing:
            return
        self._owing.remove(member)
        self._came[member.id] = report.trace
        if not self._owing:
            self._all_came.set()
