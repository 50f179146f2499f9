"""Pools through random histories, decided as the controller decides: what holds after each event, whatever it was.

Workers join, leave, drain, die and come back, pools are resized, hosts come and go, load is skewed and rebalanced.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest

from cluster.balancer.balancer import Balancer
from cluster.balancer.config import BalancerConfig
from cluster.balancer.table import even_slots
from cluster.epochs import Epochs, ModelShape
from router.membership import ExpertLoad
from router.placement import Member, Placement


@dataclass(frozen=True)
class Home:
    address: str
    node: str


class Pool:
    """Expert workers, and the placements that follow from who is there."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.layers, self.experts = rng.randint(1, 3), rng.randint(2, 9)
        self.hosts, self.replicas = rng.randint(1, 3), rng.randint(1, 3)
        self.config = BalancerConfig(spare_slots=rng.choice([0, 0, 1, 3]), moves_max=rng.choice([1, 4, 64]))
        shape = ModelShape("f00d", self.layers, self.experts)
        self.epochs = Epochs(1, shape, Balancer(self.config, self.layers, self.experts, self.replicas))
        self.here: dict[Member, Home] = {}
        self.load = np.zeros((self.layers, self.experts))
        self.counted: dict[Member, np.ndarray] = {}
        self.now_s = 0.0
        self.lives: Counter[str] = Counter()
        for number in range(rng.randint(self.replicas, 5)):
            self.join(f"expert-{number}")

    @property
    def wanted(self) -> int:
        """Holders that each expert should have."""
        return min(self.replicas, len(self.here))

    @property
    def slots(self) -> int:
        return even_slots(self.layers, self.experts, self.wanted, len(self.here), self.config.spare_slots)

    def join(self, name: str) -> None:
        self.lives[name] += 1
        home = Home(f"@{name}", f"host-{int(name.rpartition('-')[2]) % self.hosts}")
        self.here = dict(sorted([*self.here.items(), (Member(name, self.lives[name]), home)]))

    def resize(self, size: int) -> None:
        names = {member.id for member in self.here}
        for number in range(9):
            if len(self.here) < size and f"expert-{number}" not in names:
                self.join(f"expert-{number}")
        while len(self.here) > size:
            del self.here[self.rng.choice(list(self.here))]

    def settle(self, is_complete: bool = True) -> None:
        """Propose, prepare and publish."""
        self.epochs.propose(self.here, is_complete)
        self.publish()

    def publish(self) -> None:
        if self.epochs.preparing is not None:
            assert self.epochs.publish(dict.fromkeys(self.here, self.epochs.preparing.epoch))

    def befall(self, event: str) -> None:
        """Whatever the pool's owner, or chance, does to it; decided as far as it can be at once."""
        leaver = self.rng.choice(list(self.here))
        match event:
            case "join":
                self.resize(min(len(self.here) + 1, 6))
            case "leave":
                self.resize(max(len(self.here) - 1, 1))
            case "resize":
                self.resize(self.rng.randint(1, 6))
            case "drain" if len(self.here) > 1:
                del self.here[leaver]
            case "die" | "die for good" if len(self.here) > 1:
                del self.here[leaver]
                self.settle(is_complete=False)  # the others go on, if they can
                if event == "die":
                    self.join(leaver.id)
            case "start anew":
                del self.here[leaver]
                self.join(leaver.id)

    def count(self) -> None:
        """Workers count what their experts are asked for: by Zipf's law, another order in each layer. What was
        counted long ago weighs nothing any more."""
        self.now_s += 20 * self.config.load_half_life_s
        exponent = self.rng.choice([0.0, 1.0, 2.0])
        for at in np.ndindex(self.layers, self.experts):
            self.load[at] = round(1000 / (1 + self.rng.randrange(self.experts)) ** exponent)
        placement = self.epochs.published
        first = placement.holder_table[:, :, 0]
        for index, worker in enumerate(placement.workers):
            total = self.counted.setdefault(worker.member, np.zeros_like(self.load))
            self.report(worker.member, total)
            total += np.where(first == index, self.load, 0)
            self.report(worker.member, total)

    def report(self, member: Member, total: np.ndarray) -> None:
        slots = range(total.size)
        counted = ExpertLoad(tuple(slots), tuple(total.reshape(-1).astype(int).tolist()), (0,) * total.size)
        self.epochs.balancer.hear(member, counted, self.now_s)

    def rebalance(self) -> None:
        placement = self.epochs.published
        task = self.epochs.balancer.task("f00d", self.here, placement, self.config.moves_max)
        self.epochs.rebalance(task.propose())
        self.publish()


class Before(NamedTuple):
    """What those that are here have of the placement in use, and what it lacks."""

    held: np.ndarray  # [L, E, W]
    missing: int  # holders
    lacking: int  # experts with replicas on one host that should be on several


def before(pool: Pool) -> Before:
    held = held_by(pool, pool.epochs.published)
    hosts = min(pool.wanted, len({home.node for home in pool.here.values()}))
    missing = np.maximum(pool.wanted - held.sum(axis=2), 0).sum()
    return Before(held, int(missing), int((on_hosts(pool, held) < hosts).sum()))


def held_by(pool: Pool, placement: Placement) -> np.ndarray:
    """[L, E, W]: of the workers that are here."""
    held = np.zeros((pool.layers, pool.experts, len(pool.here)), dtype=bool)
    for worker in placement.workers:
        if worker.member in pool.here:
            layers, experts = np.array(worker.experts, dtype=int).reshape(-1, 2).T
            held[layers, experts, list(pool.here).index(worker.member)] = True
    return held


def on_hosts(pool: Pool, held: np.ndarray) -> np.ndarray:
    """[L, E]: on how many hosts each expert is."""
    nodes = [home.node for home in pool.here.values()]
    return sum(held[:, :, [node == host for node in nodes]].any(axis=2).astype(int) for host in set(nodes))


def check(pool: Pool) -> np.ndarray:
    """What every placement promises. Returns it, [L, E, W]."""
    placement = pool.epochs.published
    placement.validate()  # every expert is placed, its replicas on distinct workers
    assert {worker.member for worker in placement.workers} == set(pool.here)
    held = held_by(pool, placement)
    assert held.sum(axis=(0, 1)).max() <= pool.slots
    assert held.sum(axis=2).min() >= pool.wanted
    nodes = Counter(home.node for home in pool.here.values())
    if len(nodes) == 2 or pool.wanted == 2 <= len(nodes):
        elsewhere = pool.slots * (len(pool.here) - max(nodes.values()))  # slots beside those of the largest host
        spread = (on_hosts(pool, held) >= min(pool.wanted, 2)).sum()
        assert spread >= min(pool.layers * pool.experts, elsewhere)
    return held


EVENTS = ["join", "leave", "resize", "drain", "die", "die", "die for good", "start anew", "nothing"]


@pytest.mark.parametrize("seed", range(60))
def test_any_history_keeps_experts_placed_spread_and_within_bounds(seed: int) -> None:
    rng = random.Random(seed)
    pool = Pool(rng)
    pool.settle()
    check(pool)
    for _ in range(8):
        pool.befall(rng.choice(EVENTS))
        was, members = before(pool), {worker.member for worker in pool.epochs.published.workers}
        pool.settle()
        held = check(pool)
        loads = int((held & ~was.held).sum())
        if members == set(pool.here) and not was.missing:
            assert loads == 0, "a survivor of something else"
        is_new = np.array([member not in members for member in pool.here])
        share = pool.layers * pool.experts * pool.wanted // len(pool.here)
        excess = np.maximum(was.held.sum(axis=(0, 1)) - pool.slots, 0).sum()
        must = max(share * is_new.sum(), excess) + is_new.sum()  # shares are whole
        assert loads <= must + 2 * (was.missing + was.lacking)  # one may have to make way for another
        if pool.hosts == 1:
            assert held.sum(axis=(0, 1))[is_new].min(initial=share) >= share // 2
        if rng.random() < 0.2:
            pool.count()
            pool.rebalance()
            assert int((check(pool) & ~held).sum()) <= pool.config.moves_max
