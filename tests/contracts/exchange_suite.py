"""What every transport promises: subclass `ExchangeSuite`, give the two factories, and nothing else.

The expert side always lives in another thread, as it may live in another process.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from router.placement import Member
from router.transport.base import (
    ExpertEnd,
    LinkIdentity,
    Parcel,
    Refusal,
    RefusalReason,
    Reply,
    Ticket,
)
from tests.contracts.exchange_link_suite import LinkSuite
from tests.contracts.exchange_parties import (
    CONFIG,
    DEVICE,
    HIDDEN,
    PATIENCE_S,
    answer,
    computed,
    identity,
    parcel,
)
from tests.contracts.exchange_worker_suite import WorkerSuite

Behaviour = Callable[[ExpertEnd, Parcel], None]


HIDDEN_WIDE = 128  # so that 200 tickets go around a ring several times
POOL = torch.randn(1000, HIDDEN, generator=torch.Generator().manual_seed(5))  # rows of random parcels


class ExchangeSuite(LinkSuite, WorkerSuite):
    random_exchanges = 10_000

    def test_reply_rows_come_in_the_order_of_the_routes(self) -> None:
        """The merge recipe knows a reply only by order; a row may go to several experts."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        sent = parcel(me, expert.member, rows=3, route_rows=[2, 0, 2, 1, 0])
        [reply] = end.combine(end.dispatch([sent]), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent))

    def test_a_parcel_arrives_as_it_was_sent(self) -> None:
        """Identity fields are what stale work is refused by."""
        seen: queue.Queue[Parcel] = queue.Queue(1)

        def behave(end: ExpertEnd, received: Parcel) -> None:
            seen.put(replace(received, rows=received.rows.clone()))
            answer(end, received)

        expert = self.expert(behave)
        me = identity("attention-7", 9)
        end = self.attention(me, expert)
        sent = parcel(me, expert.member, ticket=2**40, layer=61)
        end.combine(end.dispatch([sent]), PATIENCE_S)
        received = seen.get(timeout=PATIENCE_S)
        for name in ("sender", "to", "epoch", "ticket", "layer"):
            assert getattr(received, name) == getattr(sent, name), name
        for name in ("rows", "route_rows", "route_experts"):
            assert torch.equal(getattr(received, name), getattr(sent, name)), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("hidden", "num_rows"), [(1, 1), (7, 3), (96, 64)])
    def test_dtype_and_shape_survive(self, dtype: torch.dtype, hidden: int, num_rows: int) -> None:
        """Bits, not values: NaN payloads and negative zero included."""
        me = identity(hidden=hidden, dtype=dtype)

        def echo(end: ExpertEnd, received: Parcel) -> None:
            end.reply(received, received.rows[received.route_rows])

        expert = self.expert(echo, replace(me, member=Member("expert-0", 1)))
        end = self.attention(me, expert)
        bits = torch.randint(-(2**15), 2**15, (num_rows, hidden * dtype.itemsize // 2), dtype=torch.int16)
        [reply] = end.combine(end.dispatch([parcel(me, expert.member, rows=bits.view(dtype))]), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert reply.rows.dtype == dtype
        assert torch.equal(reply.rows.view(torch.int16), bits.to(DEVICE))

    def test_an_empty_parcel_gets_an_empty_reply(self) -> None:
        """Nothing to do is an answer too: who waits must not wait for the deadline."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        [reply] = end.combine(end.dispatch([parcel(me, expert.member, rows=0)]), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert reply.rows.shape == (0, me.hidden)

    def test_tickets_complete_in_any_order(self) -> None:
        """One microbatch must not wait for the other's experts."""
        held: list[Parcel] = []

        def last_first(end: ExpertEnd, received: Parcel) -> None:
            held.append(received)
            if len(held) == 3:
                for each in reversed(held):
                    answer(end, each)

        expert = self.expert(last_first)
        me = identity()
        end = self.attention(me, expert)
        sent = [parcel(me, expert.member, ticket=number, rows=number) for number in (1, 2, 3)]
        tickets = [end.dispatch([each]) for each in sent]
        for place in (1, 2, 0):
            [reply] = end.combine(tickets[place], PATIENCE_S)
            assert isinstance(reply, Reply)
            assert torch.equal(reply.rows, computed(sent[place]))
            end.release(tickets[place])

    def test_outcomes_come_in_the_order_of_the_parcels(self) -> None:
        """Whichever expert worker answers first."""
        first = self.expert(who=identity("expert-0"))
        second = self.expert(who=identity("expert-1"))
        me = identity()
        end = self.attention(me, first, second)
        sent = [parcel(me, to.member, rows=rows) for rows, to in enumerate((second, first, second), 1)]
        for outcome, each in zip(end.combine(end.dispatch(sent), PATIENCE_S), sent, strict=True):
            assert isinstance(outcome, Reply)
            assert torch.equal(outcome.rows, computed(each))

    def test_beyond_capacity_overloaded_and_nothing_sent(self) -> None:
        """Capacity is fixed at connect; hitting it is an answer, not a wait, and it comes back."""
        config = replace(CONFIG, parcels_in_flight_max=2)
        seen: queue.Queue[Parcel] = queue.Queue(8)
        expert = self.expert(lambda _, received: seen.put(received))
        me = identity()
        end = self.attention(me, expert, config=config)
        sent = [parcel(me, expert.member, rows=rows) for rows in (1, 2, 3)]
        ticket = end.dispatch(sent)
        received = [seen.get(timeout=PATIENCE_S) for _ in range(2)]
        for each in received:
            answer(expert.end, each)
        *replies, refused = end.combine(ticket, PATIENCE_S)
        assert all(isinstance(reply, Reply) for reply in replies)
        assert isinstance(refused, Refusal)
        assert refused.reason is RefusalReason.OVERLOADED
        end.release(ticket)
        end.dispatch([parcel(me, expert.member, ticket=2, rows=4)])
        assert len(seen.get(timeout=PATIENCE_S).rows) == 4  # and never the third of the first ticket

    def test_a_parcel_that_does_not_fit_the_link_is_malformed(self) -> None:
        """A bug of ours is named as one, before anything is sent."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        for number, bad in enumerate((
            parcel(me, expert.member, rows=torch.zeros(2, me.hidden + 1)),
            parcel(me, expert.member, rows=torch.zeros(2, me.hidden, dtype=torch.bfloat16)),
            parcel(me, expert.member, rows=CONFIG.rows_max + 1),
        )):  # fmt: skip
            [outcome] = end.combine(end.dispatch([replace(bad, ticket=number)]), PATIENCE_S)
            assert isinstance(outcome, Refusal)
            assert outcome.reason is RefusalReason.MALFORMED
            assert "rows" in outcome.detail

    @pytest.mark.parametrize("reason", [reason for reason in RefusalReason if reason >= RefusalReason.STALE_EPOCH])
    def test_a_refusal_says_why(self, reason: RefusalReason) -> None:
        """The dispatcher acts on the reason; people read the detail, however long it was meant to be."""
        expert = self.expert(lambda end, received: end.refuse(received, reason, "expert 7: not held" + " …" * 999))
        me = identity()
        end = self.attention(me, expert)
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is reason
        assert outcome.detail.startswith("expert 7: not held")

    def test_reply_rows_stay_until_released(self) -> None:
        """A view of the link's memory must not change under the merge, whatever else travels."""
        me = identity(hidden=HIDDEN_WIDE)
        expert = self.expert(who=identity("expert-1", hidden=HIDDEN_WIDE))
        end = self.attention(me, expert)
        kept = []
        for number in range(1, 200):
            sent = parcel(me, expert.member, ticket=number, rows=1 + number % 5, layer=number % 60)
            ticket = end.dispatch([sent])
            [reply] = end.combine(ticket, PATIENCE_S)
            assert isinstance(reply, Reply)
            kept.append((ticket, reply.rows, computed(sent)))
            if len(kept) == 4:
                oldest, rows, expected = kept.pop(number % 4)
                assert torch.equal(rows, expected)
                end.release(oldest)

    def test_misuse_by_the_expert_worker_is_an_error(self) -> None:
        """Rows for other routes, and a second answer, would be taken for another's."""
        errors: queue.Queue[str] = queue.Queue(2)

        def misbehave(end: ExpertEnd, received: Parcel) -> None:
            with pytest.raises(ValueError, match="rows: ") as wrong_shape:
                end.reply(received, torch.zeros(9, received.rows.shape[1]))
            answer(end, received)
            with pytest.raises(ValueError, match="answered already") as twice:
                end.refuse(received, RefusalReason.OVERLOADED)
            for caught in (wrong_shape, twice):
                errors.put(str(caught.value))

        expert = self.expert(misbehave)
        me = identity()
        end = self.attention(me, expert)
        end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert [errors.get(timeout=PATIENCE_S) for _ in range(2)]

    def test_peers_are_served_in_turn(self) -> None:
        """A busy attention worker must not starve a quiet one."""
        order: queue.Queue[str] = queue.Queue(20)
        begin = threading.Event()

        def behave(end: ExpertEnd, received: Parcel) -> None:
            order.put(received.sender.id)
            while not begin.wait(0.005):
                end.pulse()
            answer(end, received)

        expert = self.expert(behave)
        busy, quiet = identity("attention-busy"), identity("attention-quiet")
        busy_end, quiet_end = self.attention(busy, expert), self.attention(quiet, expert)
        busy_ticket = busy_end.dispatch([parcel(busy, expert.member) for _ in range(8)])
        assert order.get(timeout=PATIENCE_S) == "attention-busy"
        quiet_ticket = quiet_end.dispatch([parcel(quiet, expert.member)])
        begin.wait(0.1)  # what has not arrived yet cannot have its turn
        begin.set()
        quiet_end.combine(quiet_ticket, PATIENCE_S)
        busy_end.combine(busy_ticket, PATIENCE_S)
        assert "attention-quiet" in [order.get(timeout=PATIENCE_S) for _ in range(2)]

    def test_a_ticket_number_is_used_once_and_combined_once(self) -> None:
        """Otherwise a late answer could be taken for a new one."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        ticket = end.dispatch([parcel(me, expert.member)])
        with pytest.raises(ValueError, match="ticket"):
            end.dispatch([parcel(me, expert.member)])
        end.combine(ticket, PATIENCE_S)
        end.release(ticket)
        end.release(ticket)
        with pytest.raises(ValueError, match="ticket"):
            end.combine(ticket, PATIENCE_S)

    def test_random_exchanges_equal_direct_computation(self) -> None:
        """Many in flight, any sizes, combined and released at random: two parcels each, none wrong."""
        chance = random.Random(20260301)
        experts = [self.expert(who=identity(f"expert-{number}")) for number in range(2)]
        me = identity()
        end = self.attention(me, *experts)
        flying: list[tuple[Ticket, list[Parcel]]] = []
        held: list[Ticket] = []
        last = self.random_exchanges // len(experts)
        for number in itertools.count(1):
            if number <= last:
                sent = [_random_parcel(chance, me, expert.member, number) for expert in experts]
                flying.append((end.dispatch(sent), sent))
            if len(flying) > 4 or number > last:
                ticket, sent = flying.pop(chance.randrange(len(flying)))
                for outcome, each in zip(end.combine(ticket, PATIENCE_S), sent, strict=True):
                    assert isinstance(outcome, Reply)
                    assert torch.equal(outcome.rows, computed(each))
                held.append(ticket)
                if not flying:
                    break
            while len(held) > chance.randrange(4):
                end.release(held.pop(chance.randrange(len(held))))


def _random_parcel(chance: random.Random, me: LinkIdentity, to: Member, number: int) -> Parcel:
    num_rows = chance.randrange(20)
    at = chance.randrange(len(POOL) - 20)
    routes = chance.choices(range(num_rows), k=chance.randrange(3 * num_rows + 1)) if num_rows else []
    return parcel(me, to, number, POOL[at : at + num_rows], routes, chance.randrange(62))
