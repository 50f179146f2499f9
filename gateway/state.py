"""What both faces of one gateway work with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gateway.config import GatewayConfig
from gateway.errors import NotReady
from gateway.ledger import Ledger
from gateway.metrics import GatewayMetrics
from gateway.model_card import ModelCard
from gateway.port import SchedulerPort

Answer = TypeVar("Answer")


@dataclass
class GatewayState:
    """`status` brings the cluster's status document, or raises a Refusal. Draining: no new calls."""

    config: GatewayConfig
    card: ModelCard
    port: SchedulerPort
    ledger: Ledger
    metrics: GatewayMetrics
    status: Callable[[], Awaitable[dict[str, Any]]]
    version: str
    is_draining: bool = False

    @property
    def not_ready(self) -> str:
        """Why no call is taken now; empty when they are."""
        return "this gateway is draining" if self.is_draining else self.port.not_ready

    @property
    def model_len_max(self) -> int:
        """Longest prompt and answer together, in tokens: the checkpoint's, or less where workers hold less."""
        return min(self.card.context, self.port.model_len_max or self.card.context)

    async def asked(self, question: Awaitable[Answer]) -> Answer:
        """The controller's answer. Raises NotReady if it takes too long, and what `question` raises."""
        try:
            async with asyncio.timeout(self.config.status_timeout_s):
                return await question
        except TimeoutError:
            raise NotReady(
                "the controller did not answer in time", retry_after_s=self.config.retry_after_s
            ) from None
