"""The two hundred requests, and random topologies to serve them under: pure, each drawn from its seed."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from attention_workers.step import AttemptId, Sampling, Start
from router.placement import EpochId, Placement

NUM_REQUESTS = 200
NUM_PREFIXES = 4
GATEWAY = "gw"
MODELS = ("full float32", "full bfloat16", "hybrid float32", "fp8-hybrid bfloat16")
TRANSPORTS = ("local", "shm", "grpc", "mixed", "faulty")
ARRIVAL_STEPS = 6


def requests() -> list[Start]:
    """Prompts of 1 to 80 tokens, a quarter of them with one of a few long beginnings; greedy and sampled in all
    ways; 1 to 6 tokens each."""
    rng = random.Random(200)
    prefixes = [_tokens(rng, rng.randint(40, 72)) for _ in range(NUM_PREFIXES)]
    return [_request(rng, number, prefixes) for number in range(NUM_REQUESTS)]


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(20, 500) for _ in range(count))


def _request(rng: random.Random, number: int, prefixes: list[tuple[int, ...]]) -> Start:
    if number % 4 == 0:
        prompt = rng.choice(prefixes) + _tokens(rng, rng.randint(1, 8))
    else:
        prompt = _tokens(rng, rng.choice((1, 2, rng.randint(3, 30), rng.randint(31, 60))))
    max_tokens = rng.randint(1, 6)
    has_stops = rng.random() < 0.2
    return Start(
        AttemptId(f"r{number}", 0, 1), GATEWAY, prompt, (), _sampling(rng),
        frozenset(range(0, 512, 7)) if has_stops else frozenset(), max_tokens, rng.randint(0, 5),
        min_tokens=rng.randint(0, max_tokens - 1) if has_stops else 0,
    )  # fmt: skip


def _sampling(rng: random.Random) -> Sampling:
    greedy = Sampling(temperature=0.0)
    if rng.random() < 0.3:
        return greedy
    plain = Sampling(rng.uniform(0.3, 1.5), seed=rng.getrandbits(60))
    return rng.choice((
        plain,
        dataclasses.replace(plain, top_p=rng.uniform(0.3, 0.99)),
        dataclasses.replace(plain, top_k=rng.randint(1, 60), min_p=rng.choice((0.0, 0.01))),
        dataclasses.replace(
            rng.choice((greedy, plain)), repetition_penalty=rng.uniform(0.8, 1.4),
            frequency_penalty=rng.uniform(-0.5, 1.0), presence_penalty=rng.uniform(-0.5, 1.0),
            logit_bias=((rng.randrange(500), 3.0),),
        ),
    ))  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    start: Start
    worker: int
    step: int
    stops_after: int | None = None  # tokens; None: it runs to its end
    resumes_on: int | None = None  # the worker that goes on from there; None: nobody does


@dataclass(frozen=True)
class Topology:
    seed: int
    model: str
    transport: str
    attention: int
    experts: int
    replicas_min: int  # of each expert; up to all workers hold it
    microbatches: int
    threads: int
    keep: tuple[str, ...]  # how FP8 weights are held, in turn
    is_dry: bool  # so few blocks that sequences pause
    blocks: int
    sliding_blocks: int
    prefix_cache: bool
    is_warm: bool  # each worker meets every long beginning before the crowd comes
    join_wait_s: float
    dies_after: int | None  # batches of the first expert worker
    moves_at: int | None  # the first attention worker's step at which a second placement is published

    @property
    def replay(self) -> str:
        where = "tests/equivalence/test_grand.py"
        return f"python -m pytest {where} --topologies {self.seed + 1} -k 'topology[{self.seed}]'"


def topology(seed: int) -> Topology:
    """Models and transports in turn, the rest by chance."""
    rng = random.Random(f"topology {seed}")
    model = MODELS[seed % len(MODELS)]
    attention, experts = rng.randint(1, 3), rng.randint(1, 4)
    dies = experts > 1 and rng.random() < 0.4
    is_dry = rng.random() < 0.3
    return Topology(
        seed=seed,
        model=model,
        transport=_transport(TRANSPORTS[seed // len(MODELS) % len(TRANSPORTS)], rng),
        attention=attention,
        experts=experts,
        replicas_min=2 if dies else 1,
        microbatches=rng.randint(1, 3),
        threads=2 if rng.random() < 0.15 else 1,
        keep=rng.choice((("fp8",), ("fp8", "dequantised"))) if "fp8" in model else ("dequantised",),
        is_dry=is_dry,
        blocks=rng.randint(9, 15) if is_dry else 512,
        sliding_blocks=rng.randint(9, 15) if is_dry else 512,
        prefix_cache=rng.random() < 0.7,
        is_warm=rng.random() < 0.4,
        join_wait_s=rng.choice((0.0, 0.002)),
        dies_after=rng.randint(3, 40) if dies else None,
        moves_at=rng.randrange(1, ARRIVAL_STEPS) if rng.random() < 0.4 else None,
    )


def _transport(kind: str, rng: random.Random) -> str:
    """A faulty one delays, reorders and duplicates, whichever it wraps; it loses nothing, for that is a death."""
    if kind != "faulty":
        return kind
    faults = f"seed={rng.getrandbits(30)},duplicate=0.1,reorder=0.2,reorder_s=0.003,delay_s=0.0005"
    return f"faulty:{rng.choice(('local', 'shm', 'grpc'))}:{faults}"


def arrivals(topo: Topology) -> list[Arrival]:
    """Every request once, somewhere at some time; a tenth stopped midway and resumed, on another worker or the
    same; some a second time, to be cancelled midway; and a few of the long ones first of all, where it is warm."""
    rng = random.Random(f"arrivals {topo.seed}")
    found, crowd = [], requests()
    if topo.is_warm:
        found += [Arrival(twin(crowd[4 * i], 2 + w), w, -9) for i in range(9) for w in range(topo.attention)]
    for start in crowd:
        start = dataclasses.replace(start, priority=rng.randint(0, 2), arrival=rng.randrange(1000))
        worker, step, fate = rng.randrange(topo.attention), rng.randrange(ARRIVAL_STEPS), rng.random()
        midway = rng.randrange(max(1, start.max_tokens - 1))
        if fate < 0.1:
            found.append(Arrival(start, worker, step, midway, rng.randrange(topo.attention)))
        else:
            found.append(Arrival(start, worker, step))
        if fate > 0.95:
            found.append(Arrival(twin(start, 1), rng.randrange(topo.attention), step, midway))
    return found


def twin(start: Start, index: int) -> Start:
    """Another sequence of the same request, with the same seed."""
    return dataclasses.replace(start, attempt=AttemptId(start.attempt.request_id, index, 1))


def limits(rng: random.Random) -> dict[str, int]:
    """Of one plan: how its prompts are cut."""
    return {
        "step_tokens": rng.choice((96, 300, 1000)),
        "chunk_tokens": rng.choice((9, 16, 32, 33, 64, 256)),
    }


def random_placement(rng: random.Random, even: Placement, epoch: EpochId, replicas_min: int) -> Placement:
    """Each expert on some of the workers of `even`, at least so many, in slots of any order."""
    hands: list[list[tuple[int, int]]] = [[] for _ in even.workers]
    for layer in range(even.num_layers):
        for expert in range(even.num_experts):
            for worker in rng.sample(range(len(hands)), rng.randint(replicas_min, len(hands))):
                hands[worker].append((layer, expert))
    for hand in hands:
        rng.shuffle(hand)
    workers = [dataclasses.replace(w, experts=tuple(hand)) for w, hand in zip(even.workers, hands, strict=True)]
    placement = dataclasses.replace(even, epoch=epoch, workers=tuple(workers))
    placement.validate()
    return placement
