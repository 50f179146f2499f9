"""Fast numerics may send less: what that does to a model's logprobs, stated as a bound."""

from __future__ import annotations

import pytest
import torch

from model.checkpoint import Checkpoint
from model.synthetic import make_checkpoint
from router.config import RouterConfig
from tests.equivalence.local_cluster import LocalCluster, request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("encodings") / "tiny"
    make_checkpoint("tiny", path, seed=4)
    return Checkpoint.open(path)


def logprobs(checkpoint, prompts, **router):
    """Of the first token after each prompt, the three likeliest."""
    config = RouterConfig(combine_timeout_s=30.0, **router)
    numerics = "fast" if router else "exact"
    with LocalCluster(
        checkpoint, experts=3, replicas=2, dtype=torch.float32, numerics=numerics, router=config
    ) as cluster:
        starts = [request(f"r{i}", prompt, max_tokens=1) for i, prompt in enumerate(prompts)]
        answers = cluster.run(starts)
    return [dict(answers[f"r{i}"].logprobs[0].top) for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("rows", "replies", "bound"), [("plain", "rows", 1e-3), ("plain", "sums", 1e-3), ("fp8", "rows", 0.5),
                                   ("fp8", "sums", 0.5)],
)  # fmt: skip
def test_an_encoding_moves_logprobs_within_its_bound(checkpoint, rows, replies, bound):
    prompts = [[3 + (7 * i + j) % 60 for j in range(5 + i)] for i in range(12)]
    exact = logprobs(checkpoint, prompts)
    encoded = logprobs(checkpoint, prompts, dispatch_rows=rows, replies=replies)
    moved = [
        abs(mine[token] - theirs[token])
        for mine, theirs in zip(encoded, exact, strict=True)
        for token in mine.keys() & theirs.keys()
    ]
    assert len(moved) >= 2 * len(prompts)  # mostly the same tokens lead
    assert max(moved) <= bound
