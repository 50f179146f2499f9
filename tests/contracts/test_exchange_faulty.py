"""The faulty transport keeps the exchange contract: without faults as any, with faults as far as they let it."""

from __future__ import annotations

import pytest

from router.config import RouterConfig
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.local import LocalHub
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_stage import ExchangeStage
from tests.contracts.exchange_suite import ExchangeSuite


class Faulty(ExchangeStage):
    kind = "faulty:local"

    @pytest.fixture(autouse=True)
    def _hub(self) -> None:
        self.hub = LocalHub()

    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end(self.kind, who, config, self.hub)

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end(self.kind, who, config, self.hub)


class TestFaultyLocalExchange(Faulty, ExchangeSuite):
    pass


class TestFaultyShmExchange(Faulty, ExchangeSuite):
    kind = "faulty:shm"


class TestUnevenExchange(Faulty, ExchangeSuite):
    """Every promise holds also where messages take their time and overtake one another."""

    kind = "faulty:local:seed=3,delay_s=0.002,reorder=0.3,reorder_s=0.003,latency_s=0.0005,bytes_per_s=1e8"
