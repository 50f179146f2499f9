"""Rows on their way: FP8 with scales as near as it can be, sums as the merge would have made them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.config import RouterConfig
from router.rows import pack, sent_width, sums, unpack

MANTISSA_HALF = 2.0**-4  # of an e4m3 number: half of its last bit, relative
SUBNORMAL_HALF = 2.0**-10  # of the codes' unit


def some_rows(num_rows: int, hidden: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, hidden, generator=chance)
    return (rows * torch.exp(spread * torch.randn(num_rows, hidden, generator=chance))).to(dtype)


@given(
    num_rows=st.integers(0, 5), hidden=st.integers(1, 300), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_packed_row_comes_back_within_half_a_code(
    num_rows: int, hidden: int, seed: int, dtype: torch.dtype
) -> None:
    """Each element to half of its code's last bit; those much smaller than the group's largest to a fixed part."""
    rows = some_rows(num_rows, hidden, dtype, seed)
    packed = pack(rows)
    assert packed.shape == (num_rows, sent_width(hidden, dtype, "fp8"))
    assert packed.dtype == dtype
    back = unpack(packed, hidden).float()
    for start in range(0, hidden, 128):
        sent, got = rows[:, start : start + 128].float(), back[:, start : start + 128]
        scale = sent.abs().amax(-1, keepdim=True) / 448
        rounding = torch.finfo(dtype).eps * sent.abs()
        bound = torch.maximum(MANTISSA_HALF * sent.abs(), SUBNORMAL_HALF * scale) + rounding + 1e-30
        assert ((sent - got).abs() <= bound * 1.001).all()


def test_zeros_stay_zeros() -> None:
    assert not unpack(pack(torch.zeros(2, 200)), 200).any()


@pytest.mark.parametrize("size", [1e-45, 1e-44, 1e-42, 1e-38, 3e38])
def test_rows_of_any_size_stay_finite(size: float) -> None:
    """Also where a scale would be no number, or nothing."""
    rows = torch.full((1, 130), size)
    back = unpack(pack(rows), 130)
    assert torch.isfinite(back).all()
    assert ((back - rows).abs() <= torch.clamp(rows / 16, min=2.0**-135)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """A poisoned row must not come back looking sound; other rows and groups are untouched."""
    rows = some_rows(2, 256, torch.bfloat16, 1)
    sound = unpack(pack(rows), 256)
    rows[0, 5] = bad
    back = unpack(pack(rows), 256)
    assert not torch.isfinite(back[0, 5])
    assert torch.equal(back[0, 128:], sound[0, 128:])
    assert torch.equal(back[1], sound[1])


def test_fp8_halves_what_travels() -> None:
    assert sent_width(3072, torch.bfloat16, "fp8") == (3072 + 4 * 24) // 2
    assert sent_width(3072, torch.float32, "fp8") == (3072 + 4 * 24) // 4
    assert sent_width(3072, torch.bfloat16, "plain") == 3072


@given(num_rows=st.integers(1, 6), num_routes=st.integers(0, 24), seed=st.integers(0, 2**31))
def test_sums_are_those_of_each_row_in_the_order_of_the_routes(num_rows: int, num_routes: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_routes, 7, generator=chance)
    weights = torch.rand(num_routes, generator=chance)
    route_rows = torch.randint(num_rows, (num_routes,), generator=chance, dtype=torch.int32)
    expected = torch.zeros(num_rows, 7)
    for route, row in enumerate(route_rows.tolist()):
        expected[row] = expected[row] + weights[route] * rows[route]
    assert torch.equal(sums(rows.clone(), weights, route_rows, num_rows), expected)


def test_exact_numerics_refuse_what_is_not_exact() -> None:
    """The field, the value, what is accepted."""
    with pytest.raises(ValueError, match="dispatch_rows: 'fp8' with numerics 'exact'; must be auto or plain"):
        RouterConfig(dispatch_rows="fp8").rows_sent("exact")
    with pytest.raises(ValueError, match="replies: 'sums' with numerics 'exact'; must be auto or rows"):
        RouterConfig(replies="sums").answers("exact")
    assert RouterConfig(dispatch_rows="fp8").rows_sent("fast") == "fp8"
    assert RouterConfig(replies="sums").answers("fast") == "sums"
    assert (RouterConfig().rows_sent("exact"), RouterConfig().answers("exact")) == ("plain", "rows")
    assert (RouterConfig().rows_sent("fast"), RouterConfig().answers("fast")) == ("plain", "sums")
