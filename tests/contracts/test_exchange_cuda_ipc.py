"""Rows copied between GPUs of one host keep the exchange contract: over a stand-in, or on a GPU (tests/on_gpu)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from router.config import RouterConfig
from router.errors import GpuError, LinkRefused
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Reply
from router.transport.lane import Pairs
from router.transport.mirror_lane import MirrorLanes
from router.transport.select import attention_end, expert_end
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
from tests.contracts.stand_in_gpu import StandInGpu, StandInMemory


class TestCudaIpcExchange(ExchangeSuite):
    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("cuda_ipc", who, config, gpu=gpu_of("cuda_ipc"))

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("cuda_ipc", who, config, gpu=gpu_of("cuda_ipc"))


class Counting(StandInGpu):
    def __init__(self) -> None:
        super().__init__()
        self.memories: list[StandInMemory] = []
        self.finished = 0

    def allocate(self, nbytes: int) -> StandInMemory:
        self.memories.append(super().allocate(nbytes))
        return self.memories[-1]

    def open(self, handle: bytes, nbytes: int) -> StandInMemory:
        self.memories.append(super().open(handle, nbytes))
        return self.memories[-1]

    def finish(self) -> None:
        self.finished += 1

    @property
    def in_use(self) -> int:
        return sum(memory.tensor.numel() > 0 for memory in self.memories)


class Apart(StandInGpu):
    """A GPU that reaches no other's memory."""

    def open(self, handle: bytes, nbytes: int) -> StandInMemory:
        raise GpuError("peer access is not supported between these two devices")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="looks into the stand-in")
class TestCudaIpcAlone:
    """What only shared device memory can do wrong."""

    @pytest.fixture(autouse=True)
    def _stage(self) -> Iterator[None]:
        with ExitStack() as self.stack:
            yield

    def attention(self, gpu: StandInGpu, name: str = "attention-0", kind: str = "cuda_ipc") -> AttentionEnd:
        end = attention_end(kind, identity(name), CONFIG, gpu=gpu)
        self.stack.callback(end.close)
        return end

    def expert(self, gpu: StandInGpu, config: RouterConfig = CONFIG, kind: str = "cuda_ipc") -> ExpertThread:
        who = identity("expert-0", 4)
        return self.stack.enter_context(ExpertThread(expert_end(kind, who, config, gpu=gpu), who, answer))

    def test_rows_lie_in_device_memory_alone(self) -> None:
        """The host's rings have room for them, and no row is ever written there."""
        expert, end, me = self.expert(Counting()), self.attention(Counting()), identity()
        assert connect(end, [expert.peer]) == {}
        rows = torch.full((4, me.hidden), 1.25)
        sent = parcel(me, expert.member, rows=rows)
        [reply] = end.combine(end.dispatch([sent]), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent))
        segment = end._links[expert.member]._wires.wiring.segment  # type: ignore[attr-defined]
        pattern = rows[0].numpy().tobytes()
        assert pattern not in bytes(segment.parcels.frames)
        assert reply.rows[0].numpy().tobytes() not in bytes(segment.replies.frames)

    def test_a_frame_is_published_and_given_back_behind_the_device(self) -> None:
        """Each copy is waited for before its frame is seen, and each reader before its room is used again."""
        expert_gpu, gpu, me = Counting(), Counting(), identity()
        expert, end = self.expert(expert_gpu), self.attention(gpu)
        assert connect(end, [expert.peer]) == {}
        ticket = end.dispatch([parcel(me, expert.member)])
        assert gpu.finished == 1
        end.combine(ticket, PATIENCE_S)
        assert expert_gpu.finished >= 1
        end.release(ticket)
        assert gpu.finished == 2

    def test_no_handle_outlives_its_link(self) -> None:
        """Neither what was allocated nor what was opened, at either end, after any end."""
        before = footprint()
        expert_gpu, gpu = Counting(), Counting()
        expert, end = self.expert(expert_gpu), self.attention(gpu)
        assert connect(end, [expert.peer]) == {}
        assert (expert_gpu.in_use, gpu.in_use) == (2, 2)
        end.close()
        expert.leave()
        assert (expert_gpu.in_use, gpu.in_use) == (0, 0)
        del end, expert, expert_gpu, gpu
        assert_nothing_left(before)

    def test_pairs_are_bounded_and_come_back(self) -> None:
        """Each costs a ring of device memory: one too many is told the setting, the next takes its place."""
        expert = self.expert(StandInGpu(), replace(CONFIG, gpu_pairs_max=1))
        first = self.attention(StandInGpu())
        assert connect(first, [expert.peer]) == {}
        second = self.attention(StandInGpu(), "attention-1")
        failed = connect(second, [expert.peer])
        assert failed[expert.member] == "pairs: this GPU serves 1 already; at most 1 (gpu_pairs_max)"
        first.close()
        assert connect(self.attention(StandInGpu(), "attention-2"), [expert.peer]) == {}

    def test_gpus_that_do_not_reach_each_other_are_told(self) -> None:
        """By whichever end finds out; nothing is left of the link."""
        for gpus in ((Apart(), StandInGpu()), (StandInGpu(), Apart())):
            expert, end = self.expert(gpus[0]), self.attention(gpus[1])
            assert "peer access" in connect(end, [expert.peer])[expert.member]
            expert.leave()

    def test_auto_goes_on_to_nccl_where_gpus_do_not_reach_each_other(self) -> None:
        """Whichever end finds out: the next way is tried, and what serves is told."""
        for gpus in ((Apart(), StandInGpu()), (StandInGpu(), Apart())):
            expert, end = self.expert(gpus[0], kind="auto"), self.attention(gpus[1], kind="auto")
            assert connect(end, [expert.peer]) == {}
            assert end.transports() == {expert.member: "nccl"}
            expert.leave()

    @pytest.mark.parametrize("key", [b"", b"1/1", b"\xff" * 64, b"0/99999"])
    def test_a_handle_that_is_none_is_refused(self, key: bytes) -> None:
        lanes = MirrorLanes(StandInGpu(), CONFIG, Pairs(CONFIG))
        with pytest.raises(LinkRefused, match="cannot be mapped"):
            lanes.accept(key, CONFIG.link_bytes_max)
        lanes.close()

    def test_auto_takes_cuda_ipc_on_one_host_and_nccl_between_hosts(self) -> None:
        """As found by trying; what serves each peer is told."""
        near = self.expert(StandInGpu(), kind="auto")
        who = identity("expert-1", 4)
        far = self.stack.enter_context(
            ExpertThread(expert_end("auto", who, CONFIG, gpu=StandInGpu()), who, answer)
        )
        end, me = self.attention(StandInGpu(), kind="auto"), identity()
        elsewhere = "cuda_ipc+unix-abstract:expertmesh/on-another-host"
        as_seen_from_afar = replace(far.peer, address=f"{elsewhere},{far.end.address.split(',')[1]}")
        assert connect(end, [near.peer, as_seen_from_afar]) == {}
        assert end.transports() == {near.member: "cuda_ipc", far.member: "nccl"}
        sent = [parcel(me, to.member) for to in (near, far)]
        for outcome, each in zip(end.combine(end.dispatch(sent), PATIENCE_S), sent, strict=True):
            assert isinstance(outcome, Reply)
            assert torch.equal(outcome.rows, computed(each))
