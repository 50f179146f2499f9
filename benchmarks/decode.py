"""Tokens a second of decoding: attention and experts on processes of their own, against all of it in one.

Every way of computing runs on the same machine in the same minutes: for each batch size all lanes compute their
prompts, then decode in turn, some steps at a time, in rounds. Ratios are of rounds, so that what slows one lane
slows its neighbour. No Ray: it runs processes, and has no part in a step.

In exact mode all lanes must bring the same tokens, and this is checked.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attention_workers.batching import ROWS_MIN, SHORTEST
from benchmarks.decode_lanes import (
    CHUNK,
    CONFIG,
    Begin,
    Burst,
    Finish,
    Model,
    Open,
    attention_process,
    expert_process,
)
from benchmarks.errors import BenchmarkError
from benchmarks.samples import Samples, ratio
from benchmarks.spawned import Spawned, spawned
from model.checkpoint import Checkpoint, attention_tensor_names
from model.device import HOST
from model.exact import Numerics
from model.memory import available_bytes, bytes_in_memory
from router.placement import EpochId, Member, Placement, spread

_START_S = 300.0
_BURST_S = 600.0
_PROCESS_BYTES = 400 << 20
_WARM_STEPS = 2


@dataclass(frozen=True)
class Topology:
    """How many processes of each kind."""

    attention: int
    experts: int

    def __str__(self) -> str:
        return f"{self.attention}A+{self.experts}E"


@dataclass(frozen=True)
class Task:
    model: Path
    numerics: tuple[Numerics, ...] = ("exact",)
    batches: tuple[int, ...] = (1, 8, 32)
    microbatches: tuple[int, ...] = (1, 2)
    transports: tuple[str, ...] = ("shm", "grpc")
    topologies: tuple[Topology, ...] = (Topology(1, 1), Topology(1, 2))
    threads: tuple[int, ...] = (1, 2)
    """Of the one process that holds everything. Workers of their own have one each."""
    context: int = 64
    """Tokens of each prompt; sequences grow from there."""
    steps: int = 4
    """Steps a lane decodes in a row."""
    rounds: int = 5

    @property
    def positions(self) -> int:
        """Of the longest sequence. Those whose prompt is done decode while others still wait for theirs."""
        in_a_step = 1 + SHORTEST  # prompts
        chunk = min(CHUNK, (CONFIG.rows_max - max(self.batches)) // in_a_step - ROWS_MIN)
        waited = -(-max(self.batches) // in_a_step) * -(-self.context // chunk)
        return self.context + waited + 2 + _WARM_STEPS + self.rounds * self.steps


@dataclass(frozen=True)
class Lane:
    """One way of computing."""

    numerics: Numerics
    topology: Topology | None  # None: one process
    transport: str
    threads: int
    microbatches: int

    @property
    def name(self) -> str:
        where = f"{self.topology} {self.transport}" if self.topology else f"1 process, threads {self.threads}"
        return f"{where}, microbatches {self.microbatches}, {self.numerics}"


@dataclass
class Measured:
    """One lane at one batch size."""

    lane: Lane
    batch: int
    rates: list[float] = field(default_factory=list)  # tokens/s, by round
    step_ms: list[float] = field(default_factory=list)  # of one attention process

    @property
    def tokens_per_s(self) -> Samples:
        return Samples.of(self.rates)

    @property
    def step_samples_ms(self) -> Samples:
        return Samples.of(self.step_ms)


@dataclass(frozen=True)
class Comparison:
    """The best lane of one kind over the best of another, at one batch size, round by round."""

    what: str
    batch: int
    over: Lane
    under: Lane
    ratio: Samples


@dataclass(frozen=True)
class Outcome:
    measured: list[Measured]
    comparisons: list[Comparison]
    tokens_compared: int  # between exact lanes, all equal


def measure(task: Task, say: Callable[[str], None]) -> Outcome:
    """`say` is told what begins. Raises BenchmarkError or ModelError."""
    checkpoint = Checkpoint.open(task.model)
    _check(task, checkpoint)
    with contextlib.ExitStack() as stack:
        lanes: dict[Lane, list[Spawned]] = {}
        for numerics in task.numerics:
            say(f"starting processes, {numerics}")
            lanes |= stack.enter_context(_processes(task, checkpoint, numerics))
        measured, compared = [], 0
        for batch in task.batches:
            able = {lane: p for lane, p in lanes.items() if lane.microbatches <= max(1, batch // len(p))}
            found, tokens = _measure_batch(task, checkpoint, batch, able, say)
            measured += found
            compared += tokens
    return Outcome(measured, [c for batch in task.batches for c in _compare(measured, batch)], compared)


def _check(task: Task, checkpoint: Checkpoint) -> None:
    model = checkpoint.config
    if task.positions > model.max_position_embeddings:
        raise BenchmarkError(
            f"context, rounds, steps: {task.positions} tokens in all; accepted: at most "
            f"{model.max_position_embeddings}, which {task.model} allows"
        )
    needed, available = _bytes_needed(task, checkpoint), available_bytes(HOST)
    if needed > available:
        raise BenchmarkError(
            f"memory: {available / 2**30:.1f} GiB available, about {needed / 2**30:.1f} GiB needed; accepted: "
            "fewer topologies, threads or numerics, a smaller batch or context, or more memory"
        )


def _bytes_needed(task: Task, checkpoint: Checkpoint) -> int:
    """Of all processes at once."""
    model, dtype = checkpoint.config, _dtype(checkpoint)
    own = attention_tensor_names(model)
    attention = bytes_in_memory(checkpoint, own, dtype, "dequantised", HOST)
    experts = bytes_in_memory(checkpoint, set(checkpoint.names()) - set(own), dtype, "dequantised", HOST)
    per_token: int = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    num_attention = max((t.attention for t in task.topologies), default=0)
    num_experts = {t.experts for t in task.topologies}
    processes = len(task.threads) + num_attention + max(num_experts, default=0)
    weights = len(task.threads) * (attention + experts) + num_attention * attention
    weights += sum(
        experts // (n + 1) for n in range(max(num_experts, default=0))
    )  # the n-th holds its largest share
    lanes = len(task.microbatches) * (len(task.threads) + len(task.topologies) * len(task.transports))
    kept = lanes * max(task.batches) * task.positions * per_token
    return len(task.numerics) * (weights + processes * _PROCESS_BYTES + kept)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, checkpoint.config.dtype)
    return dtype


# --- processes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _processes(task: Task, checkpoint: Checkpoint, numerics: Numerics) -> Iterator[dict[Lane, list[Spawned]]]:
    """Every lane of one numerics mode, open, and the attention processes that run it."""
    with contextlib.ExitStack() as stack:

        def start(name: str, target: Callable[..., None], *arguments: object) -> Spawned:
            return stack.enter_context(spawned(name, target, *arguments))

        def model(threads: int) -> Model:
            return Model(task.model, numerics, threads, task.positions)

        most_attention = max((t.attention for t in task.topologies), default=0)
        most_experts = max((t.experts for t in task.topologies), default=0)
        kind = "auto" if set(task.transports) == {"shm", "grpc"} else "".join(task.transports[:1])
        experts = [start(f"expert {n}", expert_process, n, model(1), kind) for n in range(most_experts)]
        attention = [start(f"attention {n}", attention_process, n, model(1), False) for n in range(most_attention)]
        alone = {n: start(f"one process, {n} threads", attention_process, n, model(n), True) for n in task.threads}
        addresses = [expert.hear(_START_S) for expert in experts]
        for process in (*attention, *alone.values()):
            process.hear(_START_S)

        lanes: dict[Lane, list[Spawned]] = {}
        for microbatches in task.microbatches:
            for threads, process in alone.items():
                lane = Lane(numerics, None, "local", threads, microbatches)
                process.ask(Open(lane.name, "local", None, microbatches), _START_S)
                lanes[lane] = [process]
        for number, topology in enumerate(task.topologies, 1):
            placement = _placement(checkpoint, number, addresses[: topology.experts])
            for expert in experts[: topology.experts]:
                expert.tell(placement)
            for expert in experts[: topology.experts]:
                expert.hear(_START_S)
            for transport in task.transports:
                for microbatches in task.microbatches:
                    lane = Lane(numerics, topology, transport, 1, microbatches)
                    lanes[lane] = attention[: topology.attention]
                    for process in lanes[lane]:
                        process.ask(Open(lane.name, transport, placement, microbatches), _START_S)
        yield lanes


def _placement(checkpoint: Checkpoint, number: int, addresses: Sequence[str]) -> Placement:
    members = [(Member(f"expert {n}", 1), address) for n, address in enumerate(addresses)]
    model = checkpoint.config
    return spread(EpochId(1, number), checkpoint.fingerprint, members, model.num_layers, model.num_experts, 1)


# --- rounds ----------------------------------------------------------------------------------------


def _measure_batch(
    task: Task,
    checkpoint: Checkpoint,
    batch: int,
    lanes: dict[Lane, list[Spawned]],
    say: Callable[[str], None],
) -> tuple[list[Measured], int]:
    """All lanes in turn; and how many tokens of exact ones were compared."""
    prompts = _prompts(batch, task.context, checkpoint.config.vocab_size)
    for lane, processes in lanes.items():
        say(f"batch {batch}: prompts, {lane.name}")
        parts = [tuple(prompts[n :: len(processes)]) for n in range(len(processes))]
        _ask_all(processes, [Begin(lane.name, part) for part in parts])
    found = {lane: Measured(lane, batch) for lane in lanes}
    for number in range(-1, task.rounds):
        say(f"batch {batch}: round {number + 1} of {task.rounds}" if number >= 0 else f"batch {batch}: warming up")
        for lane in list(lanes) if number % 2 == 0 else reversed(list(lanes)):
            steps = task.steps if number >= 0 else _WARM_STEPS
            began_s = time.perf_counter()
            steps_s = _ask_all(lanes[lane], [Burst(lane.name, steps)] * len(lanes[lane]))[0]
            took_s = time.perf_counter() - began_s
            if number >= 0:
                found[lane].rates.append(batch * steps / took_s)
                found[lane].step_ms += [1e3 * step_s for step_s in steps_s]
    tokens: dict[str, list[list[int]]] = {}
    for lane, processes in lanes.items():
        answers = _ask_all(processes, [Finish(lane.name)] * len(processes))
        if lane.numerics == "exact":
            tokens[lane.name] = [answers[n % len(answers)][n // len(answers)] for n in range(batch)]
    return list(found.values()), _compare_tokens(tokens)


def _prompts(batch: int, context: int, vocab_size: int) -> list[tuple[int, ...]]:
    chance = random.Random(batch)
    return [tuple(chance.randrange(vocab_size) for _ in range(context)) for _ in range(batch)]


def _ask_all(processes: list[Spawned], orders: Sequence[object]) -> list[Any]:
    """All at work at once."""
    for process, order in zip(processes, orders, strict=True):
        process.tell(order)
    return [process.hear(_BURST_S) for process in processes]


def _compare_tokens(tokens: dict[str, list[list[int]]]) -> int:
    """Raises BenchmarkError where two lanes differ: rule 2 is broken, and no rate is worth anything."""
    names = list(tokens)
    compared = 0
    for name in names[1:]:
        for n, (first, other) in enumerate(zip(tokens[names[0]], tokens[name], strict=True)):
            common = min(len(first), len(other))  # a lane with fewer prompts at once began to decode earlier
            if first[:common] != other[:common]:
                raise BenchmarkError(f"sequence {n}: {names[0]} and {name} bring different tokens in exact mode")
            compared += common
    return compared


def _compare(measured: list[Measured], batch: int) -> Iterator[Comparison]:
    """The best disaggregated lane of each transport over the best colocated one; exact over fast."""
    best: dict[tuple[str, str], Measured] = {}
    for found in measured:
        key = (found.lane.numerics, found.lane.transport)
        if found.batch == batch and (key not in best or found.tokens_per_s.p50 > best[key].tokens_per_s.p50):
            best[key] = found
    for (numerics, transport), found in best.items():
        alone = best.get((numerics, "local"))
        if transport != "local" and alone is not None:
            yield _comparison(f"{transport} over one process, {numerics}", found, alone)
    for (numerics, transport), found in best.items():
        fast = best.get(("fast", transport))
        if numerics == "exact" and fast is not None:
            yield _comparison(f"exact over fast, {transport}", found, fast)


def _comparison(what: str, over: Measured, under: Measured) -> Comparison:
    return Comparison(what, over.batch, over.lane, under.lane, ratio(over.rates, under.rates))
