"""Promises of the sampler: a function of logits, parameters, tokens, seed and position, and of nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attention_workers import sampler
from attention_workers.step import Sampling
from attention_workers.token_counts import TokenCounts


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
        Sampling(min_p=0.2, seed=3),
        Sampling(min_p=0.05, top_p=0.6, temperature=1.5, seed=3),
        Sampling(min_p=1e-6, top_k=7, seed=3),
    ],
    ids=["plain", "top_k", "top_p", "both", "min_p", "min_p and top_p", "min_p and top_k"],
)
def test_frequencies_follow_the_distribution_that_the_cuts_leave(params):
    """Against a plain implementation of the same cuts."""
    row = logits(200)
    probs = torch.softmax(row.double() / params.temperature, 0).numpy()
    order = np.lexsort((np.arange(200), -row.numpy()))
    kept = order[: params.top_k or 200]
    kept = kept[probs[kept] >= params.min_p * probs.max()]
    mass = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: int(np.searchsorted(mass, params.top_p)) + 1]
    expected = np.zeros(200)
    expected[kept] = probs[kept] / probs[kept].sum()
    n = 2000
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


def counts_of(prompt, generated):
    counts = TokenCounts()
    counts.follow([*prompt, *generated], len(prompt))
    return counts


def penalised(row, params, prompt, generated):
    """Token by token, as the words of the parameters say it."""
    expected = [float(x) for x in row]
    for token in {*prompt, *generated}:
        x = expected[token]
        x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        count = generated.count(token)
        expected[token] = x - params.frequency_penalty * count - params.presence_penalty * (count > 0)
    return expected


@pytest.mark.parametrize(
    "params",
    [
        Sampling(repetition_penalty=1.3),
        Sampling(frequency_penalty=0.7),
        Sampling(presence_penalty=-1.5),
        Sampling(repetition_penalty=0.8, frequency_penalty=-0.3, presence_penalty=0.9),
    ],
    ids=["repetition", "frequency", "presence", "all"],
)
def test_penalties_are_what_their_names_say(params):
    """Repetition over the prompt too; frequency and presence over what was generated."""
    row, prompt, generated = logits(100), [1, 2, 3, 3, 60], [3, 4, 4, 4, 99]
    shaped = sampler.shaped(row, params, (), counts_of(prompt, generated))
    assert shaped.tolist() == pytest.approx(penalised(row, params, prompt, generated), abs=1e-12)


def test_counts_do_not_depend_on_how_the_tokens_came():
    """One at a time, or all at once after a resume: the same bits."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, 500).tolist()
    bit_by_bit = TokenCounts()
    for length in range(120, 501):
        bit_by_bit.follow(tokens[:length], 100)
    at_once = counts_of(tokens[:100], tokens[100:])
    params = Sampling(repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.2)
    shaped = [sampler.shaped(logits(300), params, (), counts) for counts in (bit_by_bit, at_once)]
    assert torch.equal(*shaped)
    assert dict(zip(at_once.ids.tolist(), at_once.generated.tolist(), strict=True)) == {
        token: tokens[100:].count(token) for token in tokens
    }


def test_without_bias_or_penalty_logits_stay_as_they_are():
    row = logits()
    assert sampler.shaped(row, Sampling(), (), counts_of([1], [2])) is row


CUTS = [Sampling(seed=4), Sampling(temperature=0.0), Sampling(top_k=900, top_p=0.999), Sampling(min_p=1e-9)]


@pytest.mark.parametrize("params", CUTS)
def test_nothing_but_what_is_allowed_is_sampled_and_its_odds_stay(params):
    """As if the vocabulary had no other token."""
    row, allowed = logits(), (5, 17, 400, 999)
    shaped = sampler.shaped(row, replace(params, allowed_token_ids=allowed), (), TokenCounts())
    narrow = row[list(allowed)].double()
    for position in range(100):
        expected = allowed[sampler.sample(narrow, position, params)]
        drawn = sampler.sample(shaped, position, params)
        assert drawn in allowed
        if params.temperature == 0.0 or not (params.top_k or params.min_p):
            assert drawn == expected


def test_rules_apply_together_and_what_would_complete_a_bad_word_gives_way_last():
    row, bad_words = logits(), ((5,), (1, 17))
    params = Sampling(0.0, allowed_token_ids=(5, 17, 400), bad_words=bad_words, logit_bias=((400, -100.0),))
    left = [(), (400,), (5, 17), (5, 17, 400)]
    taken = [sampler.sample(sampler.shaped(row, params, (), TokenCounts(), bad), 0, params) for bad in left]
    best = 5 if row[5] >= row[17] else 17
    assert taken == [best, best, 400, best]
    ruled = sampler.shaped(row, params, [5], TokenCounts(), (17, 400))
    assert sampler.sample(ruled, 0, params) == 17
    assert torch.isneginf(ruled).sum() == 998


def test_a_prompts_scores_are_logprobs_ranks_and_the_likeliest():
    rows = torch.stack([logits(333, s) for s in range(5)])
    tokens = [0, 5, int(rows[2].argmax()), 7, 332]
    found = sampler.prompt_logprobs(rows, tokens, 3)
    for row, token, score, sampled in zip(
        rows, tokens, found, sampler.logprobs(rows, tokens, [3] * 5), strict=True
    ):
        assert (score.logprob, score.top) == (sampled.sampled, sampled.top)
        assert score.rank == row.argsort(descending=True).tolist().index(token) + 1
    assert found[2].rank == 1
    assert sampler.prompt_logprobs(rows[3:4], [7], 0)[0][:2] == found[3][:2]


@pytest.mark.parametrize("params", [Sampling(seed=4), Sampling(temperature=0.0), Sampling(top_k=900, top_p=0.999)])
def test_a_token_ruled_out_is_never_sampled_and_a_bias_of_100_decides(params):
    row = logits()
    likeliest = row.argsort(descending=True)[:990].tolist()
    shaped = sampler.shaped(row, params, likeliest, TokenCounts())
    assert not {sampler.sample(shaped, p, params) for p in range(100)} & set(likeliest)
    biased = Sampling(logit_bias=((17, 100.0), (3, 50.0)))
    shaped = sampler.shaped(row, biased, (), TokenCounts())
    assert {sampler.sample(shaped, p, params) for p in range(100)} == {17}
    assert shaped[3] == row[3].double() + 50.0


@pytest.mark.parametrize("count", [1, 3, 500, 999])
def test_a_grammar_rules_out_the_rest_and_changes_no_odds(count):
    """The same token as where what is ruled out was weighed too, and gave nothing."""
    row, allowed = logits(), np.zeros(1000, np.bool_)
    allowed[np.random.default_rng(count).permutation(1000)[:count]] = True
    for params in (Sampling(seed=3), Sampling(temperature=0.0), Sampling(top_k=40, top_p=0.9, seed=3)):
        shaped = sampler.shaped(row, params, (), TokenCounts(), by_grammar=allowed)
        low = torch.where(torch.from_numpy(allowed), row, -3e38)  # float32: weighed, to nothing
        for position in range(30):
            taken = sampler.sample(shaped, position, params)
            assert allowed[taken]
            if params.top_k == 0:
                assert taken == sampler.sample(low, position, params)


def test_where_other_rules_leave_nothing_of_a_grammar_it_alone_holds():
    row, allowed = logits(), np.zeros(1000, np.bool_)
    allowed[[4, 9]] = True
    params = Sampling(allowed_token_ids=(4, 5))
    assert sampler.sample(sampler.shaped(row, params, (), TokenCounts(), by_grammar=allowed), 0, params) == 4
    shaped = sampler.shaped(row, params, [4], TokenCounts(), by_grammar=allowed)
    assert np.flatnonzero(np.isfinite(shaped.numpy())).tolist() == [4, 9]
