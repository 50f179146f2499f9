"""Promises of the sampler: a function of logits, parameters, seed and position, and of nothing else."""

import numpy as np
import pytest
import torch

from attention_workers import sampler
from attention_workers.step import Sampling


def logits(size=1000, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_takes_the_first_of_the_highest():
    row = torch.zeros(50)
    row[[7, 31]] = 2.0
    assert sampler.sample(row, 0, Sampling(temperature=0.0)) == 7


def test_same_seed_and_position_give_the_same_token_and_others_vary():
    row = logits()
    params = Sampling(temperature=1.0, seed=5)
    drawn = [sampler.sample(row, p, params) for p in range(40)]
    assert drawn == [sampler.sample(row, p, params) for p in range(40)]
    assert len(set(drawn)) > 5
    assert drawn != [sampler.sample(row, p, Sampling(seed=6)) for p in range(40)]


def test_seed_and_position_do_not_trade_places():
    """(seed 1, position 2) is not (seed 2, position 1)."""
    grid = {(s, p): sampler.uniform(s, p) for s in range(20) for p in range(20)}
    assert len(set(grid.values())) == len(grid)


@pytest.mark.parametrize(
    "params",
    [
        Sampling(seed=3),
        Sampling(top_k=20, seed=3),
        Sampling(top_p=0.7, seed=3),
        Sampling(top_k=50, top_p=0.5, seed=3),
    ],
    ids=["plain", "top_k", "top_p", "both"],
)
def test_frequencies_follow_the_distribution_that_the_cuts_leave(params):
    """Against a plain implementation of the same cuts."""
    row = logits(200)
    probs = torch.softmax(row.double(), 0).numpy()
    order = np.lexsort((np.arange(200), -row.numpy()))
    kept = order[: params.top_k or 200]
    mass = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: int(np.searchsorted(mass, params.top_p)) + 1]
    expected = np.zeros(200)
    expected[kept] = probs[kept] / probs[kept].sum()
    n = 4000
    counts = np.bincount([sampler.sample(row, p, params) for p in range(n)], minlength=200)
    assert not counts[expected == 0].any()
    assert np.abs(counts / n - expected).max() < 4 * np.sqrt(0.25 / n)


def test_top_p_looks_beyond_its_first_candidates_when_the_mass_is_spread():
    """A flat distribution over a large vocabulary keeps nearly all of it."""
    row = torch.zeros(4 * sampler._PREFIX)
    drawn = {sampler.sample(row, p, Sampling(top_p=0.99, seed=1)) for p in range(300)}
    assert max(drawn) > sampler._PREFIX


def test_likeliest_breaks_ties_by_the_lower_id():
    row = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    ids, values = sampler.likeliest(row, 4)
    assert ids.tolist() == [1, 3, 2, 4]
    assert values.tolist() == [3.0, 3.0, 2.0, 2.0]


def test_logprobs_are_those_of_the_raw_distribution_and_do_not_depend_on_company():
    rows = torch.stack([logits(333, s) for s in range(9)])
    tokens, counts = [5] * 9, [None, 0, 3, 3, 3, 3, 3, 3, 3]
    found = sampler.logprobs(rows, tokens, counts)
    assert found[0] is None
    assert found[1].top == ()
    expected = torch.log_softmax(rows[4].double(), 0)
    assert found[4].sampled == pytest.approx(float(expected[5]), abs=1e-5)
    assert [t for t, _ in found[4].top] == expected.topk(3).indices.tolist()
    assert sampler.logprobs(rows[4:5], [5], [3]) == [found[4]]
