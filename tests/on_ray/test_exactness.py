"""Rule 2 through the whole system: the same request, bit for bit, on every topology and in any company."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.synthetic import make_checkpoint
from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

PROMPT = [5 * i % 380 + 20 for i in range(90)]
CHUNKS_OF_16 = "scheduler:\n  chunk_tokens_max: 16\n  step_tokens_max: 64\n"
CASES = {
    "1x1": ((1, 1), ""),
    "1x3 in chunks of 16": ((1, 3), CHUNKS_OF_16),
    "2x3 in chunks of 16, replicas 2": ((2, 3), CHUNKS_OF_16 + "pools:\n  replicas: 2\n"),
    "1x2 over grpc": ((1, 2), "transport: grpc\n"),
    "1x1 with 2 threads": ((1, 1), "attention:\n  threads: 2\nexpert:\n  threads: 2\n"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "tiny"
    make_checkpoint("tiny", path, seed=4)
    return path


@pytest.fixture(scope="module")
def seen():
    return {}


def mine(cluster):
    choice = cluster.complete(
        PROMPT, max_tokens=48, seed=99, temperature=1.0, top_p=0.9, top_k=50, logprobs=3, ignore_eos=True
    )
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]


def strangers(cluster, pool):
    rng = random.Random(1)
    for i in range(32):
        prompt = [rng.randrange(20, 400) for _ in range(rng.randint(1, 100))]
        yield pool.submit(cluster.complete, prompt, max_tokens=rng.randint(20, 60), seed=i, ignore_eos=True)


@pytest.mark.parametrize("case", CASES)
def test_one_request_has_one_answer(checkpoint, case, seen, tmp_path):
    """Alone and among 32 strangers: token ids, logprobs and likeliest tokens identical."""
    (attention, experts), settings = CASES[case]
    (tmp_path / "cluster.yaml").write_text(settings)
    flags = ["--attention-workers", str(attention), "--expert-workers", str(experts)]
    if settings:
        flags += ["--config", str(tmp_path / "cluster.yaml")]
    with Served(checkpoint, *flags, log=tmp_path / "log") as cluster, ThreadPoolExecutor(40) as pool:
        alone = mine(cluster)
        others = list(strangers(cluster, pool))
        among = [pool.submit(mine, cluster) for _ in range(3)]
        assert all(answer.result() == alone for answer in among)
        assert all(len(o.result()["token_ids"]) >= 20 for o in others)
    assert len(set(alone[0])) > 10
    assert seen.setdefault("answer", alone) == alone
