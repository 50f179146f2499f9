"""Rule 2 for FP8 weights: how a worker holds them leaves no trace, and they mean what their twin's weights are."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_workers.residency import Residency
from model.checkpoint import Checkpoint
from model.device import HOST
from model.experts import grouped
from model.fp8 import quantise
from model.linear import linear
from model.reference import Reference
from model.synthetic import Variant, make_checkpoint
from router.placement import EpochId, Member, spread
from tests.equivalence.local_cluster import LocalCluster, request

PROMPT = [7 * i % 400 + 20 for i in range(83)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "tiny"
    make_checkpoint("tiny", path, seed=3, variant=Variant(fp8=True))
    return Checkpoint.open(path)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(scope="module")
def twin(fp8, dtype, tmp_path_factory):
    """The same model with its weights dequantised here, without the code under test, to the dtype served."""
    path = tmp_path_factory.mktemp("twin") / "tiny"
    shutil.copytree(fp8.path, path)
    raw = json.loads((path / "config.json").read_text())
    del raw["quantization_config"]
    (path / "config.json").write_text(json.dumps(raw))
    stored = load_file(fp8.path / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name, codes in tensors.items():
        if f"{name}_scale_inv" in stored:
            rows = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[: codes.shape[0]]
            scales = rows.repeat_interleave(128, 1)[:, : codes.shape[1]]
            tensors[name] = (codes.float() * scales).to(dtype)
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def crowd():
    rng = random.Random(4)
    others = [
        request(f"s{i}", [rng.randrange(20, 400) for _ in range(rng.randint(1, 60))], temperature=1.0, seed=i,
                max_tokens=rng.randint(1, 30), arrival=rng.randint(-9, 9))
        for i in range(8)
    ]  # fmt: skip
    return [request("me", PROMPT, temperature=1.0, top_k=40, seed=1234, max_tokens=40), *others]


@pytest.fixture(scope="module")
def expected(twin, dtype):
    """Of each request alone, by the twin's cluster."""
    with LocalCluster(twin, dtype=dtype) as cluster:
        return {name: answer for start in crowd() for name, answer in cluster.run([start]).items()}


@pytest.mark.parametrize(
    "topology",
    [
        {"keep": ("dequantised",)},
        {"keep": ("fp8",)},
        {"keep": ("fp8", "dequantised"), "experts": 2, "replicas": 2, "attention": 2},
        {"keep": ("dequantised", "fp8", "fp8"), "experts": 3, "microbatches": 2},
    ],
    ids=lambda t: " ".join(f"{k}={v}" for k, v in t.items()),
)
def test_fp8_and_its_dequantised_twin_give_the_same_bits(fp8, dtype, expected, topology):
    """Every token and logprob, alone or in company and chunks, kept on some workers and dequantised on others."""
    with LocalCluster(fp8, dtype=dtype, **topology) as cluster:
        last = len(cluster.workers) - 1
        answers = cluster.run(crowd(), last, step_tokens=48, chunk_tokens=16)
        kept = {expert.residency.kept_as for expert in cluster.experts}
        assert ("fp8" in kept) == ("fp8" in topology["keep"])
    assert answers == expected
    assert len(set(answers["me"].tokens)) > 10


def test_replicas_that_hold_an_expert_differently_agree_row_for_row(fp8, dtype):
    """Directly: every expert of a layer, for one row and for many."""
    held = []
    for keep in ("fp8", "dequantised"):
        residency = Residency(fp8, Member("e", 1), dtype, "exact", HOST)
        table = spread(EpochId(1, 1), fp8.fingerprint, [(Member("e", 1), "@")], 3, 8, 1)
        residency.prepare(table, keep=keep)
        held.append(residency.layer(1))
    torch.manual_seed(0)
    rows = torch.randn(200, fp8.config.hidden_size).to(dtype)
    for expert in range(8):
        for count in (1, 3, 17, 200):
            routes, ids = torch.arange(count), torch.full((count,), expert)
            assert torch.equal(*(grouped(table, rows, routes, ids) for table in held))


@pytest.mark.parametrize("keep", ["fp8", "dequantised"])
def test_the_worker_agrees_with_the_oracle(fp8, keep):
    """Which dequantises by lines of its own: every logprob within 1e-4, greedy tokens equal."""
    with LocalCluster(fp8, experts=2, dtype=torch.float32, keep=(keep,)) as cluster:
        answer = cluster.run([request("r", PROMPT, max_tokens=40)])["r"]
    expected = torch.log_softmax(Reference(fp8, "float32").logits(PROMPT + answer.tokens), -1)
    for i, (token, logprobs) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        row = expected[len(PROMPT) + i - 1]
        assert logprobs.sampled == pytest.approx(float(row[token]), abs=1e-4)
        assert int(row.argmax()) == token
    assert len(set(answer.tokens)) > 10


@pytest.mark.parametrize(
    "shapes",
    [[(1536, 3072)] * 2, [(3072, 1536)], [(6144, 3072), (1024, 3072), (1024, 3072)], [(3072, 6144)]],
    ids=["gate and up", "down", "qkv", "out"],
)
def test_products_at_the_released_widths_are_the_same(shapes):
    """Where kernels choose differently from those for small shapes."""
    torch.manual_seed(0)
    parts = [quantise(torch.randn(shape) * 0.02) for shape in shapes]
    kept, twin = (linear(parts, torch.bfloat16, "exact", keep) for keep in ("fp8", "dequantised"))
    rows = torch.randn(140, shapes[0][1]).bfloat16()
    expected = twin(rows)
    for count in (1, 2, 5, 64, 140):
        assert torch.equal(kept(rows[-count:]), expected[-count:])
