"""FP8 blocks mean what their definition says, bit for bit, and a product does not tell how its weight is held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import exact, linear
from model.fp8 import Fp8Weight, quantise
from model.linear import KeptLinear

SHAPES = [(1, 1), (128, 128), (130, 257), (64, 300), (384, 128)]


def all_codes() -> torch.Tensor:
    """[256]: every bit pattern, NaN twice among them."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def by_definition(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    """One element at a time in doubles, which hold every product of a code and a scale."""
    codes, out = weight.codes.float().double(), torch.empty(weight.shape, dtype=dtype)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            product = (codes[i, j] * weight.scale_inv[i // 128, j // 128].double()).float()
            out[i, j] = product.to(dtype)
    return out


def some_weight(outputs: int, inputs: int, seed: int = 0) -> Fp8Weight:
    torch.manual_seed(seed)
    return quantise(torch.randn(outputs, inputs) * torch.rand(outputs, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.00037, 1e-30, 127.9, 2.0**-126, 1e-44])
def test_every_code_has_its_value(dtype: torch.dtype, scale: float) -> None:
    """Signs, zeros, subnormal codes and results, scales at both ends."""
    codes = all_codes().view(2, 128)
    weight = Fp8Weight(codes, torch.tensor([[scale]]))
    expected = by_definition(weight, dtype)
    got = weight.dequantised(dtype)
    is_number = ~codes.float().isnan()
    assert is_number.sum() == 254
    assert torch.equal(got[is_number].float(), expected[is_number].float())
    assert torch.equal(got[is_number].signbit(), expected[is_number].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_block_has_its_scale(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = some_weight(*shape)
    scale = weight.scale_inv.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert torch.equal(weight.dequantised(dtype), (weight.codes.float() * scale).to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantising_uses_the_whole_range_of_every_block(shape: tuple[int, int]) -> None:
    """The largest magnitude of a block becomes 448, and nothing moves by more than half a step of its code."""
    torch.manual_seed(1)
    original = torch.randn(shape) * 3
    weight = quantise(original)
    assert weight.scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(weight.scale_inv.shape[0]):
        for j in range(weight.scale_inv.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert weight.codes[block].float().abs().max() == 448
            assert weight.scale_inv[i, j] == original[block].abs().max() / 448
    error = (weight.dequantised(torch.float32) - original).abs()
    smallest_step = weight.scale_inv.max() * 2.0**-9
    assert (error <= torch.maximum(original.abs() / 16, smallest_step / 2)).all()


def test_a_block_of_zeros_stays_zero() -> None:
    weight = quantise(torch.zeros(3, 200))
    assert (weight.scale_inv > 0).all()
    assert torch.equal(weight.dequantised(torch.float32), torch.zeros(3, 200))


def test_codes_survive_a_safetensors_file(tmp_path: Path) -> None:
    """As float8_e4m3fn, every bit pattern."""
    save_file({"w": all_codes().view(2, 128)}, tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")["w"]
    assert read.dtype == torch.float8_e4m3fn
    assert torch.equal(read.view(torch.uint8).flatten(), torch.arange(256, dtype=torch.uint8))
    assert b'"F8_E4M3"' in (tmp_path / "w.safetensors").read_bytes()[:200]


def test_either_nan_is_seen() -> None:
    weight = some_weight(130, 70)
    assert weight.is_finite()
    for code in (0x7F, 0xFF):
        weight.codes.view(torch.uint8)[129, 69] = code
        assert not weight.is_finite()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shapes", [[(48, 40)], [(256, 512)], [(768, 384), (768, 384)], [(256, 70), (130, 70), (3, 70)]]
)
def test_a_kept_weight_gives_the_bits_of_its_dequantised_twin(
    threads: int, dtype: torch.dtype, shapes: list[tuple[int, int]]
) -> None:
    """For one row, few and more than the longest rung; parts side by side; whichever thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [some_weight(*shape, seed=i) for i, shape in enumerate(shapes)]
        kept = linear.linear(parts, dtype, "exact", "fp8")
        twin = linear.linear(parts, dtype, "exact", "dequantised")
        x = torch.randn(300, shapes[0][1]).to(dtype)
        for at, count in ((0, 1), (7, 2), (3, 3), (11, 6), (100, 33), (0, 129), (0, 300), (0, 0)):
            assert torch.equal(kept(x[at : at + count]), twin(x[at : at + count]))
    finally:
        torch.set_num_threads(before)
    assert (kept.kept_as, twin.kept_as) == ("fp8", str(twin.compute_dtype).removeprefix("torch."))
    assert kept.nbytes < 0.6 * twin.nbytes


def test_where_the_plain_kernel_differs_the_weight_is_packed_for_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory must not decide bits: the twin's own kernel is used then."""
    parts = [some_weight(512, 640)]
    twin = linear.linear(parts, torch.float32, "exact", "dequantised")
    assert twin.is_packed
    monkeypatch.setattr(linear, "_ways", {})
    monkeypatch.setattr(linear.exact, "rows_agree", lambda *_: False)
    kept = linear.linear(parts, torch.float32, "exact", "fp8")
    assert isinstance(kept, KeptLinear)
    assert kept.is_packed
    assert kept.ladder == twin.ladder
    x = torch.randn(37, 640)
    assert torch.equal(kept(x), twin(x))


def test_a_cpu_without_bf16_products_rounds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """There bf16 is computed in float32: kept codes must be rounded to bf16 on the way."""
    monkeypatch.setattr(exact, "bf16_products", lambda: False)
    monkeypatch.setattr(linear, "_ways", {})
    parts = [some_weight(256, 300)]
    kept, twin = (linear.linear(parts, torch.bfloat16, "exact", keep) for keep in ("fp8", "dequantised"))
    assert kept.compute_dtype == torch.float32
    x = torch.randn(9, 300).bfloat16()
    assert torch.equal(kept(x), twin(x))


def test_parts_that_are_not_in_fp8_stand_beside_those_that_are() -> None:
    """config.json may except one projection of three."""
    parts = [some_weight(64, 40), torch.randn(8, 40).bfloat16(), some_weight(8, 40)]
    kept, twin = (linear.linear(parts, torch.bfloat16, "exact", keep) for keep in ("fp8", "dequantised"))
    x = torch.randn(5, 40).bfloat16()
    assert torch.equal(kept(x), twin(x))
    assert (kept.kept_as, kept.out_features) == ("fp8", 80)
    assert kept.nbytes == sum(part.nbytes for part in parts)
