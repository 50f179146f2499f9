"""Experts that listen in both ways, and attention ends that choose for each: the contract, and the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from router.config import RouterConfig
from router.errors import TransportError
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Reply
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_link_suite import assert_nothing_left, footprint
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, computed, connect, identity, parcel
from tests.contracts.exchange_suite import ExchangeSuite

NOWHERE = "unix-abstract:expertmesh/on-another-host"


class TestAutoExchange(ExchangeSuite):
    random_exchanges = 1000  # shm's own make up the rest

    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("auto", who, config)

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("auto", who, config)

    def test_one_host_is_found_by_trying_and_others_are_reached_by_grpc(self) -> None:
        """The name of a peer on another host leads nowhere here; one end serves both kinds at once."""
        near, far = self.expert(), self.expert(who=identity("expert-1"))
        me = identity()
        end = self.attention_end(me, CONFIG)
        self.stack.callback(end.close)
        as_seen_from_afar = replace(far.peer, address=f"{NOWHERE},{far.end.address.split(',')[1]}")
        assert connect(end, [near.peer, as_seen_from_afar]) == {}
        assert end.transports() == {near.member: "shm", far.member: "grpc"}
        for number in range(20):
            sent = [parcel(me, to.member, number, rows=1 + number % 3) for to in (near, far, near)]
            ticket = end.dispatch(sent)
            for outcome, each in zip(end.combine(ticket, PATIENCE_S), sent, strict=True):
                assert isinstance(outcome, Reply)
                assert torch.equal(outcome.rows, computed(each))
            end.release(ticket)

    def test_either_may_be_forced(self) -> None:
        """An expert in both ways is reached by an attention worker that knows only one."""
        expert = self.expert()
        for number, kind in enumerate(("shm", "grpc")):
            end = attention_end(kind, identity(f"attention-{number}"), CONFIG)
            self.stack.callback(end.close)
            assert connect(end, [expert.peer]) == {}
            assert end.transports() == {expert.member: kind}

    def test_who_can_be_reached_in_no_way_is_told_why_in_every_way(self) -> None:
        expert = self.expert()
        end = self.attention_end(identity(), CONFIG)
        self.stack.callback(end.close)
        reason = connect(end, [replace(expert.peer, address=NOWHERE)])[expert.member]
        assert reason.startswith("unix-abstract:")
        reason = connect(end, [replace(expert.peer, address="carrier-pigeon:1")])[expert.member]
        assert "'unix-abstract:' or 'grpc:'" in reason

    def test_a_host_that_is_not_ours_leaves_no_other_door_open(self) -> None:
        """The first door listens when the second finds that it cannot."""
        before = footprint()
        with pytest.raises(TransportError, match=r"host: '192\.0\.2\.1' cannot be listened on") as refused:
            expert_end("auto", identity("expert-0"), CONFIG, host="192.0.2.1")
        assert_nothing_left(before)
        del refused  # whose traceback held all that was made
