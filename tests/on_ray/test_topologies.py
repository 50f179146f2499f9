"""Every topology, through REST: what users get is what Transformers computes, and one request has one answer.

A cluster serves one model and takes several sizes, one after another; all join one Ray.
"""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.cli import main
from model.checkpoint import Checkpoint
from model.reference import Reference
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

PATIENT = {"first_token_s": 600}  # on a slow machine strangers wait for long, and nobody is refused for it
CHUNKS_OF_16 = PATIENT | {"chunk_tokens_max": 16, "step_tokens_max": 64}
OVER_SHM = {"transport": "shm", "scheduler": PATIENT}
TWO_REPLICAS = {"transport": "shm", "scheduler": CHUNKS_OF_16, "pools": {"replicas": 2}}
LIKE_NO_OTHER = TWO_REPLICAS | {"transport": "grpc", "attention": {"threads": 2}, "expert": {"threads": 2}}
CASES = {
    "a quarter rotates": (0.25, OVER_SHM, [(1, 1), (1, 3), (2, 3)]),
    "half rotates, in chunks of 16, two replicas": (0.5, TWO_REPLICAS, [(1, 2), (2, 3)]),
    "all rotates": (1.0, OVER_SHM, [(1, 1), (1, 3), (2, 3)]),
    "all rotates, over grpc, in chunks of 16, two replicas, two threads": (1.0, LIKE_NO_OTHER, [(1, 2)]),
}
LENGTHS = (1, 2, 15, 16, 31, 32, 33, 64, 97, 130)
GAP = 1e-4
ROUTER_TIE = 1e-5  # closer than this, rounding alone decides which expert runs
PROMPT = [5 * i % 230 + 20 for i in range(90)]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """By rotary fraction: a random model that Transformers saved, unchanged on disk. It has no tokenizer."""
    from tests.parity.transformers_oracle import save_random_model

    made = {}
    for fraction in (0.25, 0.5, 1.0):
        path = tmp_path_factory.mktemp("saved")
        made[fraction] = path, save_random_model(path, rotary_fraction=fraction, seed=int(100 * fraction))
    return made


@pytest.fixture(scope="module")
def answers():
    """By model: what the first topology said, which every other must say too."""
    return {}


@pytest.mark.parametrize("case", CASES)
def test_every_size_answers_as_transformers_and_as_every_other(oracles, answers, shared_ray, case, tmp_path):
    """Logprobs within 1e-4; greedy tokens equal, teacher-forced, wherever no two candidates are that close. And
    alone or among 32 strangers: token ids, logprobs and likeliest tokens identical, bit for bit."""
    fraction, settings, sizes = CASES[case]
    path, model = oracles[fraction]
    (tmp_path / "cluster.yaml").write_text(json.dumps(settings))
    (attention, experts), *later = sizes
    flags = ["--attention-workers", str(attention), "--expert-workers", str(experts), *shared_ray]
    flags += ["--config", str(tmp_path / "cluster.yaml")]
    with Served(path, *flags, log=tmp_path / "log") as cluster:
        assert_text_is_refused(cluster)
        assert_answers(cluster, path, model, answers.setdefault(fraction, []))
        for attention, experts in later:
            scale(cluster, attention, experts)
            assert_answers(cluster, path, model, answers[fraction])


def scale(cluster, attention, experts):
    """As a user does; until every worker is in use."""
    sizes = ["--attention", str(attention), "--experts", str(experts)]
    assert main(["scale", "--url", cluster.url, *sizes, "--wait", "--timeout", "180"]) == 0
    status = cluster.wait_for_status(
        lambda status: all(worker["epoch"] == status["epoch"] for worker in status["workers"]), within_s=60
    )
    assert [worker["role"] for worker in status["workers"]] == ["attention"] * attention + ["expert"] * experts
    assert all(worker["slots"] > 0 for worker in status["workers"] if worker["role"] == "expert")


def assert_answers(cluster, path, model, first):
    """`first`: what the first topology of this model said; of the first itself, nothing yet."""
    assert_equal(cluster, path, model)
    answer = assert_one_answer(cluster)
    assert len(set(answer[0])) > 10
    first.append(answer)
    assert answer == first[0]


def test_a_hybrid_equals_transformers_parts(shared_ray, tmp_path):
    """Windows, a rotation for each layer type, head norms and sinks, through REST; both block spaces are shown,
    fit the memory given, and are held by nobody afterwards."""
    from tests.parity.hybrid_oracle import Form, save_random_hybrid

    path = tmp_path / "hybrid"
    model = save_random_hybrid(path, Form("per_head", sinks=True), seed=2)
    flags = ("--attention-workers", "2", "--expert-workers", "3", "--kv-memory", "1MiB", *shared_ray)
    with Served(path, *flags, log=tmp_path / "log") as cluster:
        assert_equal(cluster, path, model)
        status = cluster.wait_for_status(lambda s: all(is_unheld(g) for g in of(s)))
    for gauges in of(status):
        full, sliding = gauges["kv_blocks_total"], gauges["kv_sliding_blocks_total"]
        one_layer = 2 * 2 * 16 * 4 * gauges["kv_block_tokens"]  # keys and values · heads · width · bytes · tokens
        assert (gauges["kv_block_bytes"], gauges["kv_sliding_block_bytes"]) == (one_layer, 3 * one_layer)
        assert 0.97 * 2**20 <= one_layer * (full + 3 * sliding) <= 2**20
        assert gauges["kv_sliding_blocks_free"] + gauges["kv_sliding_blocks_cached"] == sliding
        assert gauges["kv_sliding_window"] == 24


def is_unheld(gauges):
    return gauges["kv_blocks_free"] + gauges["kv_blocks_cached"] == gauges["kv_blocks_total"]


def of(status):
    """The gauges of its attention workers."""
    return [worker["gauges"] for worker in status["workers"] if worker["role"] == "attention"]


def assert_equal(cluster, path, model):
    """Completions of prompts of many lengths, compared token by token with the oracle's logits."""
    from tests.parity.transformers_oracle import oracle_logits

    generator = torch.Generator().manual_seed(7)
    reference, vocabulary = Reference(Checkpoint.open(path)), model.config.vocab_size
    compared = 0
    for length in LENGTHS:
        prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        choice = cluster.complete(
            prompt, max_tokens=8, temperature=0, logprobs=2, ignore_eos=True, prompt_logprobs=0
        )
        tokens = choice["token_ids"]
        forced = prompt + tokens
        every = torch.log_softmax(oracle_logits(model, forced), -1)
        gaps = reference.trace(forced).gate_gaps.amin(-1)
        for at in range(1, length):
            if gaps[:at].min() <= ROUTER_TIE:
                break
            scored = choice["prompt_logprobs"][at][str(prompt[at])]
            assert math.isclose(scored["logprob"], float(every[at - 1, prompt[at]]), abs_tol=GAP)
        expected = every[length - 1 : -1]
        for i, token in enumerate(tokens):
            if gaps[: length + i].min() <= ROUTER_TIE:
                break  # a tie in a router: either choice is right, and what follows differs
            assert math.isclose(choice["logprobs"]["token_logprobs"][i], float(expected[i, token]), abs_tol=GAP)
            best = expected[i].topk(2).values
            if best[0] - best[1] > GAP:
                assert token == int(expected[i].argmax())
            compared += 1
    assert compared >= 6 * len(LENGTHS)


def mine(cluster):
    choice = cluster.complete(
        PROMPT, max_tokens=48, seed=99, temperature=1.0, top_p=0.9, top_k=50, logprobs=3, ignore_eos=True
    )
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]


def strangers(cluster, pool):
    rng = random.Random(1)
    for i in range(32):
        prompt = [rng.randrange(20, 250) for _ in range(rng.randint(1, 100))]
        yield pool.submit(cluster.complete, prompt, max_tokens=rng.randint(20, 60), seed=i, ignore_eos=True)


def assert_one_answer(cluster):
    """Alone, and three times in company."""
    with ThreadPoolExecutor(40) as pool:
        alone = mine(cluster)
        others = list(strangers(cluster, pool))
        among = [pool.submit(mine, cluster) for _ in range(3)]
        assert all(answer.result() == alone for answer in among)
        assert all(len(o.result()["token_ids"]) >= 20 for o in others)
    return alone


def assert_text_is_refused(cluster):
    """Without a tokenizer ids are served, and text is refused by the missing file's name."""
    refused = cluster.client.post("/v1/completions", json={"prompt": "Hello"})
    assert refused.status_code == 400
    assert "tokenizer.json" in refused.json()["error"]["message"]
