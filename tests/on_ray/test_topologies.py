"""Every topology, through REST: what users get is what Transformers computes, and one request has one answer.

All these clusters join one Ray, each when the one before has ended.
"""

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

CHUNKS_OF_16 = "scheduler:\n  chunk_tokens_max: 16\n  step_tokens_max: 64\n"
TOPOLOGIES = {
    "1x1": ((1, 1), "transport: shm\n"),
    "1x3 in chunks of 16": ((1, 3), "transport: shm\n" + CHUNKS_OF_16),
    "2x3 in chunks of 16, replicas 2": ((2, 3), "transport: shm\n" + CHUNKS_OF_16 + "pools:\n  replicas: 2\n"),
    "1x2 over grpc": ((1, 2), "transport: grpc\n"),
    "1x1 with 2 threads": ((1, 1), "attention:\n  threads: 2\nexpert:\n  threads: 2\n"),
}
OVER_SHM = [name for name, (_, settings) in TOPOLOGIES.items() if "shm" in settings]
CASES = [(fraction, name) for fraction in (0.25, 0.5, 1.0) for name in OVER_SHM]
CASES += [(1.0, name) for name in TOPOLOGIES if name not in OVER_SHM]
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


@pytest.mark.parametrize(("fraction", "topology"), CASES)
def test_a_topology_answers_as_transformers_and_as_every_other(
    oracles, answers, shared_ray, fraction, topology, tmp_path
):
    """Logprobs within 1e-4; greedy tokens equal, teacher-forced, wherever no two candidates are that close. And
    alone or among 32 strangers: token ids, logprobs and likeliest tokens identical, bit for bit."""
    path, model = oracles[fraction]
    (attention, experts), settings = TOPOLOGIES[topology]
    (tmp_path / "cluster.yaml").write_text(settings)
    flags = ["--attention-workers", str(attention), "--expert-workers", str(experts), *shared_ray]
    with Served(path, *flags, "--config", str(tmp_path / "cluster.yaml"), log=tmp_path / "log") as cluster:
        assert_equal(cluster, path, model)
        answer = assert_one_answer(cluster)
        assert_text_is_refused(cluster)
    assert len(set(answer[0])) > 10
    assert answers.setdefault(fraction, answer) == answer


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
