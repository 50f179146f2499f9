"""Random histories of gateways, workers and schedulers that come, go, freeze and lose messages.

While they last nothing forbidden happens (the world asserts it at every move). When all is healed every
sequence ends exactly once and nothing is held anywhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import Command, WorkerLimits
from cluster.scheduler.prefixes import hints_of
from tests.unit.scheduler_peers import submission
from tests.unit.scheduler_world import World

LIMITS = WorkerLimits(block_tokens=4, blocks_total=24, sequences_max=5, model_len_max=80, prefix_cache=True)
HYBRID = replace(LIMITS, sliding_blocks_total=7, sliding_window=6)
HINTS = [*hints_of(submission("any", 48), 4), 0, 2**64 - 1]  # of the prompts here, and of none
CONFIG = SchedulerConfig(
    queued_requests_max=6, queued_tokens_max=400, gateway_lease_s=1.0, recovery_deadline_s=30.0
)


def random_move(world: World) -> None:
    rng = world.rng
    worker = rng.choice(list(world.workers.values()))
    gateway = rng.choice(list(world.gateways.values()))
    move = rng.random()
    if move < 0.07:
        n, num_prompt = rng.choice([1, 1, 1, 3]), rng.randrange(1, 50)
        world.submit(n, num_prompt, rng.randrange(1, 40), rng.choice([0, 0, 1]), rng.choice(["", "a", "b"]))
    elif move < 0.08:
        world.give_up(whole_request=rng.random() < 0.5)
    elif move < 0.55:
        if rng.random() < 0.3:  # hints may be wrong: then they cost time, and nothing else
            worker.tell(rng.choice(["kept", "evicted"]), rng.choice(HINTS))
        world.work(worker)
    elif move < 0.75:
        world.deliver(worker, rng.randrange(4))
        world.deliver(gateway, rng.randrange(8))
    elif move < 0.88:
        world.turn()
    elif move < 0.95:
        world.link(worker)
        world.link(gateway)
    elif move < 0.97:
        world.unlink(rng.choice([worker, gateway]).incarnation)
    elif move < 0.978:
        world.start_worker(worker.incarnation.id)
    elif move < 0.982:
        world.start_gateway(gateway.incarnation.id)
    elif move < 0.990:
        world.turn(elapsed_s=rng.choice([0.5, 3.0]))
    elif move < 0.995:
        world.restart_scheduler()


def run(seed: int, num_moves: int) -> World:
    """Every third with workers that have sliding layers, whose blocks run out first."""
    world = World(seed, CONFIG, HYBRID if seed % 3 == 0 else LIMITS)
    for name in ("attention-0", "attention-1", "attention-2"):
        world.start_worker(name)
    for name in ("gateway-0", "gateway-1"):
        world.start_gateway(name)
    for peer in [*world.workers.values(), *world.gateways.values()]:
        world.link(peer)
    for _ in range(num_moves):
        random_move(world)
        fresh = {
            entry.submission.request_id for entry in world.scheduler._books.queue if not entry.submission.resume
        }
        # What an earlier term had admitted in full may enter again in part, beyond the bound.
        assert len(fresh) <= CONFIG.queued_requests_max + len(world.workers) * LIMITS.sequences_max
    return world


def assert_all_has_ended(world: World) -> None:
    """When all is healed every sequence has ended once, and nothing is held."""
    world.heal(turns_max=2000)
    for _ in range(3):  # the last reports, and the stops they cause
        world.heal(turns_max=50)
    gauges = world.scheduler.snapshot()
    assert (gauges["requests"], gauges["waiting"], gauges["running"]) == (0, 0, 0)
    for name, worker in world.workers.items():
        limits = worker.limits
        assert worker.free == (limits.blocks_total, limits.sliding_blocks_total)
        for space in ("blocks", "sliding_blocks"):
            assert gauges[f"worker/{name}/{space}_free"] == gauges[f"worker/{name}/{space}_total"]
    ends = [end for g in world.gateways.values() for r in g.requests.values() for end in r.ends.values()]
    assert set(ends) <= {"STOP", "LENGTH", "given up", "OVERLOADED", "TOO_LARGE", "NOT_READY"}


@pytest.mark.parametrize("seed", range(30))
def test_when_all_is_healed_every_sequence_has_ended_once_and_nothing_is_held(seed: int) -> None:
    """Nothing is lost, run twice, or kept for ever, whatever broke on the way. `make soak` tries 10,000 more."""
    assert_all_has_ended(run(seed, num_moves=600))


def test_the_histories_are_eventful() -> None:
    """Else the test above would promise little."""
    counters: Counter[str] = Counter()
    for seed in range(60):
        counters.update(run(seed, num_moves=600).scheduler.counters)
    wanted = {"adopted", "clock_gaps", "ended_finished", "ended_gateway_lost", "ended_preempted"}
    wanted |= {"ended_worker_lost", "ignored_completions", "refused_overloaded", "stopped", "workers_lost"}
    assert wanted <= counters.keys()


def test_the_same_history_gives_the_same_commands() -> None:
    """Decisions are pure: no clock, chance or set order inside."""
    first: list[Command] = run(7, num_moves=300).log
    assert first
    assert run(7, num_moves=300).log == first
