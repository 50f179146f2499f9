"""Promises of an attention worker's process: what it does when nobody holds an expert, and when it is emptied."""

import asyncio

import pytest

from model.checkpoint import Checkpoint
from model.synthetic import make_checkpoint
from router.membership import HealthState
from tests.unit.attention_service_world import PATIENCE_S, World


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "tiny"
    make_checkpoint("tiny", path, seed=1)
    return Checkpoint.open(path)


async def test_sequences_are_given_back_when_experts_stay_away_and_run_unchanged_when_they_return(checkpoint):
    """Never an error: ended without a word to the gateway, nothing taken meanwhile, the same tokens later."""
    async with asyncio.timeout(PATIENCE_S), World(checkpoint, experts_wait_s=0.1) as world:
        await world.new_experts()
        world.order("r", 1)
        assert await world.gateway.ends.get() == (("r", 1), "FINISH_REASON_LENGTH")
        await world.lose_experts()
        world.order("r", 2)
        given_back = await world.report(lambda r: r.endings.handles and r.endings.handles[0] == 2)
        assert given_back.completions == [("r", 2, "FINISH_REASON_CANCELLED")]
        assert given_back.experts_missing
        world.order("r", 3)  # was under way already: it is given back at once
        given_back = await world.report(lambda r: r.endings.handles)
        assert given_back.completions == [("r", 3, "FINISH_REASON_CANCELLED")]
        assert given_back.experts_missing
        assert "waiting for experts" in world.attention.health().detail
        await world.new_experts()
        await world.report(lambda r: not r.experts_missing)
        assert world.attention.health().detail == ""
        world.order("r", 4)
        assert await world.gateway.ends.get() == (("r", 4), "FINISH_REASON_LENGTH")
        assert world.gateway.tokens.keys() == {("r", 1), ("r", 4)}
        assert world.gateway.tokens["r", 4] == world.gateway.tokens["r", 1]
        assert len(world.gateway.tokens["r", 1]) == 6


async def test_a_step_waits_for_experts_and_goes_on_where_it_was(checkpoint):
    """Within the bound nothing is given back; the scheduler hears that nothing more can be taken."""
    async with asyncio.timeout(PATIENCE_S), World(checkpoint, experts_wait_s=60.0) as world:
        await world.new_experts()
        world.order("r", 1, max_tokens=6)
        assert await world.gateway.ends.get() == (("r", 1), "FINISH_REASON_LENGTH")
        await world.lose_experts()
        world.order("s", 1, max_tokens=6)
        assert (await world.report(lambda r: r.experts_missing)).completions == []
        await world.new_experts()
        assert await world.gateway.ends.get() == (("s", 1), "FINISH_REASON_LENGTH")
        assert world.gateway.tokens["s", 1] == world.gateway.tokens["r", 1]


async def test_a_draining_worker_is_drained_once_its_last_token_has_arrived(checkpoint):
    """Not before its scheduler has said that nothing more comes, and not while a gateway may lack a token."""
    async with asyncio.timeout(PATIENCE_S), World(checkpoint) as world:
        await world.new_experts()
        world.order("r", 1)
        assert await world.gateway.ends.get() == (("r", 1), "FINISH_REASON_LENGTH")
        await world.report(lambda r: r.endings.handles)
        assert world.attention.health().state is HealthState.READY
        world.gateway.takes.clear()
        world.order("s", 1, max_tokens=1, draining=True)
        assert await world.gateway.ends.get() == (("s", 1), "FINISH_REASON_LENGTH")
        health = world.attention.health()
        assert (health.state, health.gauges["sequences_open"]) == (HealthState.DRAINING, 1)
        assert not health.is_drained
        world.gateway.takes.set()
        await world.report(lambda r: r.endings.handles)
        assert world.attention.health().is_drained
        world.scheduler.plans.put_nowait(world.plan())
        await world.report(lambda r: r.plan_number == 3)
        assert world.attention.health().state is HealthState.READY
