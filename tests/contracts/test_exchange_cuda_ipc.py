"""Rows copied between GPUs of one host keep the exchange contract: over a stand-in, or on a GPU (tests/on_gpu)."""

from __future__ import annotations

from router.config import RouterConfig
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import gpu_of
from tests.contracts.exchange_suite import ExchangeSuite


class TestCudaIpcExchange(ExchangeSuite):
    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("cuda_ipc", who, config, gpu=gpu_of("cuda_ipc"))

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("cuda_ipc", who, config, gpu=gpu_of("cuda_ipc"))
