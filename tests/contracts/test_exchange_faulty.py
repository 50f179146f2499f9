"""The faulty transport keeps the exchange contract: without faults as any, with faults as far as they let it."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from router.config import RouterConfig
from router.transport import frame
from router.transport.base import (
    UNTIMED,
    AttentionEnd,
    ExpertEnd,
    LinkIdentity,
    Parcel,
    Refusal,
    RefusalReason,
    Reply,
    Spent,
)
from router.transport.faults import Faults
from router.transport.faulty import FaultyExpertEnd
from router.transport.local import LocalExpertEnd, LocalHub
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, ExpertThread, answer, computed, identity, parcel
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
    random_exchanges = 1000


class TestFaultyShmExchange(Faulty, ExchangeSuite):
    kind = "faulty:shm"
    random_exchanges = 1000


class TestUnevenExchange(Faulty, ExchangeSuite):
    """Every promise holds also where messages take their time and overtake one another."""

    kind = "faulty:local:seed=3,delay_s=0.002,reorder=0.3,reorder_s=0.003,latency_s=0.0005,bytes_per_s=1e8"
    random_exchanges = 1000


class TestFaults(Faulty):
    """What each fault looks like from both ends."""

    def _exchange(self, faults: str, count: int, timeout_s: float = PATIENCE_S) -> list[Reply | Refusal]:
        """The outcomes of one ticket with `count` parcels, whose replies are right."""
        self.kind = f"faulty:local:{faults}"
        self.arrived: list[int] = []
        self.all_came_twice = threading.Event()

        def behave(end: ExpertEnd, received: Parcel) -> None:
            self.arrived.append(len(received.rows))
            if len(self.arrived) == 2 * count:
                self.all_came_twice.set()
            answer(end, received)

        self.only = self.expert(behave)
        me = identity()
        self.end = self.attention(me, self.only)
        sent = [parcel(me, self.only.member, rows=rows) for rows in range(count)]
        ticket = self.end.dispatch(sent)
        outcomes = self.end.combine(ticket, timeout_s)
        for outcome, each in zip(outcomes, sent, strict=True):
            assert isinstance(outcome, Refusal) or torch.equal(outcome.rows, computed(each))
        self.end.release(ticket)
        return outcomes

    def test_what_is_lost_is_a_deadline_and_nothing_else_is(self) -> None:
        """Lost on the way out or back; never before the deadline, and the rest of the ticket is used."""
        began_s = time.monotonic()
        outcomes = self._exchange("seed=1,loss=0.3", 16, timeout_s=0.1)
        assert 0.1 <= time.monotonic() - began_s < PATIENCE_S / 2
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
        assert {refusal.reason for refusal in refusals} == {RefusalReason.DEADLINE}
        unheard = len(self.arrived) - (16 - len(refusals))
        assert len(self.arrived) < 16  # some were lost before they came
        assert unheard > 0  # and some replies behind them
        assert self.end.lost() == frozenset()

    def test_the_same_seed_loses_the_same(self) -> None:
        """A failure can be looked at again."""
        runs = []
        for _ in range(2):
            outcomes = self._exchange("seed=5,loss=0.3", 16, timeout_s=0.02)
            runs.append([type(outcome) for outcome in outcomes])
            self.end.close()
            self.only.leave()
        assert runs[0] == runs[1]

    def test_a_duplicate_is_computed_again_and_answered_once(self) -> None:
        """The second answer finds nobody who waits; and the link's capacity comes back."""
        for _ in range(3):
            outcomes = self._exchange("duplicate=1", 8)
            assert all(isinstance(outcome, Reply) for outcome in outcomes)
            assert self.all_came_twice.wait(PATIENCE_S)
            self.end.close()
            self.only.leave()
        assert sorted(self.arrived) == sorted([*range(8)] * 2)

    def test_reordered_parcels_arrive_in_another_order_and_are_combined_in_ours(self) -> None:
        outcomes = self._exchange("seed=2,reorder=0.5,reorder_s=0.02", 16)
        assert all(isinstance(outcome, Reply) for outcome in outcomes)
        assert sorted(self.arrived) == [*range(16)]
        assert self.arrived != [*range(16)]

    def test_a_deadly_parcel_is_the_death_of_the_worker(self) -> None:
        """As by kill -9: its links break at once, whatever deadline there is."""
        began_s = time.monotonic()
        outcomes = self._exchange("death=1", 3)
        assert time.monotonic() - began_s < PATIENCE_S / 2
        assert {outcome.reason for outcome in outcomes if isinstance(outcome, Refusal)} == {
            RefusalReason.PEER_LOST
        }
        assert self.end.lost() == {self.only.member}

    def test_a_slow_link_takes_what_its_length_and_width_say(self) -> None:
        """Never less: two latencies, and every byte one after the other, the last reply's behind the parcels'."""
        limits = frame.limits_of(identity(), CONFIG)
        out = sum(frame.parcel_bytes(rows, rows, limits) for rows in range(8))
        began_s = time.monotonic()
        self._exchange(f"latency_s=0.02,bytes_per_s={out / 0.05}", 8)
        assert time.monotonic() - began_s >= 0.05 + 2 * 0.02 + frame.reply_bytes(7, limits) / out * 0.05

    def test_while_a_message_is_on_its_way_both_sides_may_work(self) -> None:
        """The wire has a thread of its own: a reply that came meanwhile is there when it is asked for."""
        came = threading.Event()

        class Telling(LocalExpertEnd):
            def reply(self, parcel: Parcel, rows: Tensor, spent: Spent = UNTIMED) -> None:
                super().reply(parcel, rows, spent)
                came.set()

        who, me = identity("expert-0", 4), identity()
        wrapped = Telling(self.hub, who, CONFIG)
        slow = FaultyExpertEnd(wrapped, who, CONFIG, Faults(latency_s=0.02))
        expert = self.stack.enter_context(ExpertThread(slow, who, answer))
        end = self.attention(me, expert)
        ticket = end.dispatch([parcel(me, expert.member)])
        assert came.wait(PATIENCE_S)
        [reply] = end.combine(ticket, 0.0)
        assert isinstance(reply, Reply)

    def test_the_transport_says_what_it_wraps(self) -> None:
        """In `status` nobody takes it for the real one."""
        expert = self.expert()
        assert self.attention(identity(), expert).transports() == {expert.member: "faulty local"}


def test_a_faulty_kind_is_explained() -> None:
    """What it wraps and every fault is named."""
    for choose in (attention_end, expert_end):
        with pytest.raises(ValueError, match="'smoke'; must be one of local"):
            choose("faulty:smoke", identity(), CONFIG)
        with pytest.raises(ValueError, match="faults: 'loses=1'; must be name=value"):
            choose("faulty:shm:loses=1", identity(), CONFIG)
