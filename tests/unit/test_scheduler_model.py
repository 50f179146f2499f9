"""Ten thousand short random histories of the scheduler, each against a naive model that shares no code with it.

Every turn ends with the two compared (`scheduler_model.py`). `make soak` tries as many long ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import Event, Incarnation, Tick, WorkerJoined, WorkerLimits, WorkerReported
from tests.unit.scheduler_peers import MODEL
from tests.unit.scheduler_world import World

PARTS, STORIES = 8, 1250
LIMITS = WorkerLimits(block_tokens=4, blocks_total=14, sequences_max=3, model_len_max=60, prefix_cache=True)
HYBRID = replace(LIMITS, sliding_blocks_total=7, sliding_window=6)
CONFIG = SchedulerConfig(
    queued_requests_max=4,
    queued_tokens_max=100,
    gateway_lease_s=0.4,
    recovery_deadline_s=2.0,
    preempt_after_s=0.1,
    chunk_tokens_max=64,
)


def ask(world: World) -> None:
    rng = world.rng
    for _ in range(rng.randrange(1, 4)):
        world.submit(
            rng.choice([1, 1, 2]), rng.randrange(1, 30), rng.randrange(1, 10), rng.choice([0, 1, 5]),
            rng.choice("abc"), rng.choice([0.0, 0.0, 0.3, 2.0]),
        )  # fmt: skip


def go_on(world: World) -> None:
    """Orders arrive, workers compute, the scheduler turns."""
    for peer in [*world.workers.values(), *world.gateways.values()]:
        world.deliver(peer, 9)
    for worker in world.workers.values():
        for _ in range(world.rng.randrange(4)):
            world.work(worker)
    world.turn(world.rng.choice([0.05, 0.05, 0.2]))


def give_up(world: World) -> None:
    world.give_up(whole_request=world.rng.random() < 0.5)


def drain(world: World) -> None:
    name = world.rng.choice(sorted(world.workers))
    world.draining ^= {name}
    world.tell_members()


def replace_worker(world: World) -> None:
    world.start_worker(world.rng.choice(sorted(world.workers)))
    link(world)


def break_links(world: World) -> None:
    peers = [*world.workers.values(), *world.gateways.values()]
    world.unlink(world.rng.choice(peers).incarnation)


def link(world: World) -> None:
    peers = [*world.workers.values(), *world.gateways.values()]
    for peer in world.rng.sample(peers, len(peers)):
        world.link(peer)


def restart_scheduler(world: World) -> None:
    """Some are back before others: gateways may claim what no worker has shown yet."""
    world.restart_scheduler()
    for peer in [*world.workers.values(), *world.gateways.values()]:
        if world.rng.random() < 0.6:
            world.link(peer)
    world.turn()
    go_on(world)
    link(world)


def restart_gateway(world: World) -> None:
    world.start_gateway("gateway-0")
    link(world)


def repeat(world: World) -> None:
    """A report comes late, twice, or of a life that is over; or that life joins again."""
    stale = Incarnation(world.rng.choice(sorted(world.workers)), 0)
    if world.rng.random() < 0.2:
        worker = world.workers[stale.id]
        report = WorkerReported(stale, 0, 0, 0, worker.limits.blocks_total, 0, 0, state=worker.state())
        world.inbox.append(WorkerJoined(stale, MODEL, worker.limits, report))
        return
    said: list[Event] = [e for e in world.said if not isinstance(e, WorkerReported) or e.state is None]
    if said:
        event = world.rng.choice(said)
        if isinstance(event, WorkerReported) and world.rng.random() < 0.5:
            event = replace(event, worker=stale)
        world.inbox.append(event)


def be_silent(world: World) -> None:
    world.turn(world.rng.choice([0.9, 1.5, 3.0]))


def insult(world: World) -> None:
    """What is illegal raises, and changes nothing."""
    scheduler, now_s = world.scheduler, world.now_s
    before = scheduler.snapshot()
    for event, at_s, error in ((object(), now_s, TypeError), (Tick(), now_s - 0.01, ValueError)):
        with pytest.raises(error):
            scheduler.step(event, at_s)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is before"):
        scheduler.round(now_s - 0.01)
    assert scheduler.snapshot() == before


MOVES = {
    go_on: 40, ask: 25, give_up: 4, drain: 5, replace_worker: 3, break_links: 4, link: 5, restart_scheduler: 3,
    restart_gateway: 1, repeat: 5, be_silent: 3, insult: 2,
}  # fmt: skip


def history(seed: int, num_moves: int) -> World:
    """Every third with workers that have sliding layers."""
    world = World(seed, CONFIG, HYBRID if seed % 3 == 0 else LIMITS)
    for name in ("attention-0", "attention-1"):
        world.start_worker(name)
    world.start_gateway("gateway-0")
    link(world)
    for _ in range(2):
        go_on(world)
    for move in world.rng.choices(list(MOVES), list(MOVES.values()), k=num_moves):
        move(world)
    go_on(world)
    return world


def assert_all_ends(world: World) -> None:
    """Once nothing breaks any more every sequence ends, once, and nothing is held anywhere."""
    world.draining.clear()
    world.tell_members()
    for _ in range(3):  # the last reports, and the stops they cause
        world.heal(turns_max=500)
    gauges = world.scheduler.snapshot()
    assert (gauges["requests"], gauges["waiting"], gauges["running"]) == (0, 0, 0)
    for worker in world.workers.values():
        assert worker.free == (worker.limits.blocks_total, worker.limits.sliding_blocks_total)
    ends = [end for g in world.gateways.values() for r in g.requests.values() for end in r.ends.values()]
    assert set(ends) <= {"STOP", "LENGTH", "given up", "DEADLINE", "OVERLOADED", "TOO_LARGE", "NOT_READY"}


@pytest.mark.parametrize("part", range(PARTS))
def test_the_scheduler_does_what_a_naive_model_says(part: int) -> None:
    """Nothing lost, nothing run twice, blocks conserved, every bound held: after every turn of every history."""
    for seed in range(part * STORIES, (part + 1) * STORIES):
        try:
            world = history(seed, num_moves=8)
            if seed % 10 == 0:
                assert_all_ends(world)
        except BaseException as error:
            error.add_note(f"history({seed}, num_moves=8)")
            raise


def test_the_histories_are_eventful() -> None:
    """Else the test above would promise little."""
    counters: Counter[str] = Counter()
    for seed in range(400):
        counters.update(history(seed, num_moves=16).scheduler.counters)
    wanted = {"adopted", "clock_gaps", "ended_finished", "ended_preempted", "ended_deadline", "preempted", "moved"}
    wanted |= {"ended_worker_lost", "ignored_completions", "refused_overloaded", "stopped", "workers_lost"}
    wanted |= {"ignored_unknown_worker", "ended_cancelled", "ended_finished_by_gateway"}
    assert wanted <= counters.keys()
