"""The dispatcher over a bad network: the very bits of the direct sum, or ExpertsUnavailable; nothing else."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import ExpertsUnavailable
from tests.unit.test_dispatcher import CONFIG, Stage, batch, direct

HASTY = replace(CONFIG, combine_timeout_s=0.03)
EXCHANGES = 6  # of two microbatches each
SEED_OF_A_LOSS = 0  # of one message among them all


def exchange_all(stage: Stage) -> int:
    """How many sums were right; the others could not be computed."""
    summed = 0
    for number in range(EXCHANGES):
        batches = [batch(num_tokens=1 + number % 4, seed=2 * number + half) for half in range(2)]
        pendings = []
        for rows, routes in batches:
            try:
                pendings.append(stage.dispatcher.dispatch(number % 2, rows, routes))
            except ExpertsUnavailable:
                pendings.append(None)
        for (rows, routes), pending in zip(batches, pendings, strict=True):
            try:
                if pending is not None:
                    assert torch.equal(stage.dispatcher.combine(pending), direct(number % 2, rows, routes))
                    summed += 1
            except ExpertsUnavailable:
                continue
    return summed


@pytest.mark.parametrize("kind", ["local", "shm"])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.02, 0.2]),
    duplicate=st.sampled_from([0.0, 0.5]),
    reorder=st.sampled_from([0.0, 0.5]),
    death=st.sampled_from([0.0, 0.05]),
    delay_s=st.sampled_from([0.0, 0.002, 0.05]),
)
def test_whatever_befalls_the_messages_no_sum_is_wrong(kind: str, **faults: float) -> None:
    """Rule 2 where parcels and replies are lost, doubled, late, overtaken, and workers die meanwhile."""
    line = ",".join(f"{name}={value}" for name, value in (faults | {"reorder_s": 0.004}).items())
    with ExitStack() as stack:
        stage = Stage(stack, HASTY, f"faulty:{kind}:{line}")
        stage.adopt(*[stage.expert(f"expert-{number}") for number in range(3)], replicas=2)
        summed = exchange_all(stage)
    if not (faults["loss"] or faults["death"] or faults["delay_s"]):
        assert summed  # all of them, but where a busy machine makes somebody late


def test_what_can_be_computed_is() -> None:
    """A loss with a replica left costs time, not answers; and it did happen."""
    with ExitStack() as stack:
        stage = Stage(
            stack, replace(CONFIG, combine_timeout_s=0.3), f"faulty:local:seed={SEED_OF_A_LOSS},loss=0.02"
        )
        stage.adopt(*[stage.expert(f"expert-{number}") for number in range(3)], replicas=2)
        assert exchange_all(stage) == 2 * EXCHANGES
        counters = stage.dispatcher.counters()
        assert counters["refused_deadline"] == counters["lost"] == 1


def test_duplicates_and_detours_cost_nobody_anything() -> None:
    """Nothing is lost, so nobody is given up, however the messages arrive."""
    with ExitStack() as stack:
        stage = Stage(stack, CONFIG, "faulty:shm:duplicate=0.5,reorder=0.5,reorder_s=0.002,delay_s=0.001")
        stage.adopt(*[stage.expert(f"expert-{number}") for number in range(3)], replicas=2)
        assert exchange_all(stage) == 2 * EXCHANGES
        assert stage.lost == []
        assert sum(stage.received.values()) > stage.dispatcher.counters()["parcels"]
