"""The grand test of rule 2: two hundred requests, fifty random topologies, every token and logprob bit for bit.

Expected is what the plainest path says: one attention worker, one expert worker, each request alone. A topology
that fails names itself and the command that replays it.
"""

from collections import Counter

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from model.synthetic import Variant, make_checkpoint
from tests.equivalence.grand_run import Answer, Run
from tests.equivalence.grand_story import GATEWAY, MODELS, NUM_REQUESTS, TRANSPORTS, arrivals, requests, topology
from tests.equivalence.local_cluster import LocalCluster

NUM_TOPOLOGIES = 50
VARIANTS = {
    "full": Variant(layers=2),
    "hybrid": Variant(layers=2, hybrid=True, qk_norm="per_head", sinks=True),
    "fp8-hybrid": Variant(layers=2, hybrid=True, fp8=True),
}


class Models:
    """Checkpoints, and what each says of every request, made when first asked for."""

    def __init__(self, folder):
        self._folder, self._checkpoints, self._expected = folder, {}, {}

    def checkpoint(self, model):
        name = model.split()[0]
        if name not in self._checkpoints:
            make_checkpoint("tiny", self._folder / name, seed=3, variant=VARIANTS[name])
            self._checkpoints[name] = Checkpoint.open(self._folder / name)
        return self._checkpoints[name]

    def dtype(self, model):
        return getattr(torch, model.split()[1])

    def expected(self, model):
        """By request id: of each request alone."""
        if model not in self._expected:
            plain = {"dtype": self.dtype(model), "prefix_cache": False}
            with LocalCluster(self.checkpoint(model), **plain) as cluster:
                self._expected[model] = {r.attempt.request_id: _alone(cluster, r) for r in requests()}
        return self._expected[model]


def _alone(cluster, start):
    answer, worker = Answer(), cluster.workers[0]
    result = cluster.order(0, [start])
    while worker.book.sequences:
        worker.step(result)
    for delta in result.deltas[GATEWAY]:
        answer.add(delta)
    return answer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("grand"))


@pytest.mark.parametrize("model", ["full float32", "hybrid float32"])
def test_what_is_expected_is_what_the_oracle_says(models, model):
    """Of some requests: every logprob within 1e-4, and greedy tokens its likeliest."""
    reference = Reference(models.checkpoint(model), "float32")
    for start in requests()[:NUM_REQUESTS:10]:
        answer = models.expected(model)[start.attempt.request_id]
        rows = torch.log_softmax(reference.logits([*start.prompt, *answer.tokens]), -1)
        for i, (token, bits) in enumerate(zip(answer.tokens, answer.bits, strict=True)):
            row = rows[len(start.prompt) + i - 1]
            ids, values = torch.frombuffer(bytearray(bits), dtype=torch.int32).view(2, -1)
            said = values.view(torch.float32)
            assert float(said[0]) == pytest.approx(float(row[token]), abs=1e-4)
            assert torch.allclose(said[1:], row[ids[1:].long()], atol=1e-4)


def test_fifty_topologies_cover_what_they_should():
    topologies = [topology(seed) for seed in range(NUM_TOPOLOGIES)]
    assert {(t.model, t.transport.split(":")[0]) for t in topologies} == {
        (m, t) for m in MODELS for t in TRANSPORTS
    }
    for what, values in {"attention": {1, 2, 3}, "experts": {1, 2, 3, 4}, "microbatches": {1, 2, 3}}.items():
        assert {getattr(t, what) for t in topologies} == values
    assert {t.threads for t in topologies} == {1, 2}
    for what in ("is_dry", "dies_after", "moves_at", "join_wait_s", "prefix_cache", "is_warm"):
        assert 10 <= sum(bool(getattr(t, what)) for t in topologies) <= 42, what
    assert all(len({a.start.attempt.request_id for a in arrivals(t)}) == NUM_REQUESTS for t in topologies)


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("topologies")))


def test_topology(models, seed, grand_tally):
    """All requests under one topology; each has been met by what the topology says."""
    topo = topology(seed)
    run = Run(topo, models.checkpoint(topo.model), models.dtype(topo.model))
    run.serve()
    expected, counted = models.expected(topo.model), Counter()
    for arrival in arrivals(topo):
        attempt = arrival.start.attempt
        alone, got = expected[attempt.request_id], run.answers[attempt.request_id, attempt.index]
        is_whole = arrival.stops_after is None or arrival.resumes_on is not None
        count = len(alone.tokens) if is_whole else len(got.tokens)
        where = f"{attempt} of {topo}\nreplay: {topo.replay}"
        assert got.tokens == alone.tokens[:count], where
        assert got.bits == alone.bits[:count], where
        counted["answers"] += 1
        counted["tokens"] += count
        counted["logprobs"] += got.num_values
    assert bool(run.seen["prefix hits"]) == topo.prefix_cache
    assert bool(run.seen["paused"]) or not topo.is_dry
    assert bool(run.seen["lost"]) == (topo.dies_after is not None)
    assert run.seen["placements adopted"] == (topo.attention if topo.moves_at is not None else 0)
    assert run.seen["resumed"]
    assert run.seen["cancelled"]
    grand_tally.update(counted + run.seen, topologies=1)
