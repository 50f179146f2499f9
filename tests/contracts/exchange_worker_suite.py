"""What every transport promises of the whole exchange: the real dispatcher here, real expert workers there."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.worker import ExpertWorker
from model.checkpoint import Checkpoint, expert_weight_names
from model.device import HOST
from model.experts import grouped
from model.gate import Routes
from model.synthetic import make_checkpoint
from router.dispatcher import Dispatcher
from router.errors import ExpertsUnavailable
from router.merge import merge
from router.placement import EpochId, Member, PlacedWorker, Placement
from router.transport.base import LinkIdentity
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, identity
from tests.contracts.exchange_stage import ExchangeStage

EVERY = tuple((0, expert) for expert in range(4))  # of layer 0
FIRST, SECOND = EpochId(1, 1), EpochId(1, 2)


@functools.cache
def checkpoint() -> Checkpoint:
    """Tiny; once its one file is mapped, the folder may go."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("tiny", Path(folder) / "tiny", seed=1)
        opened = Checkpoint.open(Path(folder) / "tiny")
        opened.weight(expert_weight_names(opened.config, 0, 0)[0], HOST)
        return opened


class LiveWorker:
    """An expert worker that turns in a thread of its own until left."""

    def __init__(self, stage: ExchangeStage, member: Member, experts: tuple[tuple[int, int], ...]) -> None:
        self.residency = Residency(checkpoint(), member, torch.float32, "exact", HOST)
        self.load(FIRST, experts)
        self.end = stage.expert_end(who(member), CONFIG)
        self.placed = PlacedWorker(member, self.end.address, EVERY)
        self._worker = ExpertWorker(self.residency, self.end, ExpertConfig())
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._turn, name=f"expert {member.id}")

    def load(self, epoch: EpochId, experts: tuple[tuple[int, int], ...] = EVERY) -> None:
        member = self.residency.member
        self.residency.prepare(table(epoch, PlacedWorker(member, "", experts)))

    @contextmanager
    def living(self) -> Iterator[LiveWorker]:
        self._thread.start()
        try:
            yield self
        finally:
            self._leaving.set()
            self.end.wake()
            self._thread.join(PATIENCE_S)
            self.end.close()

    def _turn(self) -> None:
        while not self._leaving.is_set():
            self._worker.turn(PATIENCE_S)

    @property
    def num_refused(self) -> int:
        return self._worker.refused


def who(member: Member) -> LinkIdentity:
    return identity(
        member.id, member.incarnation, checkpoint().fingerprint, hidden=checkpoint().config.hidden_size
    )


def table(epoch: EpochId, *workers: PlacedWorker) -> Placement:
    return Placement(epoch, checkpoint().fingerprint, checkpoint().config.num_layers, len(EVERY), workers)


def batch() -> tuple[Tensor, Routes]:
    """Every expert gets rows."""
    chance = torch.Generator().manual_seed(4)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]])
    rows = torch.randn(len(ids), checkpoint().config.hidden_size, generator=chance)
    return rows, Routes(ids, torch.rand(ids.shape, generator=chance))


def direct() -> Tensor:
    """[T, H]: without any exchange."""
    rows, routes = batch()
    residency = Residency(checkpoint(), Member("", 1), torch.float32, "exact", HOST)
    residency.prepare(table(FIRST, PlacedWorker(Member("", 1), "", EVERY)))
    every = rows.repeat(routes.expert_ids.shape[1], 1)  # by position: k * T + t
    with torch.inference_mode():
        ranks = grouped(
            residency.layer(0), every, torch.arange(len(every)), routes.expert_ids.t().reshape(-1).int()
        )
        return merge(ranks, routes.weights)


class WorkerSuite(ExchangeStage):
    def _worker(self, name: str, experts: tuple[tuple[int, int], ...] = EVERY, incarnation: int = 1) -> LiveWorker:
        return self.stack.enter_context(LiveWorker(self, Member(name, incarnation), experts).living())

    def _dispatcher(self, *placed: PlacedWorker) -> Dispatcher:
        me = who(Member("attention-0", 1))
        self.lost: list[Member] = []
        dispatcher = Dispatcher(self.attention_end(me, CONFIG), me.member, CONFIG, self.lost.append)
        self.stack.callback(dispatcher.close)
        dispatcher.prepare(table(FIRST, *placed))
        dispatcher.adopt()
        return dispatcher

    def test_a_retired_epoch_is_refused_and_the_next_is_served(self) -> None:
        """A worker that slept through a placement must not use slots which may hold something else by now."""
        worker = self._worker("expert-0")
        dispatcher = self._dispatcher(worker.placed)
        assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch())), direct())
        worker.load(SECOND)
        worker.residency.retire(FIRST)
        with pytest.raises(ExpertsUnavailable, match="STALE_EPOCH, oldest is"):
            dispatcher.combine(dispatcher.dispatch(0, *batch()))
        dispatcher.prepare(table(SECOND, worker.placed))
        assert dispatcher.adopt() == SECOND
        assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch())), direct())
        assert self.lost == []

    def test_an_expert_that_is_not_resident_is_refused_and_planned_again(self) -> None:
        """On its replica, at the same layer of the same step; who refused is not lost."""
        without = self._worker("expert-0", EVERY[:2])
        other = self._worker("expert-1")
        dispatcher = self._dispatcher(without.placed, other.placed)
        assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch())), direct())
        assert without.num_refused == dispatcher.counters()["refused_not_resident"] == 1
        assert self.lost == []

    def test_a_dead_incarnation_is_not_mistaken_for_the_living(self) -> None:
        """At the old one's address a new one answers, which may hold anything: its replica computes."""
        living = self._worker("expert-0", EVERY[:1], incarnation=2)
        other = self._worker("expert-1")
        dead = PlacedWorker(Member("expert-0", 1), living.end.address, EVERY)
        dispatcher = self._dispatcher(dead, other.placed)
        assert self.lost == [dead.member]
        assert torch.equal(dispatcher.combine(dispatcher.dispatch(0, *batch())), direct())
        assert living.num_refused == 0
