"""A scenario from its beginning until everything has come to rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.sim.attention import AttentionShell
from cluster.sim.checks import Checks
from cluster.sim.clients import Clients
from cluster.sim.cluster import Cluster, Shell
from cluster.sim.faults import Faults
from cluster.sim.gateways import GatewayShell
from cluster.sim.scenario import Scenario
from cluster.sim.world import Broken, World

REST_S_MAX = 60.0
"""From the healing on, within which everything has to come to rest."""


@dataclass(frozen=True)
class Outcome:
    """Of one scenario. Times are virtual but `took_s`."""

    scenario: Scenario
    broken: str  # which promise, and when; empty: all were kept
    events: int
    rest_s: float  # from the healing until everything had come to rest
    requests: int
    tokens: int  # sampled by all workers
    lost: int  # lives that the controller gave up
    restarts: int  # of deciders and gateways
    worst_gap_s: float  # between two tokens of one answer
    took_s: float


def run(scenario: Scenario, tells: Callable[[str], None] = lambda _line: None) -> Outcome:
    began_s = time.perf_counter()
    torch.set_num_threads(1)
    world = World(scenario.seed, tells)
    cluster = Cluster(world, scenario.shape)
    clients = Clients(world, scenario.load, cluster.gateways)
    checks = Checks(cluster, clients)
    Faults(cluster, scenario)

    def turned(shell: Shell) -> None:
        checks.touch(shell)
        if isinstance(shell, GatewayShell):
            clients.look(shell)

    cluster.on_turn, cluster.on_command, cluster.on_gateway_end = turned, checks.commanded, clients.gateway_died
    world.after_event = checks.look
    broken = ""
    try:
        cluster.start()
        world.run(scenario.heal_s)
        if not world.run(scenario.heal_s + REST_S_MAX, lambda: not clients.num_open and not checks.unrest()):
            raise Broken(world.now_s, f"no rest {REST_S_MAX:g} s after the healing: {checks.unrest()}")
    except Broken as error:
        broken = str(error)
    world.tell(broken or "everything has come to rest")
    shells = cluster.shells.values()
    return Outcome(
        scenario=scenario,
        broken=broken,
        events=world.num_events,
        rest_s=max(0.0, world.now_s - scenario.heal_s),
        requests=len(clients.clients),
        tokens=sum(shell.tokens for shell in shells if isinstance(shell, AttentionShell)),
        lost=cluster.counts["lost"],
        restarts=cluster.counts["restarts"],
        worst_gap_s=max((client.worst_gap_s for client in clients.clients), default=0.0),
        took_s=time.perf_counter() - began_s,
    )
