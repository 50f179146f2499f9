"""Rows sent by NCCL keep the exchange contract: over a stand-in, or on a GPU (tests/on_gpu)."""

from __future__ import annotations

from router.config import RouterConfig
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import gpu_of
from tests.contracts.exchange_suite import ExchangeSuite


class TestNcclExchange(ExchangeSuite):
    """With headers in shared memory."""

    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("nccl", who, config, gpu=gpu_of("nccl"))

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("nccl", who, config, gpu=gpu_of("nccl"))


class TestNcclExchangeBetweenHosts(TestNcclExchange):
    """With headers over gRPC, as from another host."""

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        end = super().expert_end(who, config)
        end.address = end.address.split(",")[1]
        return end
