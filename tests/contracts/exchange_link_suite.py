"""What every transport promises about links: who is let in, who is lost, and what is left behind."""

from __future__ import annotations

import functools
import gc
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest
import torch

from router.errors import EndClosed
from router.placement import Member
from router.transport.base import (
    ExpertEnd,
    LinkIdentity,
    Parcel,
    Peer,
    Refusal,
    RefusalReason,
    Reply,
)
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import (
    CONFIG,
    DEVICE,
    PATIENCE_S,
    ExpertThread,
    answer,
    computed,
    connect,
    identity,
    parcel,
)
from tests.contracts.exchange_stage import ExchangeStage

Behaviour = Callable[[ExpertEnd, Parcel], None]


class LinkSuite(ExchangeStage):
    def test_a_dead_peer_ends_the_wait(self) -> None:
        """kill -9 under load must not cost the hang deadline."""
        expert = self.expert(lambda end, _: end.close())
        me = identity()
        end = self.attention(me, expert)
        started_s = time.monotonic()
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert time.monotonic() - started_s < PATIENCE_S / 4
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        assert end.lost() == {expert.member}

    def test_a_loss_is_final_per_incarnation(self) -> None:
        """Neither dispatch nor connect brings a lost peer back; omitting it forgets it."""
        expert = self.expert(lambda end, _: end.close())
        me = identity()
        end = self.attention(me, expert)
        end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member, ticket=2)]), PATIENCE_S)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        assert connect(end, [expert.peer]).keys() == {expert.member}
        assert connect(end, []) == {}
        assert end.lost() == frozenset()

    def test_one_dead_peer_costs_only_its_own_parcels(self) -> None:
        """The other replies of the ticket are used."""
        dying = self.expert(lambda end, _: end.close(), identity("expert-0"))
        well = self.expert(who=identity("expert-1"))
        me = identity()
        end = self.attention(me, dying, well)
        sent = [parcel(me, dying.member), parcel(me, well.member)]
        lost, reply = end.combine(end.dispatch(sent), PATIENCE_S)
        assert isinstance(lost, Refusal)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent[1]))

    def test_a_silent_peer_is_a_deadline_and_its_late_answer_is_dropped(self) -> None:
        """A frozen process holds its socket open: only the deadline finds it, and it may wake up later."""
        held: queue.Queue[Parcel] = queue.Queue(2)
        expert = self.expert(lambda _, received: held.put(received))
        me = identity()
        end = self.attention(me, expert)
        ticket = end.dispatch([parcel(me, expert.member)])
        [outcome] = end.combine(ticket, 0.02)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.DEADLINE
        end.release(ticket)
        sent = parcel(me, expert.member, ticket=2, rows=5)
        later = end.dispatch([sent])
        for _ in range(2):
            answer(expert.end, held.get(timeout=PATIENCE_S))
        [reply] = end.combine(later, PATIENCE_S)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent))

    def test_a_peer_that_pulses_outlives_the_deadline(self) -> None:
        """A long batch is no death: the deadline is one of silence."""
        answered = threading.Event()

        def slow(end: ExpertEnd, received: Parcel) -> None:
            begun_s = time.monotonic()
            while time.monotonic() - begun_s < 0.5:
                end.pulse()
                answered.wait(0.005)
            answer(end, received)

        expert = self.expert(slow, config=replace(CONFIG, combine_timeout_s=0.1))
        me = identity()
        end = self.attention(me, expert)
        sent = parcel(me, expert.member)
        [reply] = end.combine(end.dispatch([sent]), 0.15)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent))

    def test_a_parcel_that_waits_behind_a_long_batch_hears_the_pulse_too(self) -> None:
        """The worker has not even taken it yet; its sender must not think that nobody is there."""
        first_is_in = threading.Event()
        tick = threading.Event()

        def slow(end: ExpertEnd, received: Parcel) -> None:
            first_is_in.set()
            begun_s = time.monotonic()
            while received.sender.id == "attention-0" and time.monotonic() - begun_s < 0.5:
                end.pulse()
                tick.wait(0.005)
            answer(end, received)

        expert = self.expert(slow, config=replace(CONFIG, combine_timeout_s=0.1))
        first, second = identity(), identity("attention-1")
        first_end, second_end = self.attention(first, expert), self.attention(second, expert)
        first_end.dispatch([parcel(first, expert.member)])
        assert first_is_in.wait(PATIENCE_S)
        [reply] = second_end.combine(second_end.dispatch([parcel(second, expert.member)]), 0.2)
        assert isinstance(reply, Reply)

    def test_strangers_are_let_in_during_a_long_batch(self) -> None:
        """A worker that computes for long must not look dead to an attention worker that has just come."""
        first_is_in, second_is_in = threading.Event(), threading.Event()

        def slow(end: ExpertEnd, received: Parcel) -> None:
            first_is_in.set()
            while not second_is_in.wait(0.005):
                end.pulse()
            answer(end, received)

        expert = self.expert(slow, config=replace(CONFIG, combine_timeout_s=0.02))
        first, second = identity(), identity("attention-1")
        end = self.attention(first, expert)
        ticket = end.dispatch([parcel(first, expert.member)])
        assert first_is_in.wait(PATIENCE_S)
        self.attention(second, expert)
        second_is_in.set()
        [reply] = end.combine(ticket, PATIENCE_S)
        assert isinstance(reply, Reply)

    def test_pulses_do_not_help_beyond_the_total(self) -> None:
        """A worker that is busy for ever is as good as dead; the bound is named."""
        given_up = threading.Event()

        def endless(end: ExpertEnd, _: Parcel) -> None:
            while not given_up.wait(0.005):
                end.pulse()

        expert = self.expert(endless, config=replace(CONFIG, combine_timeout_s=0.05))
        me = identity()
        end = self.attention(me, expert, config=replace(CONFIG, combine_timeout_s=0.1, combine_total_s=0.4))
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member)]), 0.1)
        given_up.set()
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.DEADLINE
        assert "combine_total_s" in outcome.detail

    def test_a_link_that_is_prepared_and_not_adopted_disturbs_nothing(self) -> None:
        """Its peer may be dropped again; those in use go on, and can be prepared anew."""
        one, other = self.expert(), self.expert(who=identity("expert-1"))
        me = identity()
        end = self.attention(me, one)
        prepared = end.prepare([one.peer, other.peer], PATIENCE_S)
        assert prepared.failed == {}
        [reply] = end.combine(end.dispatch([parcel(me, one.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)
        prepared.close()
        prepared.close()
        assert connect(end, [other.peer]) == {}
        [reply] = end.combine(end.dispatch([parcel(me, other.member, ticket=2)]), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert end.transports().keys() == {other.member}

    def test_a_peer_dropped_while_it_was_prepared_again_is_told(self) -> None:
        """It was linked when the handshakes were made, and needed none: nobody must think that it still is."""
        one, other = self.expert(), self.expert(who=identity("expert-1"))
        end = self.attention(identity(), one, other)
        prepared = end.prepare([one.peer, other.peer], PATIENCE_S)
        assert connect(end, [one.peer]) == {}
        assert end.adopt(prepared) == {other.member: "not prepared"}

    @pytest.mark.parametrize(
        ("field", "me", "incarnation"),
        [
            ("incarnation", identity(), 5),
            ("fingerprint", identity(fingerprint="fedcba9876543210"), 4),
            ("token", identity(token="guess"), 4),
            ("hidden", identity(hidden=8), 4),
            ("dtype", identity(dtype=torch.bfloat16), 4),
        ],
    )
    def test_who_does_not_agree_is_refused(self, field: str, me: LinkIdentity, incarnation: int) -> None:
        """By the name of what differs; the token itself is never told."""
        expert = self.expert()
        end = self.attention_end(me, CONFIG)
        self.stack.callback(end.close)
        wanted = Peer(Member("expert-0", incarnation), expert.end.address)
        failed = connect(end, [wanted])
        assert failed.keys() == {wanted.member}
        assert failed[wanted.member].startswith(f"{field}: ")
        assert "swordfish" not in failed[wanted.member]
        [outcome] = end.combine(end.dispatch([parcel(identity(), wanted.member)]), PATIENCE_S)
        assert isinstance(outcome, Refusal)

    def test_an_address_where_nobody_listens_is_refused_alone(self) -> None:
        """The peers that can be linked are usable."""
        expert = self.expert()
        me = identity()
        end = self.attention_end(me, CONFIG)
        self.stack.callback(end.close)
        gone = Peer(Member("expert-9", 1), expert.end.address + "-not")
        assert connect(end, [gone, expert.peer]).keys() == {gone.member}
        [reply] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)

    def test_a_new_life_takes_over_from_the_old(self) -> None:
        """Of one attention worker only the newest incarnation is heard."""
        expert = self.expert()
        old, new = identity(incarnation=1), identity(incarnation=2)
        old_end = self.attention(old, expert)
        new_end = self.attention(new, expert)
        [reply] = new_end.combine(new_end.dispatch([parcel(new, expert.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)
        [outcome] = old_end.combine(old_end.dispatch([parcel(old, expert.member)]), PATIENCE_S)
        assert isinstance(outcome, Refusal)
        frozen = self.attention_end(old, CONFIG)
        self.stack.callback(frozen.close)
        assert connect(frozen, [expert.peer])[expert.member].startswith("incarnation: ")

    def test_no_more_peers_than_the_bound(self) -> None:
        """One expert worker's descriptors and turns are bounded; those linked are not disturbed."""
        expert = self.expert(config=replace(CONFIG, peers_max=1))
        me = identity()
        end = self.attention(me, expert)
        one_too_many = self.attention_end(identity("attention-1"), CONFIG)
        self.stack.callback(one_too_many.close)
        assert connect(one_too_many, [expert.peer])[expert.member].startswith("peers: ")
        [reply] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)

    def test_answering_a_peer_that_has_gone_is_no_error(self) -> None:
        """An attention worker killed mid-step must not hurt the expert worker, nor its other peers."""
        held: queue.Queue[Parcel] = queue.Queue(1)
        gone = threading.Event()

        def behave(end: ExpertEnd, received: Parcel) -> None:
            if received.sender.id == "attention-0":
                held.put(received)
                assert gone.wait(PATIENCE_S)
            answer(end, received)

        expert = self.expert(behave)
        doomed, other = identity(), identity("attention-1")
        doomed_end, end = self.attention(doomed, expert), self.attention(other, expert)
        doomed_end.dispatch([parcel(doomed, expert.member)])
        held.get(timeout=PATIENCE_S)
        doomed_end.close()
        gone.set()
        [reply] = end.combine(end.dispatch([parcel(other, expert.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)

    def test_wake_ends_a_wait(self) -> None:
        """Shutdown, and an order that has come meanwhile, must not wait for the next parcel."""
        end = self.expert_end(identity("expert-0"), CONFIG)
        self.stack.callback(end.close)
        waker = threading.Thread(target=end.wake)
        started_s = time.monotonic()
        waker.start()
        assert end.receive(PATIENCE_S) is None
        assert time.monotonic() - started_s < PATIENCE_S / 4
        waker.join()

    def test_closing_twice_and_use_after_close(self) -> None:
        """Closing is how shutdown paths end, and they may meet."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        end.close()
        end.close()
        with pytest.raises(EndClosed):
            end.dispatch([parcel(me, expert.member)])
        with pytest.raises(EndClosed):
            connect(end, [expert.peer])
        expert.leave()
        expert.end.close()
        with pytest.raises(EndClosed):
            expert.end.receive(0.0)

    def test_nothing_is_left_behind(self) -> None:
        """Neither thread nor descriptor nor mapping, after use, refusal and death."""
        before = footprint()
        expert, other = self.expert(), self.expert(who=identity("expert-1"))
        me = identity()
        end = self.attention(me, expert, other)
        connect(end, [expert.peer, replace(other.peer, address="local:nowhere")])
        outcomes = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        expert.leave()
        connect(end, [other.peer])
        end.close()
        other.leave()
        del outcomes, end, expert, other
        self.stack.pop_all()
        assert_nothing_left(before)


def footprint() -> tuple[int, int, int]:
    """Threads, descriptors and link mappings of this process."""
    _keep_grpc_open()
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("expertmesh" in line for line in maps)
    if DEVICE.type == "cuda":  # what CUDA and NCCL keep for the process is not ours to count
        return 0, 0, mappings
    return threading.active_count(), len(os.listdir("/proc/self/fd")), mappings


def assert_nothing_left(before: tuple[int, int, int]) -> None:
    """gRPC closes its sockets on threads of its own, a moment after it says that it has."""
    moment = threading.Event()
    deadline_s = time.monotonic() + PATIENCE_S / 4
    while footprint() != before and time.monotonic() < deadline_s:
        moment.wait(0.01)
    left = footprint()
    assert left == before, f"{left}, before: {before}"


@functools.cache
def _keep_grpc_open() -> grpc.Channel:
    """Its own descriptors come with the first user and go some time after the last: so there always is one."""
    channel = grpc.insecure_channel("127.0.0.1:1")
    end = attention_end("grpc", identity(), CONFIG)
    with ExpertThread(expert_end("grpc", identity("expert-0"), CONFIG), identity("expert-0"), answer) as expert:
        assert connect(end, [expert.peer]) == {}
        end.close()
    return channel
