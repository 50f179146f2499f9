"""Rule 2: the same tokens and logprobs, to the last bit, wherever and with whomever a sequence runs."""

import dataclasses
import random

import pytest
import torch

from model.checkpoint import Checkpoint
from model.reference import Reference
from model.synthetic import make_checkpoint
from tests.equivalence.local_cluster import LocalCluster, request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "tiny"
    make_checkpoint("tiny", path, seed=3)
    return Checkpoint.open(path)


PROMPT = [7 * i % 400 + 20 for i in range(83)]
SAMPLED = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 1234, "max_tokens": 40}


def me(**kw):
    return request("me", PROMPT, **(SAMPLED | kw))


def strangers(count=32, seed=0):
    rng = random.Random(seed)
    return [
        request(f"s{i}", [rng.randrange(20, 400) for _ in range(rng.randint(1, 60))], temperature=1.0,
                seed=i, max_tokens=rng.randint(1, 50), arrival=rng.randint(-40, 40))
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(scope="module")
def alone(checkpoint, dtype):
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        return cluster.run([me()])["me"]


def test_the_worker_agrees_with_the_oracle(checkpoint):
    """Exact is worth nothing if it is exactly wrong: every logprob within 1e-4 of the reference, greedy equal."""
    with LocalCluster(checkpoint, experts=2, dtype=torch.float32) as cluster:
        answer = cluster.run([request("r", PROMPT, max_tokens=40)])["r"]
    expected = torch.log_softmax(Reference(checkpoint, "float32").logits(PROMPT + answer.tokens), -1)
    for i, (token, logprobs) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        row = expected[len(PROMPT) + i - 1]
        assert logprobs.sampled == pytest.approx(float(row[token]), abs=1e-4)
        assert int(row.argmax()) == token
    assert len(set(answer.tokens)) > 10


@pytest.mark.parametrize(
    "topology",
    [
        {"experts": 3},
        {"attention": 2, "experts": 3, "replicas": 2},
        {"experts": 2, "microbatches": 2},
        {"experts": 2, "microbatches": 3, "replicas": 2},
    ],
    ids=lambda t: " ".join(f"{k}={v}" for k, v in t.items()),
)
def test_company_chunks_and_topology_leave_no_trace(checkpoint, dtype, alone, topology):
    """Among 32 strangers, prompt in chunks of 16, on the last of the attention workers."""
    with LocalCluster(checkpoint, dtype=dtype, **topology) as cluster:
        last = len(cluster.workers) - 1
        answers = cluster.run([me(), *strangers()], last, step_tokens=48, chunk_tokens=16)
    assert answers["me"] == alone
    assert len(answers) == 33


@pytest.mark.parametrize("transport", ["shm", "grpc", "mixed"])
def test_the_way_parcels_travel_leaves_no_trace(checkpoint, dtype, alone, transport):
    """Shared memory, a stream between hosts, or each for half of the experts."""
    with LocalCluster(checkpoint, dtype=dtype, experts=2, transport=transport) as cluster:
        kinds = set(cluster.workers[0].dispatcher.transports().values())
        assert kinds == ({"shm", "grpc"} if transport == "mixed" else {transport})
        answers = cluster.run([me(), *strangers(4)])
    assert answers["me"] == alone


def test_thread_count_leaves_no_trace(checkpoint, dtype, alone):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with LocalCluster(checkpoint, dtype=dtype, experts=2) as cluster:
            answers = cluster.run([me(), *strangers(8)])
    finally:
        torch.set_num_threads(before)
    assert answers["me"] == alone


def test_preemption_and_recomputation_leave_no_trace(checkpoint, dtype, alone):
    """A pool so small that sequences pause and are computed again."""
    with LocalCluster(checkpoint, dtype=dtype, blocks=6) as cluster:
        crowd = [request(f"s{i}", PROMPT[: 20 + i], max_tokens=30, arrival=i - 2) for i in range(5)]
        first = cluster.order(0, [me(), *crowd])
        answers = cluster.finish(first)
    assert answers["me"] == alone


def test_a_resume_continues_with_the_same_bits(checkpoint, dtype, alone):
    """An attention worker died: what another worker computes from prompt and accepted tokens goes on the same."""
    for held in (1, 17, 39):
        with LocalCluster(checkpoint, dtype=dtype, experts=2) as cluster:
            resumed = me(accepted=alone.tokens[:held], number=2)
            result = cluster.order(0, [resumed])
            while cluster.workers[0].book.sequences:
                cluster.workers[0].step(result)
        tokens = [t for d in result.deltas["gw"] for t in d.tokens]
        logprobs = [p for d in result.deltas["gw"] for p in d.logprobs]
        assert result.deltas["gw"][0].position == held
        assert tokens == alone.tokens[held:]
        assert logprobs == alone.logprobs[held:]


def test_penalties_leave_no_trace_of_pauses_and_resumes(checkpoint):
    """They are of the sequence's own tokens: whoever computes it, after whatever, counts the same."""
    shaping = {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.3, "min_p": 0.001}
    sampling = dataclasses.replace(me().sampling, logit_bias=((30, 2.0), (44, -5.0)), **shaping)
    plain, stops = me().sampling, frozenset(range(0, 512, 2))

    def mine(**fields):
        return dataclasses.replace(me(), sampling=sampling, stop_token_ids=stops, min_tokens=25, **fields)

    with LocalCluster(checkpoint, dtype=torch.float32) as cluster:
        alone = cluster.run([mine()])["me"]
        assert cluster.run([dataclasses.replace(mine(), sampling=plain)])["me"].tokens != alone.tokens
    assert not stops & set(alone.tokens[:25])
    assert alone.tokens[-1] in stops
    with LocalCluster(checkpoint, dtype=torch.float32, blocks=6, experts=2) as cluster:
        crowd = [request(f"s{i}", PROMPT[: 20 + i], max_tokens=30, arrival=i - 2) for i in range(5)]
        assert cluster.run([mine(), *crowd])["me"] == alone
    with LocalCluster(checkpoint, dtype=torch.float32) as cluster:
        result = cluster.order(0, [mine(accepted=tuple(alone.tokens[:9]))])
        while cluster.workers[0].book.sequences:
            cluster.workers[0].step(result)
    assert [t for d in result.deltas["gw"] for t in d.tokens] == alone.tokens[9:]


def test_what_a_block_held_before_leaves_no_trace(checkpoint, dtype, alone):
    """Even NaN left in a freed block: a masked key must weigh nothing."""
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        model = cluster.workers[0].model
        for pool in (*model.keys.values(), *model.values.values()):
            pool.fill_(torch.nan)
        assert cluster.run([me()])["me"] == alone


def test_logits_that_are_not_finite_fail_their_sequence_by_name(checkpoint, dtype):
    """One sequence ends with the reason; the worker and the others go on."""
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        worker = cluster.workers[0]
        unembed = worker.model.unembed

        def poisoned(batch):
            logits = unembed(batch)
            bad = [s.sequence.start.attempt.request_id == "bad" for s in batch.spans if s.samples]
            logits[torch.tensor(bad)] = torch.nan
            return logits

        worker.model.unembed = poisoned
        result = cluster.order(0, [request("bad", PROMPT), request("good", PROMPT[:30], max_tokens=5)])
        while worker.book.sequences:
            worker.step(result)
    ends = {c.attempt.request_id: (c.reason.name, c.detail) for c in result.completions}
    assert ends == {"bad": ("FAILED", "the model's logits are not finite"), "good": ("LENGTH", "")}
