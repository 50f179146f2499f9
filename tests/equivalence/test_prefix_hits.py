"""Rule 2 with a prefix cache: what is found gives the same bits, in tokens and logprobs, as computing it."""

import dataclasses
import random

import pytest
import torch

from attention_workers.step import AttemptId, StepResult
from model.checkpoint import Checkpoint
from model.synthetic import Variant, make_checkpoint
from tests.equivalence.local_cluster import LocalCluster, request

PROMPT = [7 * i % 400 + 20 for i in range(150)]
SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 1234, "max_tokens": 24}


@pytest.fixture(scope="module", params=["full", "hybrid"])
def checkpoint(request, tmp_path_factory):
    """All full layers; or four layers, two of them with a window of 24 tokens, head norms and sinks."""
    path = tmp_path_factory.mktemp("prefix") / request.param
    variant = Variant(layers=4, hybrid=True, qk_norm="per_head", sinks=True)
    make_checkpoint("tiny", path, seed=3, **({"variant": variant} if request.param == "hybrid" else {}))
    return Checkpoint.open(path)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


def me(prompt=PROMPT, **kw):
    return request("me", prompt, **(SAMPLED | kw))


@pytest.fixture(scope="module")
def alone(checkpoint, dtype):
    """With nothing cached and nothing to find."""
    with LocalCluster(checkpoint, dtype=dtype, prefix_cache=False) as cluster:
        return cluster.run([me()])["me"]


@pytest.mark.parametrize("shared", [150, 149, 128, 97, 33, 31])
def test_a_hit_leaves_no_trace(checkpoint, dtype, alone, shared):
    """Wherever the two part, with the first one's prompt in chunks of 48 and the second's in one."""
    other = [*PROMPT[:shared], *(9 * i % 300 + 50 for i in range(30))]
    with LocalCluster(checkpoint, dtype=dtype, experts=2) as cluster:
        cluster.run([request("other", other, max_tokens=3)], chunk_tokens=48)
        assert cluster.run([me()])["me"] == alone
        hits = cluster.workers[0].book.prefixes.num_hit_tokens
        assert hits == min(shared, 149) // 32 * 32


def test_a_hit_of_an_answer_leaves_no_trace(checkpoint, dtype, alone):
    """The next turn brings prompt and answer back: decoded one by one, they are what a prompt would have been."""
    turn = [*PROMPT, *alone.tokens, *PROMPT[:20]]
    with LocalCluster(checkpoint, dtype=dtype, prefix_cache=False) as cluster:
        expected = cluster.run([me(turn)])["me"]
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        cluster.run([me()])
        assert cluster.run([me(turn)])["me"] == expected
        assert cluster.workers[0].book.prefixes.num_hit_tokens == 160


def test_siblings_of_one_prompt_leave_no_trace(checkpoint, dtype, alone):
    """Four at once, the first with the seed of `alone`: one computes the prompt, all read it."""
    with LocalCluster(checkpoint, dtype=dtype, microbatches=2) as cluster:
        siblings = [
            dataclasses.replace(me(seed=1234 + i), attempt=AttemptId("me" if i == 0 else f"m{i}", i, 1))
            for i in range(4)
        ]
        answers = cluster.run(siblings, chunk_tokens=64)
        assert cluster.workers[0].book.prefixes.num_hit_tokens == 3 * 128
    assert answers["me"] == alone
    assert len({tuple(a.tokens) for a in answers.values()}) == 4


def test_hits_under_eviction_and_pauses_leave_no_trace(checkpoint, dtype):
    """A pool that holds a third of what comes: prefixes are found, evicted, and found again by paused ones."""
    rng = random.Random(5)
    stem = [rng.randrange(20, 400) for _ in range(100)]
    crowd = [
        request(f"s{i}", [*stem[: rng.choice([0, 40, 100])], *(rng.randrange(20, 400) for _ in range(20))],
                temperature=1.0, seed=i, max_tokens=rng.randint(5, 40), arrival=i)
        for i in range(12)
    ]  # fmt: skip
    with LocalCluster(checkpoint, dtype=dtype, prefix_cache=False) as cluster:
        expected = {}
        for start in crowd:
            expected |= cluster.run([start])
    with LocalCluster(checkpoint, dtype=dtype, blocks=9, sliding_blocks=9, experts=2) as cluster:
        book, results, answers = cluster.workers[0].book, [], {}
        for batch in (crowd[:6], crowd[6:]):
            results = [cluster.order(0, batch, chunk_tokens=48)]
            while book.sequences:
                cluster.workers[0].step(result := StepResult())
                book.check()
                results.append(result)
            answers |= cluster.finish(*results)
        assert any(result.paused for result in results)
        assert book.prefixes.num_hit_tokens > 0
        assert sum(space.num_evicted for space in book.spaces.values()) > 0
    assert answers == expected


def test_a_resume_after_a_loss_is_helped_by_a_prefix_and_leaves_no_trace(checkpoint, dtype, alone):
    """The worker that held it is gone; another, which has seen the prompt, goes on from it."""
    with LocalCluster(checkpoint, dtype=dtype, attention=2) as cluster:
        cluster.run([request("before", PROMPT, max_tokens=2)], worker=1)
        result = cluster.order(0, [me()])
        while cluster.workers[0].book.sequences and len(result.deltas.get("gw", [])) < 9:
            cluster.workers[0].step(result)
        accepted = tuple(token for delta in result.deltas["gw"] for token in delta.tokens)
        cluster.workers[0].book.drop("gw", StepResult())
        resumed = cluster.order(1, [me(accepted=accepted, number=2)])
        while cluster.workers[1].book.sequences:
            cluster.workers[1].step(resumed)
        assert cluster.workers[1].book.prefixes.num_hit_tokens == 128
    assert [*accepted, *(t for d in resumed.deltas["gw"] for t in d.tokens)] == alone.tokens
    assert [p for d in resumed.deltas["gw"] for p in d.logprobs] == alone.logprobs[9:]
