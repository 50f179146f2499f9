"""What is to happen: a cluster, its requests, and faults in order of time. Text, or drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

COUNT_MAX = 64


class ScenarioError(Exception):
    """A line that cannot be read: says which, and what is accepted."""


@dataclass(frozen=True)
class Shape:
    attention: int = 2
    experts: int = 3
    replicas: int = 2
    nodes: int = 1
    gateways: int = 1
    hybrid: int = 0  # 1: half of the layers slide
    sums: int = 0  # 1: experts send sums back, as in fast numerics
    microbatches: int = 1
    spare: int = 0  # slots of each expert worker and layer for copies


@dataclass(frozen=True)
class Load:
    count: int = 8
    over: float = 5.0
    """Seconds over which they come."""
    hang_ups: float = 0.1
    """How many of them are given up by their client, and as many are cut short by a stop string."""


@dataclass(frozen=True)
class Fault:
    at_s: float
    verb: str
    target: str = ""
    amount: float = 0.0  # `times` of slow; the rate of drop and twice
    for_s: float = 0.0

    def __str__(self) -> str:
        words = [f"at {self.at_s:g} {self.verb}", self.target]
        if self.verb == "slow":
            words.append(f"times {self.amount:g}")
        elif self.verb in RATES:
            words.append(f"{self.amount:g}")
        if self.verb in LASTING:
            words.append(f"for {self.for_s:g}")
        return " ".join(filter(None, words))


RATES = ("drop", "twice")
LASTING = ("freeze", "slow", "cut", "sever", *RATES)
VERBS = {
    "kill": "at T kill WORKER: it is killed, as by kill -9",
    "freeze": "at T freeze WORKER for S: it stands still, as by SIGSTOP",
    "slow": "at T slow WORKER times N for S: its work takes N times as long",
    "flap": "at T flap WORKER: all its streams break",
    "sever": "at T sever WORKER for S: its links with the other pool break, and cannot be made again",
    "cut": "at T cut NODE for S: nothing passes between it and the others",
    "lose": "at T lose NODE: it is gone with all that ran there",
    "usurp": "at T usurp DECIDER: a second scheduler or controller is started beside the first",
    "resize": "at T resize POOL=N: the attention or the experts pool is to have so many workers",
    "drain": "at T drain WORKER: it is to leave, and its pool to be one smaller",
    "rebalance": "at T rebalance experts: they are moved and copied to where load is least",
    "drop": "at T drop RATE for S: of parcels and replies so many are lost",
    "twice": "at T twice RATE for S: so many come twice",
}


@dataclass(frozen=True)
class Scenario:
    seed: int
    shape: Shape = Shape()
    load: Load = Load()
    faults: tuple[Fault, ...] = ()
    heal_s: float = 9.0
    """When all faults end, and everything has to come to rest."""

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        lines = [f"seed {self.seed}", _words("cluster", self.shape), _words("requests", self.load)]
        return "\n".join([*lines, *map(str, self.faults), f"heal {self.heal_s:g}", ""])


def _words(name: str, values: Shape | Load) -> str:
    said = [f"{f.name}={getattr(values, f.name):g}" for f in fields(values)]
    return " ".join([name, *said])


def parse(text: str) -> Scenario:
    """Raises ScenarioError."""
    scenario = Scenario(0)
    faults: list[Fault] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            scenario = _read(scenario, faults, words)
        except ValueError as error:
            raise ScenarioError(f"line {number}: {line.strip()!r}: {error}") from None
    return replace(scenario, faults=tuple(sorted(faults, key=lambda fault: fault.at_s)))


def _read(scenario: Scenario, faults: list[Fault], words: list[str]) -> Scenario:
    match words:
        case ["seed", number]:
            return replace(scenario, seed=int(number))
        case ["heal", seconds]:
            return replace(scenario, heal_s=_positive(seconds))
        case ["cluster", *said]:
            return replace(scenario, shape=_shape(said))
        case ["requests", *said]:
            return replace(scenario, load=Load(**_values(Load(), said)))
        case ["at", seconds, *what]:
            faults.append(_fault(_positive(seconds), what))
            return scenario
    raise ValueError("accepted: seed, heal, cluster, requests, at")


def _shape(said: list[str]) -> Shape:
    shape = Shape(**_values(Shape(), said))
    for name in ("attention", "experts", "replicas", "nodes", "gateways", "microbatches"):
        if not 1 <= getattr(shape, name) <= COUNT_MAX:
            raise ValueError(f"{name} is {getattr(shape, name)}, accepted: 1 to {COUNT_MAX}")
    return shape


def _values(defaults: Shape | Load, said: list[str]) -> dict[str, Any]:
    accepted = {f.name: type(getattr(defaults, f.name)) for f in fields(defaults)}
    values = {}
    for word in said:
        name, _, value = word.partition("=")
        if name not in accepted:
            raise ValueError(f"{word!r}, accepted: name=value, the name one of {', '.join(accepted)}")
        values[name] = accepted[name](value)
    return values


def _positive(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError(f"{text}, accepted: seconds from 0 on")
    return value


def _fault(at_s: float, words: list[str]) -> Fault:
    verb = words[0] if words else ""
    if verb not in VERBS:
        raise ValueError(f"accepted after the time: {', '.join(VERBS)}")
    match words[1:]:
        case [target] if verb not in LASTING:
            return Fault(at_s, verb, target)
        case [rate, "for", seconds] if verb in RATES:
            return Fault(at_s, verb, "", float(rate), _positive(seconds))
        case [target, "for", seconds] if verb in ("freeze", "cut", "sever"):
            return Fault(at_s, verb, target, 0.0, _positive(seconds))
        case [target, "times", times, "for", seconds] if verb == "slow":
            return Fault(at_s, verb, target, float(times), _positive(seconds))
    raise ValueError(f"accepted: {VERBS[verb]}")


# Drawn from a seed.

FAULTS_FROM_S, FAULTS_TO_S = 1.5, 7.0
_WEIGHTS = {
    "kill": 8, "freeze": 4, "slow": 2, "flap": 4, "cut": 2, "lose": 1, "usurp": 2, "drop": 1, "twice": 2,
    "resize": 4, "drain": 2, "sever": 2,
}  # fmt: skip


def drawn(seed: int) -> Scenario:
    """A cluster, a load and a handful of faults."""
    rng = random.Random(f"scenario {seed}")
    experts = rng.randint(2, 4)
    shape = Shape(
        attention=rng.randint(1, 3),
        experts=experts,
        replicas=rng.choice([1, 2, 2, 2]),
        nodes=rng.choice([1, 1, 2, 3]),
        gateways=rng.randint(1, 2),
        hybrid=int(rng.random() < 0.3),
        sums=int(rng.random() < 0.5),
        microbatches=rng.choice([1, 1, 2]),
    )
    targets = _targets(shape)
    faults = [fault for _ in range(rng.randint(1, 6)) for fault in _drawn_faults(rng, shape, targets)]
    balancing = random.Random(f"balancing {seed}")
    shape = replace(shape, spare=balancing.choice([0, 0, 1, 2]))
    times = sorted(balancing.uniform(FAULTS_FROM_S, FAULTS_TO_S) for _ in range(balancing.choice([0, 1, 2])))
    faults += [Fault(round(at_s, 2), "rebalance", "experts") for at_s in times]
    return Scenario(
        seed, shape, Load(count=rng.randint(4, 9), over=6.0), tuple(sorted(faults, key=lambda f: f.at_s))
    )


def _targets(shape: Shape) -> list[str]:
    workers = [f"attention-{i}" for i in range(shape.attention)] + [f"expert-{i}" for i in range(shape.experts)]
    return [*workers, "scheduler", "controller", *(f"gateway-{i}" for i in range(shape.gateways))]


def _drawn_faults(rng: random.Random, shape: Shape, targets: list[str]) -> list[Fault]:
    verbs = {verb: w for verb, w in _WEIGHTS.items() if shape.nodes > 1 or verb not in ("cut", "lose")}
    verb = rng.choices(list(verbs), list(verbs.values()))[0]
    at_s = round(rng.uniform(FAULTS_FROM_S, FAULTS_TO_S), 2)
    for_s = round(rng.choice([rng.uniform(0.1, 1.0), rng.uniform(1.0, 6.0)]), 2)
    target = rng.choice(targets)
    if verb in ("cut", "lose"):
        target = f"node-{rng.randrange(1, shape.nodes)}"  # the first has Ray's head
    elif verb == "usurp":  # beside a worker that is slow to read what both say
        reader = Fault(round(at_s - 0.1, 2), "slow", f"attention-{rng.randrange(shape.attention)}", 4.0, 2.0)
        return [reader, Fault(at_s, verb, rng.choice(["scheduler", "scheduler", "controller"]))]
    elif verb == "resize":
        target = rng.choice([f"attention={rng.randint(1, 3)}", f"experts={rng.randint(shape.replicas, 4)}"])
    elif verb in ("drain", "sever"):
        target = rng.choice(targets[: shape.attention + shape.experts])
    elif verb in RATES:
        return [Fault(at_s, verb, "", round(rng.uniform(0.02, 0.2), 2), for_s)]
    amount = float(rng.randint(2, 10)) if verb == "slow" else 0.0
    return [Fault(at_s, verb, target, amount, for_s if verb in LASTING else 0.0)]
