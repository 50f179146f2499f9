"""Hybrids against Transformers' parts (`hybrid_oracle.py` names them): the oracle, then the pools taken apart."""

from __future__ import annotations

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from tests.equivalence.local_cluster import LocalCluster, request
from tests.parity.hybrid_oracle import LAYER_TYPES, Form, save_random_hybrid
from tests.parity.transformers_oracle import oracle_logits

DIFFERENCE_MAX = 1e-4
GAP = 1e-4  # closer than this, rounding alone may decide which token or expert is chosen
FORMS = [
    Form("per_layer"),
    Form("per_layer", sinks=True, window=40),
    Form("per_head"),
    Form("per_head", sinks=True, window=1),
    Form("per_head", gains="own", window=33),
    Form("none", sinks=True),
    Form("none", window=500),
]


def prompt(length: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.fixture(scope="module", params=FORMS, ids=str)
def hybrid(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    model = save_random_hybrid(path, request.param, seed=FORMS.index(request.param))
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.config.layer_types) == LAYER_TYPES
    return request.param, model, checkpoint


def test_logits_equal_transformers(hybrid) -> None:
    """Prompts shorter than the window, as long, longer by one, and much longer; at every position."""
    form, model, checkpoint = hybrid
    reference = Reference(checkpoint)
    for length in {1, max(1, form.window - 1), form.window, form.window + 1, 64, 130}:
        token_ids = prompt(min(length, 200), model.config.vocab_size)
        expected = oracle_logits(model, token_ids)
        assert expected.std() > 1, "a flat oracle would agree with anything"
        assert (reference.logits(token_ids) - expected).abs().max() <= DIFFERENCE_MAX


@pytest.mark.parametrize("chunk", [7, 16, 256])
def test_the_pools_taken_apart_equal_transformers(hybrid, chunk) -> None:
    """Chunk borders inside windows, blocks given back on the way: logprobs within 1e-4 and greedy tokens equal,
    teacher-forced, wherever neither tokens nor experts tie."""
    _, model, checkpoint = hybrid
    prompts = {f"r{length}": prompt(length, model.config.vocab_size) for length in (5, 24, 33, 97)}
    with LocalCluster(checkpoint, experts=2) as cluster:
        starts = [request(name, token_ids, max_tokens=20) for name, token_ids in prompts.items()]
        answers = cluster.run(starts, chunk_tokens=chunk)
    reference, compared = Reference(checkpoint), 0
    for name, token_ids in prompts.items():
        forced = token_ids + answers[name].tokens
        expected = torch.log_softmax(oracle_logits(model, forced), -1)[len(token_ids) - 1 : -1]
        gaps = reference.trace(forced).gate_gaps.amin(-1)
        for i, (token, logprobs) in enumerate(zip(answers[name].tokens, answers[name].logprobs, strict=True)):
            if gaps[: len(token_ids) + i].min() <= GAP:
                break
            assert logprobs.sampled == pytest.approx(float(expected[i, token]), abs=DIFFERENCE_MAX)
            best = expected[i].topk(2).values
            if best[0] - best[1] > GAP:
                assert token == int(expected[i].argmax())
            compared += 1
    assert compared >= 20


def test_the_window_matters_to_the_comparison(tmp_path) -> None:
    """One token more or less in the window, or no sink, would be caught: logits move far more than allowed."""
    model = save_random_hybrid(tmp_path, Form("per_head", sinks=True), seed=1)
    token_ids = prompt(64, model.config.vocab_size)
    expected = oracle_logits(model, token_ids)
    checkpoint = Checkpoint.open(tmp_path)
    for change in ({"sliding_window": 23}, {"sliding_window": 25}, {"has_sinks": False}):
        checkpoint.config = Checkpoint.open(tmp_path).config.model_copy(update=change)
        assert (Reference(checkpoint).logits(token_ids) - expected).abs().max() > 0.01
