"""The stage of an exchange test: ends made by the transport under test, cleared away afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from router.config import RouterConfig
from router.transport.base import (
    AttentionEnd,
    ExpertEnd,
    LinkIdentity,
    Parcel,
)
from tests.contracts.exchange_parties import (
    CONFIG,
    ExpertThread,
    answer,
    connect,
    identity,
)

Behaviour = Callable[[ExpertEnd, Parcel], None]


class ExchangeStage:
    @abstractmethod
    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd: ...

    @abstractmethod
    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd: ...

    @pytest.fixture(autouse=True)
    def _stage(self) -> Iterator[None]:
        with ExitStack() as self.stack:
            yield

    def attention(self, who: LinkIdentity, *experts: ExpertThread, config: RouterConfig = CONFIG) -> AttentionEnd:
        """An attention end linked to these experts."""
        end = self.attention_end(who, config)
        self.stack.callback(end.close)
        assert connect(end, [expert.peer for expert in experts]) == {}
        return end

    def expert(
        self, behave: Behaviour = answer, who: LinkIdentity | None = None, config: RouterConfig = CONFIG
    ) -> ExpertThread:
        who = who or identity("expert-0", 4)
        return self.stack.enter_context(ExpertThread(self.expert_end(who, config), who, behave))
