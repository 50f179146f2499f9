"""What changes in the cluster, for whoever watches: the differences between two status documents.

Documents are asked for while anybody watches, every `watch_s`, once for all. Who reads slowly is told the
difference to what it knew, so nothing queues. Of what came and went between two looks only failures are told: they
are numbered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from gateway.config import GatewayConfig
from gateway.errors import Overloaded, Refusal

_WORKER = (
    "id", "role", "pid", "node", "device", "state", "detail", "incarnation", "bytes_loaded", "bytes_total",
    "bytes_kept", "kept_as", "slots", "epoch",
)  # fmt: skip
"""Of a worker, what is news when it changes; the rest of its document changes all the time."""


def changes(known: dict[str, Any] | None, now: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """From one document to the next, each with its `type`. Another term knows other failures: it is told whole."""
    if known is None or known["term"] != now["term"]:
        yield {"type": "status", "status": now}
        return
    if known["phase"] != now["phase"]:
        yield {"type": "phase", "phase": now["phase"]}
    if known["epoch"] != now["epoch"]:
        yield {"type": "epoch", "epoch": now["epoch"]}
    before = {worker["id"]: _news(worker) for worker in known["workers"]}
    after = {worker["id"]: _news(worker) for worker in now["workers"]}
    for name, worker in after.items():
        if before.get(name) != worker:
            yield {"type": "worker", "worker": worker}
    for name in before.keys() - after.keys():
        yield {"type": "worker_left", "worker": name}
    for role, pool in now["pools"].items():
        if known["pools"].get(role) != pool:
            members = [worker for worker in now["workers"] if worker["role"] == role]
            sums = {name: sum(worker[name] for worker in members) for name in ("slots", "bytes_loaded")}
            yield {"type": "pool", "role": role, "pool": {**pool, **sums}}
    newest = max((failure["number"] for failure in known["failures"]), default=0)
    for failure in now["failures"]:
        if failure["number"] > newest:
            yield {"type": "failure", "failure": {name: failure[name] for name in _FAILURE}}
    if known["scaling_failed"] != now["scaling_failed"]:
        yield {"type": "scaling_failed", "reason": now["scaling_failed"]}


_FAILURE = ("number", "id", "incarnation", "reason")


def _news(worker: dict[str, Any]) -> dict[str, Any]:
    return {name: worker[name] for name in _WORKER}


class ClusterWatch:
    """In the gateway's event loop."""

    def __init__(self, config: GatewayConfig, ask: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        """`ask` brings the status document, or raises a Refusal."""
        self._config = config
        self._ask = ask
        self.num_watchers = 0
        self._looking: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()  # set with each look, and then replaced
        self._document: dict[str, Any] | None = None
        self._away = ""  # why there is none now

    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The whole document first, then what changes, until the generator is closed. A controller that does not
        answer is an event, and what it says when it is back is told whole. Raises Overloaded."""
        most = self._config.watchers_max
        if self.num_watchers >= most:
            told = f"{most} watch already; accepted: at most {most} (gateway.watchers_max)"
            raise Overloaded(told, retry_after_s=self._config.retry_after_s)
        return self._counted()

    async def _counted(self) -> AsyncGenerator[dict[str, Any], None]:
        self.num_watchers += 1
        try:
            async for event in self._told():
                yield event
        finally:
            self.num_watchers -= 1
            if not self.num_watchers and self._looking is not None:
                self._looking.cancel()
                self._looking = self._document = None

    async def _told(self) -> AsyncGenerator[dict[str, Any], None]:
        known, away = None, ""
        while True:
            if self._looking is None:
                self._looking = asyncio.create_task(self._look(), name="cluster-watch")
            if self._document is None and not self._away:
                await self._next_look()
            if self._away and self._away != away:
                yield {"type": "unreachable", "reason": self._away}
                known = None
            elif self._document is not None and not self._away:
                document = self._document
                for event in changes(known, document):
                    yield event
                known = document
            away = self._away
            await self._next_look()

    async def _next_look(self) -> None:
        """Raises what ended the looking."""
        looking, looked = self._looking, asyncio.ensure_future(self._looked.wait())
        assert looking is not None
        try:
            await asyncio.wait({looking, looked}, return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()
        finally:
            looked.cancel()

    async def _look(self) -> None:
        while True:
            try:
                self._document, self._away = await self._ask(), ""
            except Refusal as error:
                self._away = error.message
            self._looked.set()
            self._looked = asyncio.Event()
            await asyncio.sleep(self._config.watch_s)
