"""Rule 2 on a GPU: company, chunks and topology leave no trace; rows pass unchanged between device and host."""

import pytest
import torch

from attention_workers.staging import to_host
from expert_workers.staging import Staging
from model import exact
from model.checkpoint import Checkpoint
from model.device import host_buffer
from model.memory import available_bytes
from model.synthetic import Variant, make_checkpoint
from tests.equivalence.local_cluster import LocalCluster, request

pytestmark = pytest.mark.gpu

PROMPT = [7 * i % 400 + 20 for i in range(83)]
MODELS = {
    "plain": Variant(),
    "hybrid": Variant(layers=4, hybrid=True, qk_norm="per_head", sinks=True),
    "fp8": Variant(fp8=True),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / request.param
    make_checkpoint("tiny", path, seed=3, variant=MODELS[request.param])
    return Checkpoint.open(path)


def crowd():
    strangers = [
        request(f"s{i}", PROMPT[i % 40 : 45 + i], temperature=1.0, seed=i, max_tokens=5 + i) for i in range(32)
    ]
    return [request("me", PROMPT, temperature=1.0, top_k=40, seed=1234, max_tokens=40), *strangers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_company_chunks_and_topology_leave_no_trace(cuda, checkpoint, dtype):
    with LocalCluster(checkpoint, dtype=dtype, device=cuda) as cluster:
        alone = cluster.run(crowd()[:1])["me"]
        assert all(pool.is_cuda for pool in cluster.workers[0].model.keys.values())
    assert len(set(alone.tokens)) > 10
    for topology in (
        {"experts": 2, "keep": ("fp8",)},
        {"attention": 2, "experts": 3, "replicas": 2, "microbatches": 2, "keep": ("fp8", "dequantised")},
    ):
        with LocalCluster(checkpoint, dtype=dtype, device=cuda, **topology) as cluster:
            last = len(cluster.workers) - 1
            assert cluster.run(crowd(), last, step_tokens=48, chunk_tokens=16)["me"] == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 40), (8192, 3072), (3072, 6144), (3072, 1536), (256, 3072)])
def test_a_row_has_the_same_bits_in_any_company(cuda, dtype, outputs, inputs):
    torch.manual_seed(0)
    linear = exact.Linear((torch.randn(outputs, inputs) * 0.02).to(dtype).to(cuda), "exact")
    x = torch.randn(300, inputs).to(dtype).to(cuda)
    whole = linear(x)
    for at, count in ((0, 1), (7, 1), (3, 2), (11, 3), (50, 6), (100, 33), (0, 129), (299, 1)):
        assert torch.equal(linear(x[at : at + count]), whole[at : at + count])


@pytest.mark.parametrize("width", [32, 48, 128, 3072, 6144])
def test_sums_and_curves_do_not_show_how_many_rows_there_are(cuda, width):
    torch.manual_seed(0)
    x = (torch.randn(3000, width) * 4).to(cuda)
    for fn in (exact.row_sum, exact.exp, exact.silu, exact.sigmoid):
        whole = fn(x)
        for at, count in ((0, 1), (17, 5), (100, 2000), (2999, 1)):
            assert torch.equal(fn(x[at : at + count]), whole[at : at + count])


def test_float32_products_are_not_rounded_to_tf32(cuda):
    torch.manual_seed(0)
    x, w = torch.randn(64, 512), torch.randn(512, 512)
    expected = x.double() @ w.double().T
    assert ((x.to(cuda) @ w.to(cuda).T).cpu() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_come_back_as_they_went(cuda, dtype):
    """Batch after batch through the same pinned memory, larger and smaller."""
    staging = Staging(cuda)
    assert host_buffer((2, 2), dtype, cuda).is_pinned()
    for count in (3, 100, 7):
        rows = torch.randn(count, 64).to(dtype)
        assert torch.equal(staging.to_host(staging.to_device(rows)), rows)
    parts = [torch.randn(n, 50).to(cuda) for n in (2, 0, 5)]
    for there, here in zip(parts, to_host(parts), strict=True):
        assert torch.equal(there.cpu(), here)


def test_free_memory_is_the_devices(cuda):
    before = available_bytes(cuda)
    held = torch.empty(256 << 20, dtype=torch.uint8, device=cuda)
    assert before - available_bytes(cuda) >= held.nbytes
