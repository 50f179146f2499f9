"""Parity: what users get through REST is what Transformers computes, on every topology."""

import math

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

TOPOLOGIES = {"1x1": ("1", "1"), "1x3": ("1", "3"), "2x3": ("2", "3")}
LENGTHS = (1, 2, 15, 16, 31, 32, 33, 64, 97, 130)
GAP = 1e-4
ROUTER_TIE = 1e-5  # closer than this, rounding alone decides which expert runs


@pytest.fixture(scope="module", params=[0.25, 0.5, 1.0], ids=lambda f: f"rotary-{f}")
def oracle(request, tmp_path_factory):
    """A random model that Transformers saved, unchanged on disk."""
    from tests.parity.transformers_oracle import save_random_model

    path = tmp_path_factory.mktemp("saved")
    model = save_random_model(path, rotary_fraction=request.param, seed=int(100 * request.param))
    return path, model


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_logprobs_and_greedy_tokens_equal_transformers(oracle, topology, tmp_path):
    """Logprobs within 1e-4; greedy tokens equal, teacher-forced, wherever no two candidates are that close."""
    path, model = oracle
    attention, experts = TOPOLOGIES[topology]
    with Served(
        path, "--attention-workers", attention, "--expert-workers", experts, log=tmp_path / "log"
    ) as cluster:
        assert_equal(cluster, path, model)


def test_a_hybrid_equals_transformers_parts(tmp_path):
    """Windows, a rotation for each layer type, head norms and sinks, through REST; both block spaces are shown,
    fit the memory given, and are held by nobody afterwards."""
    from tests.parity.hybrid_oracle import Form, save_random_hybrid

    path = tmp_path / "hybrid"
    model = save_random_hybrid(path, Form("per_head", sinks=True), seed=2)
    flags = ("--attention-workers", "2", "--expert-workers", "3", "--kv-memory", "1MiB")
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
