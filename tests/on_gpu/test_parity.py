"""On a GPU the pools compute what Transformers and the oracle compute on the CPU."""

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from model.synthetic import Variant, make_checkpoint
from tests.equivalence.local_cluster import LocalCluster, request

pytestmark = pytest.mark.gpu

GAP = 1e-4  # closer than this, rounding alone may decide which token or expert is chosen
BF16_MAX = 0.25
"""Of logprobs: two steps of bfloat16 at logits of 16 to 32, for rounding falls to either side."""


def compare(checkpoint, prompts, expected_logits, cuda):
    """Logprobs within 1e-4 and greedy tokens equal, teacher-forced, wherever neither tokens nor experts tie."""
    with LocalCluster(checkpoint, experts=2, dtype=torch.float32, device=cuda) as cluster:
        answers = cluster.run(
            [request(name, ids, max_tokens=16) for name, ids in prompts.items()], chunk_tokens=16
        )
    reference, compared = Reference(checkpoint, "float32"), 0
    for name, ids in prompts.items():
        forced = ids + answers[name].tokens
        expected = torch.log_softmax(expected_logits(forced), -1)[len(ids) - 1 : -1]
        gaps = reference.trace(forced).gate_gaps.amin(-1)
        for i, (token, found) in enumerate(zip(answers[name].tokens, answers[name].logprobs, strict=True)):
            if gaps[: len(ids) + i].min() <= GAP:
                break
            assert found.sampled == pytest.approx(float(expected[i, token]), abs=1e-4)
            best = expected[i].topk(2).values
            if best[0] - best[1] > GAP:
                assert token == int(expected[i].argmax())
            compared += 1
    assert compared >= 20


def prompts(vocabulary):
    generator = torch.Generator().manual_seed(7)
    return {f"r{n}": torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (1, 5, 16, 33, 97)}


@pytest.mark.parametrize("rotary_fraction", [0.25, 0.5, 1.0])
def test_float32_equals_transformers(cuda, tmp_path, rotary_fraction):
    from tests.parity.transformers_oracle import oracle_logits, save_random_model

    model = save_random_model(tmp_path, rotary_fraction=rotary_fraction, seed=int(rotary_fraction * 100))
    oracle = lambda ids: oracle_logits(model, ids)  # noqa: E731
    compare(Checkpoint.open(tmp_path), prompts(model.config.vocab_size), oracle, cuda)


@pytest.mark.parametrize("qk_norm", ["per_layer", "per_head", "none"])
def test_hybrids_equal_transformers_parts(cuda, tmp_path, qk_norm):
    from tests.parity.hybrid_oracle import Form, save_random_hybrid
    from tests.parity.transformers_oracle import oracle_logits

    model = save_random_hybrid(tmp_path, Form(qk_norm, sinks=True), seed=2)
    oracle = lambda ids: oracle_logits(model, ids)  # noqa: E731
    compare(Checkpoint.open(tmp_path), prompts(model.config.vocab_size), oracle, cuda)


def test_fp8_equals_the_oracle(cuda, tmp_path):
    make_checkpoint("tiny", tmp_path / "tiny", seed=3, variant=Variant(fp8=True))
    checkpoint = Checkpoint.open(tmp_path / "tiny")
    compare(checkpoint, prompts(400), Reference(checkpoint, "float32").logits, cuda)


def test_bfloat16_is_near_the_oracle(cuda, tmp_path):
    """Teacher-forced. An expert chosen otherwise for a rounding would be seen: this seed has none on the CPU."""
    make_checkpoint("tiny", tmp_path / "tiny", seed=3)
    checkpoint = Checkpoint.open(tmp_path / "tiny")
    ids = prompts(400)["r97"]
    with LocalCluster(checkpoint, experts=2, dtype=torch.bfloat16, device=cuda) as cluster:
        answer = cluster.run([request("r", ids, max_tokens=16)])["r"]
    reference = Reference(checkpoint, "bfloat16")
    trace = reference.trace(ids + answer.tokens)
    expected = torch.log_softmax(trace.logits, -1)
    for i, (token, found) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert found.sampled == pytest.approx(float(expected[len(ids) + i - 1, token]), abs=BF16_MAX)
