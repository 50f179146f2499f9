"""What both faces of one gateway work with."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from expertmesh.v1.control_pb2 import ResizeReply, ResizeRequest, TraceReply

from gateway.cluster_events import ClusterWatch
from gateway.config import GatewayConfig
from gateway.errors import NotReady
from gateway.intake import Intake
from gateway.keys import Keeper
from gateway.ledger import Ledger
from gateway.metrics import GatewayMetrics
from gateway.model_card import ModelCard
from gateway.port import SchedulerPort
from gateway.validate import Call
from gateway.visit import current

Answer = TypeVar("Answer")


@dataclass
class GatewayState:
    """`status` brings the cluster's status document, or raises a Refusal; `trace` the step traces of
    the last so many seconds; `resize` what the controller says to other pools; `rebalance` has experts moved, or
    says what would be (True). Draining: no new calls."""

    config: GatewayConfig
    card: ModelCard
    port: SchedulerPort
    ledger: Ledger
    metrics: GatewayMetrics
    status: Callable[[], Awaitable[dict[str, Any]]]
    trace: Callable[[float], Awaitable[TraceReply]]
    resize: Callable[[ResizeRequest], Awaitable[ResizeReply]]
    rebalance: Callable[[bool], Awaitable[dict[str, Any]]]
    version: str
    is_draining: bool = False
    intake: Intake = field(init=False)
    keeper: Keeper = field(init=False)
    watch: ClusterWatch = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(self.config)
        self.keeper = Keeper(self.config)
        self.watch = ClusterWatch(self.config, lambda: self.asked(self.status()))

    @property
    def not_ready(self) -> str:
        """Why no call is taken now; empty when they are."""
        return "this gateway is draining" if self.is_draining else self.port.not_ready

    @property
    def model_len_max(self) -> int:
        """Longest prompt and answer together, in tokens: the checkpoint's, or less where workers hold less."""
        return min(self.card.context, self.port.model_len_max or self.card.context)

    def check_open(self) -> None:
        """Raises NotReady or Overloaded where a call is hopeless before its body is read.

        A scheduler that is only away for a while is waited for, within `submit_timeout_s`, once workers are known.
        """
        if self.is_draining or (self.port.not_ready and not self.port.model_len_max):
            raise NotReady(self.not_ready, retry_after_s=self.config.retry_after_s)
        self.ledger.check_room(1)

    def admitted(self, call: Call) -> Call:
        """The call as its key's: the tenant's, and charged to it."""
        requests = current().admit(call.requests, self.config.cache_shared_by)
        return dataclasses.replace(call, requests=requests)

    async def asked(self, question: Awaitable[Answer], timeout_s: float | None = None) -> Answer:
        """The controller's answer, within `status_timeout_s` if not told otherwise. Raises NotReady if it takes
        too long, and what `question` raises."""
        try:
            async with asyncio.timeout(timeout_s or self.config.status_timeout_s):
                return await question
        except TimeoutError:
            raise NotReady(
                "the controller did not answer in time", retry_after_s=self.config.retry_after_s
            ) from None

    async def rebalanced(self, dry_run: bool) -> dict[str, Any]:
        """The document of `expertmesh rebalance`. Raises NotReady."""
        return await self.asked(self.rebalance(dry_run), self.config.rebalance_timeout_s)
