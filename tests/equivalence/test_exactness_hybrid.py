"""Rule 2 for hybrids: windows, their blocks given back and used again, leave no trace either."""

import json

import pytest
import torch

from attention_workers.kv_memory import block_bytes
from attention_workers.step import StepResult
from model.checkpoint import Checkpoint
from model.layer_types import FULL, SLIDING
from model.reference import Reference
from model.synthetic import Variant, make_checkpoint
from tests.equivalence.local_cluster import LocalCluster, request
from tests.equivalence.test_exactness import PROMPT, SAMPLED, strangers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Four layers, two of them with a window of 24 tokens, head norms and sinks."""
    path = tmp_path_factory.mktemp("exact") / "hybrid"
    variant = Variant(layers=4, hybrid=True, qk_norm="per_head", sinks=True)
    make_checkpoint("tiny", path, seed=3, variant=variant)
    return Checkpoint.open(path)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


def me(**kw):
    return request("me", PROMPT, **(SAMPLED | kw))


@pytest.fixture(scope="module")
def alone(checkpoint, dtype):
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        answer = cluster.run([me()])["me"]
    assert len(set(answer.tokens)) > 10
    return answer


@pytest.mark.parametrize(
    "topology",
    [{"experts": 2}, {"attention": 2, "experts": 3, "replicas": 2, "microbatches": 2}],
    ids=lambda t: " ".join(f"{k}={v}" for k, v in t.items()),
)
def test_company_chunks_and_topology_leave_no_trace(checkpoint, dtype, alone, topology):
    """Among 32 strangers, prompt in chunks of 16, on the last of the attention workers."""
    with LocalCluster(checkpoint, dtype=dtype, **topology) as cluster:
        last = len(cluster.workers) - 1
        answers = cluster.run([me(), *strangers()], last, step_tokens=48, chunk_tokens=16)
    assert answers["me"] == alone
    assert len(answers) == 33


def test_thread_count_leaves_no_trace(checkpoint, dtype, alone):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with LocalCluster(checkpoint, dtype=dtype, experts=2) as cluster:
            answers = cluster.run([me(), *strangers(6)])
    finally:
        torch.set_num_threads(before)
    assert answers["me"] == alone


@pytest.mark.parametrize("pools", [{"blocks": 6}, {"sliding_blocks": 5}], ids=["full", "sliding"])
def test_pauses_for_want_of_either_space_leave_no_trace(checkpoint, dtype, alone, pools):
    """Sequences pause and are computed again, in chunks cut to what the smaller space holds."""
    with LocalCluster(checkpoint, dtype=dtype, **pools) as cluster:
        crowd = [request(f"s{i}", PROMPT[: 20 + i], max_tokens=30, arrival=i - 2) for i in range(5)]
        results = [cluster.order(0, [me(), *crowd])]
        while cluster.workers[0].book.sequences:
            cluster.workers[0].step(result := StepResult())
            cluster.workers[0].book.check()
            results.append(result)
        assert any(result.paused for result in results)
        assert cluster.finish(*results)["me"] == alone


def test_what_a_block_held_before_leaves_no_trace(checkpoint, dtype, alone):
    """Even NaN in blocks that leave one window and enter another."""
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        model = cluster.workers[0].model
        for pool in (*model.keys.values(), *model.values.values()):
            pool.fill_(torch.nan)
        assert cluster.run([me()])["me"] == alone


def test_memory_at_4096_tokens_is_the_arithmetic(checkpoint):
    """Two full layers keep all, two sliding ones a window of 24, which lies in one block here; of real tensors."""
    prompt = [31 * i % 400 + 20 for i in range(4096)]
    pools = {"blocks": 129, "sliding_blocks": 12}
    with LocalCluster(checkpoint, dtype=torch.float32, model_len=4128, **pools) as cluster:
        worker = cluster.workers[0]
        cluster.order(0, [request("long", prompt, max_tokens=9)], chunk_tokens=256)
        [sequence] = worker.book.sequences.values()
        while not sequence.is_prompt_done:
            worker.step(StepResult())
            assert len(sequence.tables[SLIDING].blocks) <= 12
        one = {kind: block_bytes(worker.model.config, kind, worker.model.dtype) for kind in (FULL, SLIDING)}
        held = sum(one[kind] * len(table.blocks) for kind, table in sequence.tables.items())
        token_and_layer = 2 * 2 * 16 * 4  # keys and values · heads · width · bytes
        assert held == token_and_layer * (2 * 4096 + 2 * 32)
        for kind, total in ((FULL, 129), (SLIDING, 12)):
            assert worker.model.keys[kind].nbytes + worker.model.values[kind].nbytes == total * one[kind]
        worker.book.drop("gw", StepResult())


def test_every_layer_may_slide(tmp_path):
    """An older spelling, and no full layer: that space then costs nothing, and the oracle agrees."""
    path = tmp_path / "sliding"
    make_checkpoint("tiny", path, seed=4)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, "attn_window_size": 24, "swa_rope_theta": 1e4}))
    checkpoint = Checkpoint.open(path)
    with LocalCluster(checkpoint, experts=2, dtype=torch.float32) as cluster:
        model = cluster.workers[0].model
        assert (block_bytes(model.config, FULL, model.dtype), model.keys.keys()) == (0, {SLIDING})
        answer = cluster.run([request("r", PROMPT, max_tokens=20)], chunk_tokens=30)["r"]
    expected = torch.log_softmax(Reference(checkpoint, "float32").logits(PROMPT + answer.tokens), -1)
    for i, (token, logprobs) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        assert logprobs.sampled == pytest.approx(float(expected[len(PROMPT) + i - 1, token]), abs=1e-4)


def test_a_window_ends_where_it_says(checkpoint):
    """Through a sliding layer a token sees the W - 1 before it, and not the one before those."""
    assert checkpoint.config.layer_types == (SLIDING, FULL, SLIDING, FULL)
    assert checkpoint.config.sliding_window == 24
    with LocalCluster(checkpoint, dtype=torch.float32) as cluster:
        worker = cluster.workers[0]
        last = {}
        for changed in (None, 59 - 24, 59 - 23):
            prompt = [*PROMPT[:60]]
            if changed is not None:
                prompt[changed] += 1
            cluster.order(0, [request(f"r{changed}", prompt, max_tokens=1)], chunk_tokens=256)
            [batch] = [worker.model.begin(worker.book.compose(StepResult()))]
            last[changed] = worker.model.attend(0, batch)[-1]
            worker.book.drop("gw", StepResult())
    assert torch.equal(last[None], last[59 - 24])
    assert not torch.equal(last[None], last[59 - 23])
