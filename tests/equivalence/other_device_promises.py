"""Run by `test_other_device.py`. What a GPU's path promises, as far as that can be seen without one."""

import pytest
import torch
import torch.nn.functional as F

from model import exact
from model.attention import TILE
from model.batched import Batched
from model.checkpoint import Checkpoint
from model.device import HOST
from model.fp8 import quantise
from model.linear import linear
from model.synthetic import Variant, make_checkpoint
from router.config import RouterConfig
from router.errors import ExpertsUnavailable
from router.rows import sent_width
from tests.equivalence import other_device
from tests.equivalence.local_cluster import EPOCH, LocalCluster, request
from tests.equivalence.other_device import OnBoard

BOARD = other_device.register()
PROMPT = [7 * i % 400 + 20 for i in range(83)]
PLAIN = Variant(layers=2)
HYBRID = Variant(layers=2, hybrid=True, qk_norm="per_head", sinks=True)
FP8 = Variant(layers=2, fp8=True)


def made(folder, variant):
    make_checkpoint("tiny", folder / "tiny", seed=3, variant=variant)
    return Checkpoint.open(folder / "tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory.mktemp("models"), PLAIN)


def me():
    return request("me", PROMPT, temperature=1.0, top_k=40, seed=1234, max_tokens=6)


def strangers():
    return [request(f"s{i}", PROMPT[i : 9 * i], temperature=1.0, seed=i, max_tokens=4) for i in range(1, 5)]


def test_the_device_tells_a_stranger():
    """Else the tests below could not fail."""
    here, there = torch.ones(3), torch.ones(3).to(BOARD)
    for mix in (
        lambda: here + there, lambda: there[torch.tensor([0])], lambda: torch.cat((there, here)),
        lambda: F.linear(there, here[None]), lambda: there.numpy(), lambda: here.index_select(0, there.long()),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            mix()
    assert (there + 1).cpu().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(PLAIN, torch.float32), (HYBRID, torch.float32), (FP8, torch.bfloat16)],
    ids=["plain", "hybrid", "fp8"],
)
def test_tokens_are_those_of_the_host(tmp_path, variant, dtype):
    """Weights, keys, values and all of a step lie on the device: alone, in company, in chunks, kept in FP8."""
    checkpoint = made(tmp_path, variant)
    with LocalCluster(checkpoint, dtype=dtype) as cluster:
        on_host = cluster.run([me()])["me"]
    with LocalCluster(checkpoint, dtype=dtype, device=BOARD) as cluster:
        alone = cluster.run([me()])["me"]
    topology = {"experts": 2, "microbatches": 2, "keep": ("fp8", "dequantised")}
    with LocalCluster(checkpoint, dtype=dtype, device=BOARD, **topology) as cluster:
        model = cluster.workers[0].model
        held = (*model.keys.values(), *model.values.values(), model.embedding)
        assert all(isinstance(tensor, OnBoard) for tensor in held)
        assert cluster.run([me(), *strangers()], step_tokens=48, chunk_tokens=16)["me"] == alone
    if dtype == torch.float32:
        assert alone.tokens == on_host.tokens
        for one, other in zip(alone.logprobs, on_host.logprobs, strict=True):
            assert one.sampled == pytest.approx(other.sampled, abs=1e-4)


def test_rows_that_links_carry_stay_on_the_device(plain):
    """As with nccl and cuda_ipc: merged there too, to the same bits. Only expert ids and logits cross."""
    topology = {"experts": 2, "replicas": 2, "microbatches": 2}
    with LocalCluster(plain, device=BOARD) as cluster:
        staged = cluster.run([me()])["me"]
    with LocalCluster(plain, device=BOARD, rows_on=BOARD, **topology) as cluster:
        other_device.to_host.clear()
        assert cluster.run([me(), *strangers()[:2]], step_tokens=48, chunk_tokens=32)["me"] == staged
    width = plain.config.hidden_size
    assert other_device.to_host
    assert not [shape for shape in other_device.to_host if shape[-1:] == (width,)]


def test_encoded_rows_and_sums_are_made_where_rows_lie(plain):
    """FP8 codes are packed and unpacked there, and sums made and added; the host sees none of them."""
    router = RouterConfig(combine_timeout_s=30.0, dispatch_rows="fp8", replies="sums")
    topology = {"experts": 2, "replicas": 2, "numerics": "fast", "router": router}
    with LocalCluster(plain, device=BOARD, **topology) as cluster:
        staged = cluster.run([me()])["me"]
    with LocalCluster(plain, device=BOARD, rows_on=BOARD, **topology) as cluster:
        other_device.to_host.clear()
        assert cluster.run([me()])["me"] == staged
        dtype = cluster.dtype
    hidden = plain.config.hidden_size
    widths = {(hidden,), (sent_width(hidden, dtype, "fp8"),)}
    assert not [shape for shape in other_device.to_host if tuple(shape[-1:]) in widths]


def test_logits_cross_once_for_each_step(plain):
    with LocalCluster(plain, device=BOARD, microbatches=2) as cluster:
        cluster.order(0, [me(), *strangers()])
        cluster.workers[0].step(result := cluster.order(0))
        other_device.to_host.clear()
        cluster.workers[0].step(result)
        logits = [shape for shape in other_device.to_host if shape[-1] == plain.config.vocab_size]
        assert logits == [torch.Size([5, plain.config.vocab_size])]
        cluster.workers[0].book.drop("gw", result)


def test_a_failed_dispatch_gives_its_memory_back(plain):
    """However often a step is tried while no worker answers for its experts."""
    with LocalCluster(plain, device=BOARD, microbatches=2) as cluster:
        result = cluster.order(0, [me(), *strangers()])
        cluster.experts[0].residency.retire(EPOCH)
        for _ in range(5):
            with pytest.raises(ExpertsUnavailable):
                cluster.workers[0].step(result)
        cluster.workers[0].book.drop("gw", result)


# --- arithmetic ------------------------------------------------------------------------------------


def test_where_no_rungs_agree_rows_run_in_tiles_of_one_height(monkeypatch):
    """As on a device whose every row count is computed by another kernel: a row's bits are still its own."""
    monkeypatch.setattr(exact.Linear, "_product", lambda _, x, w: F.linear(x, w) * (1 + 2**-12 * len(x)))
    torch.manual_seed(0)
    product = exact.Linear(torch.randn(40, 24).to(BOARD), "exact")
    assert len(product.ladder) == 1
    x = torch.randn(75, 24).to(BOARD)
    whole = product(x)
    for at, count in ((0, 1), (7, 1), (20, 33), (74, 1)):
        assert torch.equal(product(x[at : at + count]), whole[at : at + count])


def test_where_a_rows_place_decides_exact_mode_refuses():
    places = torch.arange(exact.ROWS_MAX)[:, None].to(BOARD)
    x = exact.sample(exact.ROWS_MAX, 8, dtype=torch.float32, device=BOARD)
    with pytest.raises(exact.NumericsError):
        exact.find_ladder(lambda rows: rows * (1 + places[: len(rows)] * 2**-12), x, x, "a product")


@pytest.mark.parametrize("group", [3, 12])
def test_batched_products_do_not_show_how_many_there_are(group):
    torch.manual_seed(0)
    product = Batched(((16, TILE), (TILE, 16)), "exact", BOARD)
    height = product.height(16 * group)
    left, right = torch.randn(700, height, 16).to(BOARD), torch.randn(700, TILE, 16).to(BOARD).transpose(1, 2)
    whole = product(left, right)
    torch.testing.assert_close(whole.cpu(), torch.bmm(left, right).cpu())
    for at, count in ((0, 1), (3, 9), (100, 513), (699, 1)):
        assert torch.equal(product(left[at : at + count], right[at : at + count]), whole[at : at + count])


def test_fp8_is_the_same_kept_and_dequantised():
    torch.manual_seed(0)
    parts = [quantise(torch.randn(shape) * 0.02).to(BOARD) for shape in ((130, 200), (64, 200))]
    for dtype in (torch.float32, torch.bfloat16):
        kept, twin = (linear(parts, dtype, "exact", keep) for keep in ("fp8", "dequantised"))
        rows = torch.randn(70, 200).to(dtype).to(BOARD)
        assert torch.equal(kept(rows), twin(rows))
        on_host = torch.cat([part.to(HOST).dequantised(dtype) for part in parts])
        assert torch.equal(torch.cat([part.dequantised(dtype) for part in parts]).cpu(), on_host)
