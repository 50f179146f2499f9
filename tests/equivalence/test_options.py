"""Rule 2 for what a request asks of its own: alone, in company, after pauses and losses it gets the same bits."""

import dataclasses
import random

import pytest
import torch

from attention_workers.step import Sampling, StepResult
from model.checkpoint import Checkpoint
from model.synthetic import Variant, make_checkpoint
from tests.equivalence.local_cluster import LocalCluster, request

PROMPT = [7 * i % 400 + 20 for i in range(150)]
SEED = -1 % 2**64
RULES = {
    "allowed": {"allowed_token_ids": tuple(range(3, 400, 7))},
    "bad words": {"bad_words": (*((token,) for token in range(50, 250)), (20, 21), (300, 301))},
    "greedy bad words": {"temperature": 0.0, "bad_words": tuple((token,) for token in range(20, 400, 2))},
    "bias": {"logit_bias": tuple((token, 3.0 - token % 7) for token in range(60))},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.3},
    "min_p": {"min_p": 0.02, "top_k": 100, "temperature": 1.4},
    "all": {"allowed_token_ids": tuple(range(2, 500, 3)), "bad_words": ((5,), (8, 8)), "logit_bias": ((8, 4.0),),
            "frequency_penalty": 0.2, "top_p": 0.9, "min_p": 0.001},
}  # fmt: skip


@pytest.fixture(scope="module", params=["full", "hybrid"])
def checkpoint(request, tmp_path_factory):
    """All full layers; or four layers, two of them with a window of 24 tokens, head norms and sinks."""
    path = tmp_path_factory.mktemp("options") / request.param
    variant = Variant(layers=4, hybrid=True, qk_norm="per_head", sinks=True)
    make_checkpoint("tiny", path, seed=5, **({"variant": variant} if request.param == "hybrid" else {}))
    return Checkpoint.open(path)


def ruled(name, **kw):
    """A request for each of the rules, with a least number of tokens before its stop tokens."""
    start = request(name, PROMPT[:40], max_tokens=16, **kw)
    sampling = Sampling(**({"temperature": 1.0, "seed": SEED} | RULES[name]))
    return dataclasses.replace(start, sampling=sampling, min_tokens=9, stop_token_ids=frozenset(range(0, 500, 5)))


def scoring(prompt=PROMPT, *, top=2, score_from=1, **kw):
    start = request("me", prompt, **({"temperature": 1.0, "seed": SEED, "max_tokens": 12} | kw))
    return dataclasses.replace(start, num_prompt_logprobs=top, score_from=score_from)


def crowd(count, seed):
    rng = random.Random(seed)
    return [
        request(f"s{i}", [rng.randrange(20, 400) for _ in range(rng.randint(1, 90))], temperature=1.0, seed=i,
                max_tokens=rng.randint(2, 30), num_logprobs=rng.choice([None, 0, 4]), arrival=i)
        for i in range(count)
    ]  # fmt: skip


# --- rules -----------------------------------------------------------------------------------------


def test_a_rule_is_a_matter_of_its_own_request(checkpoint):
    """All rules in one batch among others, then resumed by another worker: as each alone."""
    with LocalCluster(checkpoint) as cluster:
        alone = {name: cluster.run([ruled(name)])[name] for name in RULES}
    with LocalCluster(checkpoint, attention=2, experts=2, microbatches=2) as cluster:
        result = cluster.order(0, [ruled(name) for name in RULES] + crowd(6, 1), chunk_tokens=32)
        for _ in range(9):
            cluster.workers[0].step(result)
        accepted = {name: [] for name in RULES}
        for delta in result.deltas["gw"]:
            if delta.attempt.request_id in RULES:
                accepted[delta.attempt.request_id] += delta.tokens
        ended = {delta.attempt.request_id for delta in result.deltas["gw"] if delta.finish}
        cluster.workers[0].book.drop("gw", StepResult())
        again = [ruled(name, accepted=tuple(accepted[name]), number=2) for name in RULES if name not in ended]
        resumed = cluster.order(1, crowd(3, 2) + again)
        while cluster.workers[1].book.sequences:
            cluster.workers[1].step(resumed)
    for name, answer in alone.items():
        rest = [t for d in resumed.deltas["gw"] if d.attempt.request_id == name for t in d.tokens]
        assert [*accepted[name], *rest] == answer.tokens, name
        assert len(answer.tokens) >= 10
    assert again
    assert all(accepted.values())


def test_a_rule_holds_in_every_answer(checkpoint):
    with LocalCluster(checkpoint) as cluster:
        answers = cluster.run([ruled(name) for name in RULES])
    for name, answer in answers.items():
        rules = Sampling(**RULES[name])
        assert not rules.allowed_token_ids or set(answer.tokens) <= set(rules.allowed_token_ids)
        for word in rules.bad_words:
            n = len(word)
            assert word not in [tuple(answer.tokens[i : i + n]) for i in range(len(answer.tokens))]
        assert not {token for token in answer.tokens[:9] if token % 5 == 0}


# --- logprobs of the prompt ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(checkpoint):
    with LocalCluster(checkpoint, prefix_cache=False) as cluster:
        return cluster.run([scoring()])["me"]


def test_a_prompt_is_scored_as_it_was_generated(checkpoint, alone):
    """An answer sent back as part of the prompt has the logprobs it was given, bit for bit."""
    assert len(alone.scores) == len(PROMPT) - 1
    with LocalCluster(checkpoint) as cluster:
        again = cluster.run([scoring([*PROMPT, *alone.tokens], top=3)])["me"].scores
    assert [score.logprob for score in again[: len(PROMPT) - 1]] == [score.logprob for score in alone.scores]
    generated = again[len(PROMPT) - 1 :]
    assert [(s.logprob, s.top) for s in generated] == [(p.sampled, p.top) for p in alone.logprobs]


@pytest.mark.parametrize("chunk", [5, 31, 32, 64, 256])
def test_scores_do_not_depend_on_company_chunks_or_what_is_cached(checkpoint, alone, chunk):
    """The prompt lies cached, whole: it is computed all the same, for its logits."""
    with LocalCluster(checkpoint, experts=2, microbatches=2) as cluster:
        cluster.run([request("before", PROMPT, max_tokens=2)])
        before = cluster.workers[0].book.prefixes.num_hit_tokens
        answers = cluster.run([*crowd(5, chunk), scoring()], chunk_tokens=chunk, step_tokens=300)
        assert answers["me"] == alone
        assert cluster.workers[0].book.prefixes.num_hit_tokens == before
        after = cluster.run([request("after", PROMPT, temperature=1.0, seed=SEED, max_tokens=12)])["after"]
        assert after.tokens == alone.tokens  # what it computed is cached for others
        assert cluster.workers[0].book.prefixes.num_hit_tokens == before + 128


def test_scores_come_once_whatever_pauses_the_sequence(checkpoint, alone):
    """A pool that an urgent request empties while the prompt is scored: what has come does not come again."""
    with LocalCluster(checkpoint, blocks=8, sliding_blocks=8) as cluster:
        results = [cluster.order(0, [scoring(arrival=9)], chunk_tokens=40)]
        for _ in range(2):
            cluster.workers[0].step(results[0])
        urgent = request("urgent", [9 * i % 300 + 50 for i in range(170)], max_tokens=20)
        results.append(cluster.order(0, [dataclasses.replace(urgent, priority=-1)], chunk_tokens=40))
        paused = []
        while cluster.workers[0].book.sequences:
            cluster.workers[0].step(result := StepResult())
            cluster.workers[0].book.check()
            paused += result.paused
            results.append(result)
        assert [attempt.request_id for attempt in paused] == ["me"]
        assert cluster.finish(*results)["me"] == alone


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_another_worker_goes_on_scoring_where_one_was_lost(checkpoint, alone, steps):
    """From the first token whose logprobs the gateway lacks; what lies before that may be read from the cache."""
    with LocalCluster(checkpoint, attention=2) as cluster:
        cluster.run([request("before", PROMPT, max_tokens=2)], worker=1)
        result = cluster.order(0, [scoring()], chunk_tokens=40)
        for _ in range(steps):
            cluster.workers[0].step(result)
        scores = [score for delta in result.deltas["gw"] for score in delta.prompt_logprobs]
        accepted = tuple(token for delta in result.deltas["gw"] for token in delta.tokens)
        cluster.workers[0].book.drop("gw", StepResult())
        score_from = len(scores) + 1 if len(scores) < len(PROMPT) - 1 else 0
        again = scoring(score_from=score_from, accepted=accepted, number=2)
        resumed = cluster.order(1, [again], chunk_tokens=40)
        while cluster.workers[1].book.sequences:
            cluster.workers[1].step(resumed)
        cached = cluster.workers[1].book.prefixes.num_hit_tokens
    assert [*scores, *(s for d in resumed.deltas["gw"] for s in d.prompt_logprobs)] == alone.scores
    assert [*accepted, *(t for d in resumed.deltas["gw"] for t in d.tokens)] == alone.tokens
    assert cached == {1: 32, 3: 96, 6: 128}[steps]


def test_logits_that_are_not_finite_fail_a_scored_sequence_and_no_other(checkpoint):
    with LocalCluster(checkpoint) as cluster:
        model, score = cluster.workers[0].model, cluster.workers[0].model.unembed_rows
        model.unembed_rows = lambda *rows: score(*rows).fill_(torch.nan)
        result = cluster.order(0, [scoring(), request("other", PROMPT[:9], max_tokens=2)])
        while cluster.workers[0].book.sequences:
            cluster.workers[0].step(result)
    details = {d.attempt.request_id: d.detail for d in result.deltas["gw"] if d.finish}
    assert details == {"me": "the model's logits are not finite", "other": ""}
