"""The processes of the decode benchmark: one attention worker with lanes, alone or with all experts beside it.

A lane is one way to compute: sequences of its own with keys and values of their own, an exchange, a count of
microbatches. The lanes of a process share the model's weights and take turns, so that what is compared is measured
minutes apart at most, not hours, and no lane pays for another's memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from attention_workers.attention_model import AttentionModel
from attention_workers.book import Book
from attention_workers.kv_blocks import KvBlocks
from attention_workers.step import AttemptId, Plan, Sampling, Start, StepResult
from attention_workers.worker import AttentionWorker
from benchmarks.errors import BenchmarkError
from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.service import ExpertService
from expert_workers.worker import ExpertWorker
from model.attention import TILE
from model.checkpoint import Checkpoint
from model.device import HOST
from model.exact import Numerics
from model.layer_types import FULL, SLIDING
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.membership import Failed, MemberEvent
from router.placement import EpochId, Member, Placement, spread
from router.transport.base import AttentionEnd, LinkIdentity, Parcel, Ticket
from router.transport.local import LocalAttentionEnd, LocalHub
from router.transport.select import attention_end, expert_end

CONFIG = RouterConfig(combine_timeout_s=30.0)
_TOKEN = ""
CHUNK = 256  # tokens of one prompt in one step
_UNHURRIED_S = 60.0  # between two tokens: no step is cut short for it
_STOP_S = 5.0
_ROUTES_MAX = 4096  # of one batch of experts


@dataclass(frozen=True)
class Model:
    path: Path
    numerics: Numerics
    threads: int
    positions: int
    """Longest sequence."""


# --- orders to an attention process, each answered when it is done ----------------------------


@dataclass(frozen=True)
class Open:
    """A lane over these experts; `transport` "local" is the experts of the same process."""

    lane: str
    transport: str
    placement: Placement | None
    microbatches: int


@dataclass(frozen=True)
class Begin:
    """Compute these prompts and the first token of each; several of a sequence's tokens may be given."""

    lane: str
    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Burst:
    """Decode so many steps. Answered with how long each took, in seconds."""

    lane: str
    steps: int


@dataclass(frozen=True)
class Finish:
    """Answered with the tokens of each sequence."""

    lane: str


def attention_process(pipe: Connection, index: int, model: Model, with_experts: bool) -> None:
    torch.set_num_threads(model.threads)
    process = _Attention(index, model, with_experts)
    pipe.send("ready")
    try:
        while True:
            pipe.send(process.obey(pipe.recv()))
    finally:
        process.close()


class _Lane:
    def __init__(self, worker: AttentionWorker) -> None:
        self.worker = worker
        self.plans = 0
        self.keys, self.values = dict(worker.model.keys), dict(worker.model.values)

    def order(self, starts: tuple[Start, ...] = (), stops: tuple[AttemptId, ...] = ()) -> StepResult:
        self.plans += 1
        book, result = self.worker.book, StepResult()
        plan = Plan(
            1, self.plans, book.fingerprint, 1, starts, stops, CONFIG.rows_max, CHUNK, inter_token_s=_UNHURRIED_S
        )
        book.apply(plan, result)
        return result

    def step(self) -> StepResult:
        model, result = self.worker.model, StepResult()
        model.keys, model.values = self.keys, self.values
        if not self.worker.step(result) or result.completions or result.paused:
            raise BenchmarkError("a sequence ended or was paused: the step was not what was to be measured")
        return result


class _Attention:
    def __init__(self, index: int, model: Model, with_experts: bool) -> None:
        self._index, self._told = index, model
        self._checkpoint = Checkpoint.open(model.path)
        config = self._checkpoint.config
        self._model = AttentionModel(
            self._checkpoint, device=HOST, dtype=getattr(torch, config.dtype), numerics=model.numerics,
            positions_max=model.positions, progress=lambda *_: None,
        )  # fmt: skip
        self._config = CONFIG.fitted(config.experts_per_token, config.hidden_size, self._model.dtype.itemsize)
        self._hub = LocalHub()
        self._own = self._make_experts() if with_experts else None
        self._lanes: dict[str, _Lane] = {}

    def _make_experts(self) -> tuple[ExpertWorker, Placement]:
        member, config = Member("local", 1), self._checkpoint.config
        end = expert_end("local", self._identity(member), self._config, self._hub)
        placement = spread(
            EpochId(1, 1), self._checkpoint.fingerprint, [(member, end.address)], config.num_layers,
            config.num_experts, 1,
        )  # fmt: skip
        residency = Residency(self._checkpoint, member, self._model.dtype, self._told.numerics, HOST)
        residency.prepare(placement)
        return ExpertWorker(
            residency, end, ExpertConfig(batch_rows_max=_ROUTES_MAX), self._identity(member).rows
        ), placement

    def _identity(self, member: Member) -> LinkIdentity:
        hidden = self._checkpoint.config.hidden_size
        numerics = self._told.numerics
        return LinkIdentity(
            member, self._checkpoint.fingerprint, _TOKEN, hidden, self._model.dtype,
            self._config.rows_sent(numerics), self._config.answers(numerics),
        )  # fmt: skip

    def obey(self, order: Open | Begin | Burst | Finish) -> object:
        """The answer; None where it is done that is told."""
        match order:
            case Open():
                self.open(order)
            case Begin():
                self.begin(order)
            case Burst():
                return self.burst(order)
            case Finish():
                return self.finish(order.lane)
        return None

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.worker.dispatcher.close()

    def open(self, order: Open) -> None:
        member = Member(f"{order.lane} {self._index}", 1)
        identity = self._identity(member)
        if self._own is not None:
            worker, placement = self._own
            end: AttentionEnd = _Inline(worker, self._hub, identity, self._config)
        else:
            assert order.placement is not None
            placement, end = order.placement, attention_end(order.transport, identity, self._config)
        dispatcher = Dispatcher(end, member, self._config, lambda _: None, identity.rows, identity.replies)
        dispatcher.prepare(placement)
        dispatcher.adopt()
        if dispatcher.lost:
            raise BenchmarkError(f"{order.lane}: no link to {', '.join(peer.id for peer in dispatcher.lost)}")
        book = self._book(sequences=CONFIG.rows_max // 4)
        self._lanes[order.lane] = _Lane(AttentionWorker(self._model, book, dispatcher, order.microbatches))

    def _book(self, sequences: int) -> Book:
        """Room for every sequence at its longest: pages of it are taken when written."""
        blocks = sequences * -(-self._told.positions // TILE)
        window = self._checkpoint.config.sliding_window
        self._model.make_kv({FULL: blocks, SLIDING: blocks})
        return Book(
            self._checkpoint.fingerprint, 1, KvBlocks(blocks), TILE, sequences, self._told.positions,
            sliding=None if window is None else KvBlocks(blocks, window),
        )  # fmt: skip

    def begin(self, order: Begin) -> None:
        lane = self._lanes[order.lane]
        starts = tuple(
            Start(AttemptId(str(n), lane.plans, 1), "gateway", prompt, (), Sampling(temperature=0.0), frozenset(),
                  self._told.positions, None, arrival=n)
            for n, prompt in enumerate(order.prompts)
        )  # fmt: skip
        lane.order(starts)
        while any(sequence.pending > 1 for sequence in lane.worker.book.sequences.values()):
            lane.step()

    def burst(self, order: Burst) -> list[float]:
        lane, took_s = self._lanes[order.lane], []
        for _ in range(order.steps):
            began_s = time.perf_counter()
            lane.step()
            took_s.append(time.perf_counter() - began_s)
        return took_s

    def finish(self, name: str) -> list[list[int]]:
        lane = self._lanes[name]
        sequences = sorted(lane.worker.book.sequences.values(), key=lambda s: s.order)
        lane.order(stops=tuple(lane.worker.book.sequences))
        return [sequence.tokens[len(sequence.start.prompt) :] for sequence in sequences]


class _Inline(LocalAttentionEnd):
    """Whose experts are computed by the thread that dispatches: one process that holds everything needs no second
    thread, and on few cores is slower with one."""

    def __init__(self, worker: ExpertWorker, hub: LocalHub, identity: LinkIdentity, config: RouterConfig) -> None:
        super().__init__(hub, identity, config)
        self._worker = worker

    def dispatch(self, parcels: Sequence[Parcel]) -> Ticket:
        ticket = super().dispatch(parcels)
        while self._worker.turn(0.0):
            pass
        return ticket


# --- expert processes ------------------------------------------------------------------------------


def expert_process(pipe: Connection, index: int, model: Model, transport: str) -> None:
    """The service as a cluster runs it. Tells its address; then loads what each placement that comes gives it."""

    def on_event(event: MemberEvent) -> None:
        pipe.send(BenchmarkError(event.detail) if isinstance(event, Failed) else "prepared")

    config = ExpertConfig(numerics=model.numerics, threads=model.threads, batch_rows_max=_ROUTES_MAX)
    service = ExpertService(
        model.path,
        Member(f"expert {index}", 1),
        _TOKEN,
        config,
        CONFIG,
        transport,
        "127.0.0.1",
        "cpu",
        1.0,
        on_event,
    )
    service.start()
    pipe.send(service.address)
    try:
        while True:
            service.prepare(pipe.recv())
    finally:
        service.stop(_STOP_S)
