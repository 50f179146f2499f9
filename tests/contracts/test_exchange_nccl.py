"""Rows sent by NCCL keep the exchange contract: over a stand-in, or on a GPU (tests/on_gpu)."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from router.config import RouterConfig
from router.errors import GpuError, LinkRefused, TransportError
from router.transport import frame
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Parcel, Refusal, RefusalReason, Reply
from router.transport.lane import Pairs
from router.transport.pair_lane import PairLanes
from router.transport.select import attention_end, expert_end
from router.transport.shm_handshake import ShmDialer
from tests.contracts.exchange_link_suite import assert_nothing_left, footprint
from tests.contracts.exchange_parties import (
    CONFIG,
    DEVICE,
    PATIENCE_S,
    ExpertThread,
    answer,
    computed,
    connect,
    gpu_of,
    identity,
    parcel,
)
from tests.contracts.exchange_suite import ExchangeSuite
from tests.contracts.gpu_link_world import eventually
from tests.contracts.stand_in_gpu import StandInGpu

needs_stand_in = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks into the stand-in")


class TestNcclExchange(ExchangeSuite):
    """With headers in shared memory."""

    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("nccl", who, config, gpu=gpu_of("nccl"))

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("nccl", who, config, gpu=gpu_of("nccl"))


class TestNcclExchangeBetweenHosts(TestNcclExchange):
    """With headers over gRPC, as from another host."""

    random_exchanges = 1000  # those above make up the rest

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        end = super().expert_end(who, config)
        end.address = end.address.split(",")[1]
        return end


class Unjoined(StandInGpu):
    """Of a process that has stopped between its welcome and its join."""

    def join(self, unique_id: bytes, rank: int) -> object:  # type: ignore[override]
        raise GpuError("it never came")


class Announcing(StandInGpu):
    """Its sends never happen: what it announces does not come."""

    def join(self, unique_id: bytes, rank: int) -> object:  # type: ignore[override]
        comm = super().join(unique_id, rank)
        meet = comm.meet

        def met() -> None:
            meet()
            comm.send = lambda rows, done: None  # type: ignore[method-assign]

        comm.meet = met  # type: ignore[method-assign]
        return comm


@needs_stand_in
class TestNcclAlone:
    """What only communicators can do wrong."""

    @pytest.fixture(autouse=True)
    def _stage(self) -> Iterator[None]:
        with ExitStack() as self.stack:
            yield

    def attention(
        self, gpu: StandInGpu, who: LinkIdentity | None = None, config: RouterConfig = CONFIG
    ) -> AttentionEnd:
        end = attention_end("nccl", who or identity(), config, gpu=gpu)
        self.stack.callback(end.close)
        return end

    def expert(self, gpu: StandInGpu, behave: object = answer, config: RouterConfig = CONFIG) -> ExpertThread:
        who = identity("expert-0", 4)
        end = expert_end("nccl", who, config, gpu=gpu)
        return self.stack.enter_context(ExpertThread(end, who, behave))  # type: ignore[arg-type]

    def test_a_peer_that_never_joins_costs_its_place_and_no_more_than_the_deadline(self) -> None:
        """Joining cannot be interrupted: it waits aside, and counts as a pair until it ends."""
        config = replace(CONFIG, connect_timeout_s=0.2, gpu_pairs_max=1)
        gpu = StandInGpu()
        expert = self.expert(gpu, config=config)
        self.stack.callback(gpu.end_joining)
        started_s = time.monotonic()
        failed = connect(self.attention(Unjoined()), [expert.peer])
        assert "it never came" in failed[expert.member]
        assert time.monotonic() - started_s < PATIENCE_S / 4
        failed = connect(self.attention(StandInGpu(), identity("attention-1")), [expert.peer])
        assert failed[expert.member].startswith("pairs: ")
        assert "gpu_pairs_max" in failed[expert.member]
        gpu.end_joining()
        eventually(lambda: not connect(self.attention(StandInGpu(), identity("attention-2")), [expert.peer]))

    @pytest.mark.parametrize("way", [0, 1], ids=["shm", "grpc"])
    def test_a_peer_that_leaves_before_it_joins_has_broken_no_rule(
        self, way: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It may have died: its link goes, and nobody complains of it."""
        gpu = StandInGpu()
        expert = self.expert(gpu)
        self.stack.callback(gpu.end_joining)
        peer = replace(expert.peer, address=expert.peer.address.split(",")[way])
        with caplog.at_level("INFO", "router.transport"):
            assert "it never came" in connect(self.attention(Unjoined()), [peer])[expert.member]
            eventually(lambda: bool(caplog.records))
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert f"link to {identity().member} dropped" in caplog.text

    def test_who_waits_for_a_join_is_released_at_the_deadline(self) -> None:
        """The expert has welcomed us, and stands still before it joins; what has joined of ours is aborted."""
        stuck = threading.Event()

        class Stuck(StandInGpu):
            def join(self, unique_id: bytes, rank: int) -> object:  # type: ignore[override]
                stuck.wait(PATIENCE_S)
                raise GpuError("too late")

        expert_gpu = Stuck()
        self.stack.callback(expert_gpu.end_joining)
        expert = self.expert(expert_gpu)
        self.stack.callback(stuck.set)
        failed = connect(self.attention(StandInGpu()), [expert.peer], timeout_s=0.2)
        assert failed[expert.member] == "no welcome within 0.2 s"

    def test_rows_that_are_announced_and_do_not_come_delay_nobody_else(self) -> None:
        """Their receive waits on its own stream; the end serves the other peers."""
        expert = self.expert(StandInGpu())
        liar, honest = identity("attention-liar"), identity("attention-0")
        false_end, end = self.attention(Announcing(), liar), self.attention(StandInGpu(), honest)
        assert connect(false_end, [expert.peer]) == connect(end, [expert.peer]) == {}
        false_end.dispatch([parcel(liar, expert.member)])
        for number in range(5):
            sent = parcel(honest, expert.member, number)
            [reply] = end.combine(end.dispatch([sent]), PATIENCE_S)
            assert isinstance(reply, Reply)
            assert torch.equal(reply.rows, computed(sent))
        false_end.close()

    def test_no_receive_is_posted_without_a_header(self) -> None:
        """An idle link occupies nothing of a GPU; a refusal and an empty parcel carry no rows."""
        expert_gpu, gpu = StandInGpu(), StandInGpu()
        expert = self.expert(expert_gpu, lambda end, received: end.refuse(received, RefusalReason.STALE_EPOCH))
        me, end = identity(), self.attention(gpu)
        assert connect(end, [expert.peer]) == {}
        assert (expert_gpu.receives, gpu.receives) == (0, 0)
        for number, rows in enumerate((0, 3)):
            end.combine(end.dispatch([parcel(me, expert.member, number, rows=rows)]), PATIENCE_S)
        assert (expert_gpu.receives, gpu.receives) == (1, 0)

    @pytest.mark.parametrize("what", [b"garbage!" * 16, b""])
    def test_a_bad_header_posts_no_receive_and_ends_the_link(self, what: bytes) -> None:
        """Nothing is received on a stranger's word, and those beside it do not notice."""
        expert_gpu = StandInGpu()
        expert = self.expert(expert_gpu)
        me, end = identity(), self.attention(StandInGpu())
        assert connect(end, [expert.peer]) == {}
        vandal = identity("attention-vandal")
        false_end = self.attention(StandInGpu(), vandal)
        assert connect(false_end, [expert.peer]) == {}
        wiring = false_end._links[expert.member]._wires.wiring  # type: ignore[attr-defined]
        wiring.sock.settimeout(PATIENCE_S)
        parcels = wiring.segment.parcels
        parcels.frames[: len(what)] = what
        parcels.entries[0], parcels.head[0] = 2, 1
        os.eventfd_write(wiring.parcels_bell, 1)
        assert wiring.sock.recv(1) == b""  # hung up on
        assert expert_gpu.receives == 0
        [reply] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)

    def test_a_loss_ends_receives_that_wait_for_the_dead(self) -> None:
        """A kernel that waits for a peer waits for ever: the link's end aborts it, and nothing is left."""
        before = footprint()
        gpu = StandInGpu()
        expert = self.expert(gpu)
        me = identity()
        end = self.attention(Announcing())
        assert connect(end, [expert.peer]) == {}
        end.dispatch([parcel(me, expert.member)])
        eventually(lambda: gpu.receives == 1)
        end.close()
        expert.leave()
        del end, expert
        assert_nothing_left(before)

    def test_more_rows_than_a_link_may_hold_end_it(self) -> None:
        """Device memory is bounded by who receives, whatever the headers say."""
        who = identity()
        lane = PairLanes(StandInGpu(), who, CONFIG, Pairs(CONFIG)).offer(0)
        limits = frame.limits_of(who, CONFIG, rows_apart=True)
        region = lane.incoming(memoryview(bytearray(8)), limits)
        row_bytes = who.hidden * who.dtype.itemsize
        with pytest.raises(TransportError, match="at most"):
            region.rows(0, CONFIG.link_bytes_max // 2 // row_bytes + 1, who.hidden)
        lane.close()

    def test_a_key_of_another_length_is_refused(self) -> None:
        """Before anything joins."""
        lane = PairLanes(StandInGpu(), identity(), CONFIG, Pairs(CONFIG)).offer(0)
        with pytest.raises(LinkRefused, match="a key of 3 bytes; must be 256"):
            lane.complete(b"abc")
        lane.close()

    def test_two_ends_that_send_at_once_do_not_wait_for_each_other(self) -> None:
        """Both directions full, neither read yet: as with several microbatches."""
        held: queue.Queue[Parcel] = queue.Queue(16)
        expert = self.expert(StandInGpu(), lambda _, received: held.put(received))
        me, end = identity(), self.attention(StandInGpu())
        assert connect(end, [expert.peer]) == {}
        sent = [parcel(me, expert.member, number, rows=60) for number in range(12)]
        tickets = [end.dispatch([each]) for each in sent[:6]]
        first = [held.get(timeout=PATIENCE_S) for _ in range(6)]
        for each in first:
            answer(expert.end, each)  # six replies on their way, and six parcels against them
        tickets += [end.dispatch([each]) for each in sent[6:9]]
        later = [held.get(timeout=PATIENCE_S) for _ in range(3)]
        for each in later:
            answer(expert.end, each)
        for ticket, each in zip(tickets, sent, strict=False):
            [outcome] = end.combine(ticket, PATIENCE_S)
            if isinstance(outcome, Refusal):
                assert outcome.reason is RefusalReason.OVERLOADED
            else:
                assert torch.equal(outcome.rows, computed(each))
            end.release(ticket)


def test_a_dialer_for_other_rows_finds_no_door() -> None:
    """Who carries rows in its frames and who does not never take each other's frames."""
    who = identity("expert-0", 4)
    with ExpertThread(expert_end("nccl", who, CONFIG, gpu=gpu_of("nccl")), who, answer) as expert:
        end = attention_end("shm", identity(), CONFIG)
        assert "must start with" in connect(end, [expert.peer])[expert.member]
        end.close()
    assert ShmDialer(identity(), CONFIG).scheme == "unix-abstract:"
