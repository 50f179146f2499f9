"""`serve --device cuda` as a user starts it: all workers share one GPU."""

import pytest

from model.checkpoint import Checkpoint
from model.reference import Reference
from model.synthetic import make_checkpoint
from tests.on_ray.conftest import ray_environment  # noqa: F401
from tests.on_ray.served import Served

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


def test_a_cluster_on_one_gpu_answers_as_the_oracle_does(cuda, tmp_path):
    model, config = tmp_path / "tiny", tmp_path / "cluster.yaml"
    make_checkpoint("tiny", model, seed=11)
    config.write_text("pools: {gpus_per_worker: 0.3}\n")
    flags = ("--config", str(config), "--device", "cuda", "--dtype", "float32", "--kv-memory", "64MiB")
    prompt = list(range(40, 90))
    with Served(model, *flags, log=tmp_path / "log") as cluster:
        assert all(worker["device"].startswith("cuda ") for worker in cluster.status()["workers"])
        choice = cluster.complete(prompt, max_tokens=1, temperature=0)
    logits = Reference(Checkpoint.open(model), "float32").logits(prompt)[-1]
    best = logits.topk(2).values
    assert best[0] - best[1] > 1e-4, "a tie would prove nothing"
    assert choice["token_ids"] == [int(logits.argmax())]
