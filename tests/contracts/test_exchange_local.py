"""The local transport keeps the exchange contract."""

from __future__ import annotations

import pytest

from router.config import RouterConfig
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.local import LocalHub
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import CONFIG, identity
from tests.contracts.exchange_suite import ExchangeSuite


class TestLocalExchange(ExchangeSuite):
    @pytest.fixture(autouse=True)
    def _hub(self) -> None:
        self.hub = LocalHub()

    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("local", who, config, self.hub)

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("local", who, config, self.hub)


def test_the_choice_of_transport_is_explained() -> None:
    """A typo in a config names what is accepted; the local transport cannot do without its hub."""
    for choose in (attention_end, expert_end):
        with pytest.raises(ValueError, match="'smoke'; must be one of local, auto, shm, grpc, nccl"):
            choose("smoke", identity(), CONFIG)
        with pytest.raises(ValueError, match="hub"):
            choose("local", identity(), CONFIG)
