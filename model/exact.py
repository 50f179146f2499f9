"""Arithmetic whose result for one row does not depend on the rows beside it (DESIGN rule 2).

Libraries choose kernels by the number of rows, and kernels differ in their last bits. Here every matrix
product runs with a row count from a short ladder, and each rung is compared with the others when weights
are loaded, on the device that they are on: what was not seen to agree is not used. Everything else is built from
operations that IEEE 754 rounds correctly, plus `exp`, `log`, `cos` and `sin` on whole vectors only.

`numerics="fast"` skips padding and probing; it promises nothing about bits.

On a GPU two things differ. Where no rungs agree, all rows run in tiles of one height. And its library sums rows in
an order that depends on how many there are: there a sum is a fixed tree of additions.

Legend: n rows · I inputs · O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device import HOST

Numerics = Literal["exact", "fast"]

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Row counts a product may run with: fine where weights dominate, coarse where rows do."""

ROWS_MAX = LADDER[-1]
FIXED_HEIGHTS = (16, 32, 64, 128, 8)
"""Of a GPU's tiles, where no ladder agrees: the first at which a row's place does not matter."""

FIRST_RUNGS = (1, 2, 4, 8, 16, 32)
_VECTOR = 64  # elements; two AVX-512 registers of float32, twice over
_SERIAL_MAX = 32768  # ATen's grain: at or below it an elementwise operation is not split over threads
_PACK_MIN = 1 << 18  # weight elements; below it the packed kernel's call costs more than it saves


class NumericsError(Exception):
    """No way was found to compute a shape exactly on this machine."""


# --- elementwise ---------------------------------------------------------------------------------


def _on_whole_vectors(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply fn so that every element is computed by the vector kernel, none by a scalar tail."""
    flat = x.reshape(-1)
    n = flat.numel()
    pad = -n % _VECTOR
    if pad:
        flat = F.pad(flat, (0, pad))
    if n <= _SERIAL_MAX or torch.get_num_threads() == 1 or x.device.type != "cpu":
        out = fn(flat)
    else:
        out = torch.cat([fn(piece) for piece in flat.split(_SERIAL_MAX)])
    return out[:n].view(x.shape)


def exp(x: Tensor) -> Tensor:
    return _on_whole_vectors(torch.exp, x)


def log(x: Tensor) -> Tensor:
    return _on_whole_vectors(torch.log, x)


def cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    return _on_whole_vectors(torch.cos, angle), _on_whole_vectors(torch.sin, angle)


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + exp(-x))


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis: [..., n] -> [...]. Wide rows in two levels, so that no thread splits a row."""
    width = x.shape[-1]
    if x.device.type != "cpu":
        return tree_sum(x)
    if width <= 4096:
        return x.contiguous().sum(-1)
    x = F.pad(x, (0, -width % 1024))
    return x.view(*x.shape[:-1], -1, 1024).sum(-1).contiguous().sum(-1)


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis by additions of whole vectors alone: exact per row on any device."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = F.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def log_softmax(logits: Tensor) -> Tensor:
    """[n, V] float32 -> [n, V]."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - log(row_sum(exp(shifted))).unsqueeze(-1)


# --- matrix products -----------------------------------------------------------------------------


def rungs(first: int) -> tuple[int, ...]:
    return tuple(m for m in LADDER if m >= first and m % first == 0)


def padded(n: int, ladder: tuple[int, ...]) -> int:
    """The smallest rung that holds n rows."""
    return next(m for m in ladder if m >= n)


def smallest_first_rung(agrees: Callable[[int], bool], what: str) -> int:
    """The smallest first rung from which every rung of its ladder agrees."""
    seen = {m: agrees(m) for m in LADDER}
    for first in FIRST_RUNGS:
        if all(seen[m] for m in rungs(first)):
            return first
    raise NumericsError(
        f"{what}: no row count up to {ROWS_MAX} gives a row the same bits as others under"
        f" {torch.get_num_threads()} threads; accepted: --threads 1, or --numerics fast"
    )


class OneThread:
    """The truth that other thread counts are compared with."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)


def sample(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same values on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(17), device=HOST).to(dtype).to(device)


_ladders: dict[tuple[object, ...], tuple[int, ...]] = {}


def bf16_products() -> bool:
    """Whether this CPU multiplies bf16 itself; elsewhere bf16 weights are kept as float32, which loses nothing."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computed_in(served: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which weights are kept and multiplied while they are served in another."""
    is_widened = served == torch.bfloat16 and device.type == "cpu" and not bf16_products()
    return torch.float32 if is_widened else served


def bytes_kept(num_elements: int, served: torch.dtype, device: torch.device) -> int:
    """What weights of so many elements take while they are served in this dtype, however they are stored."""
    return num_elements * computed_in(served, device).itemsize


def packed(weight: Tensor) -> Tensor:
    """[O, I] in the opaque layout that `packed_product` reads fastest."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return reordered


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def rows_agree(product: Callable[[Tensor], Tensor], x: Tensor, truth: Tensor, m: int) -> bool:
    """Whether m rows of x alone give their rows of `truth` [n, O], at places spread evenly over x."""
    places = [first + at for first in range(0, len(x), ROWS_MAX) for at in range(0, ROWS_MAX - m + 1, m)]
    wanted = math.ceil(_compared(x.dtype) / (m * truth.shape[1]))
    step = max(1, len(places) // max(3, wanted))
    return all(
        torch.equal(product(x[at : at + m].clone()), truth[at : at + m]) for at in (*places[::step], places[-1])
    )


def _compared(dtype: torch.dtype) -> int:
    """Elements that must agree. Rounding to bfloat16 hides all but one in some ten thousand differences."""
    return 1 << 17 if dtype == torch.bfloat16 else 1


def tiles_agree(product: Callable[[Tensor], Tensor], x: Tensor, m: int) -> bool:
    """Whether a row has the same bits at every fourth place of a tile of m rows, whoever is beside it."""

    def in_tiles(rows: Tensor) -> Tensor:
        return torch.cat([product(tile.clone()) for tile in rows[: len(x) // m * m].split(m)])

    truth = in_tiles(x)
    orders = [torch.arange(len(truth), device=x.device).roll(shift) for shift in range(1, m, 4)]
    return all(torch.equal(in_tiles(x[order]), truth[order]) for order in orders)


def find_ladder(product: Callable[[Tensor], Tensor], x: Tensor, truth: Tensor, what: str) -> tuple[int, ...]:
    """Row counts at which rows of x [n, I] give their rows of `truth`; else, on a GPU, one fixed height."""
    try:
        return rungs(smallest_first_rung(functools.partial(rows_agree, product, x, truth), what))
    except NumericsError:
        if x.device.type == "cpu":  # a height that one thread count agrees at says nothing of another
            raise
        for m in FIXED_HEIGHTS:
            if tiles_agree(product, x, m):
                return (m,)
        raise


class Linear:
    """x [n, I] -> x W^T [n, O] in x's dtype, for weights [O, I] of the model's dtype, on the weight's device."""

    def __init__(self, weight: Tensor, numerics: Numerics) -> None:
        self._describe(weight.shape[0], weight.shape[1], weight.dtype, weight.device)
        weight = weight.to(self.compute_dtype).contiguous()
        self.kept_as, self.nbytes = str(weight.dtype).removeprefix("torch."), weight.nbytes
        self.is_packed = self.device.type == "cpu" and (
            self.compute_dtype == torch.bfloat16 or weight.numel() >= _PACK_MIN
        )
        # Cloned: a weight mapped from a file lies at any address, and kernels may choose by alignment.
        self._weight = packed(weight) if self.is_packed else weight.clone()
        self.ladder = self._ladder() if numerics == "exact" else None

    def _describe(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.name = f"weight {out_features}x{in_features}"
        self.dtype, self.compute_dtype, self.device = dtype, computed_in(dtype, device), device

    def _operand(self) -> Tensor:
        """The weight as `_product` takes it."""
        return self._weight

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return packed_product(x, weight) if self.is_packed else F.linear(x, weight)

    def probe(self) -> tuple[Tensor, Tensor]:
        """Sample rows [n, I], in slabs of ROWS_MAX, and the truth about them: their products under one thread."""
        slabs = math.ceil(_compared(self.compute_dtype) / (ROWS_MAX * self.out_features))
        x = sample(slabs * ROWS_MAX, self.in_features, dtype=self.compute_dtype, device=self.device)
        weight = self._operand()
        with OneThread():
            return x, torch.cat([self._product(slab.clone(), weight) for slab in x.split(ROWS_MAX)])

    def _ladder(self) -> tuple[int, ...]:
        key = (
            self.out_features,
            self.in_features,
            self.compute_dtype,
            self.device,
            self.is_packed,
            torch.get_num_threads(),
        )
        if key not in _ladders:
            _ladders[key] = find_ladder(lambda x: self._product(x, self._weight), *self.probe(), self.name)
        return _ladders[key]

    def __call__(self, x: Tensor) -> Tensor:
        x, weight = x.to(self.compute_dtype), self._operand()
        if self.ladder is None:
            return self._product(x, weight).to(self.dtype)
        slabs = x.split(self.ladder[-1]) if len(x) > self.ladder[-1] else (x,)
        pieces = [self._rung(slab, weight, self.ladder) for slab in slabs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(self.dtype)

    def rows_of(self, x: Tensor, first: int, count: int) -> Tensor:
        """As of x[first : first + count]. x [n, I] has ROWS_MAX rows more than any count asks for.

        The rows behind fill the rung instead of zeros: a row's bits do not depend on who is beside it, so nothing
        need be copied to be padded.
        """
        ladder = self.ladder
        m = count if ladder is None or count > ladder[-1] else padded(count, ladder)
        rows = x[first : first + m]
        if ladder is None or count > ladder[-1] or rows.data_ptr() % 64:
            return self(rows[:count])
        return self._product(rows.to(self.compute_dtype), self._operand())[:count].to(self.dtype)

    def _rung(self, x: Tensor, weight: Tensor, ladder: tuple[int, ...]) -> Tensor:
        n = len(x)
        if n == 0:
            return x.new_zeros(0, self.out_features)
        m = padded(n, ladder)
        if m != n:
            x = F.pad(x, (0, 0, 0, m - n))
        elif x.data_ptr() % 64 or not x.is_contiguous():
            x = x.clone(memory_format=torch.contiguous_format)  # kernels may choose by alignment
        return self._product(x, weight)[:n]


def probe_row_sum(widths: Iterable[int], device: torch.device) -> None:
    """Raise NumericsError unless `row_sum` gives a row the same bits alone and among others."""
    for width in sorted(set(widths)):
        x = sample(64, width, dtype=torch.float32, device=device)
        with OneThread():
            truth = row_sum(x)
        for n in (1, 2, 3, 5, 8, 17, 64):
            for at in {0, 64 - n}:
                if not torch.equal(row_sum(x[at : at + n]), truth[at : at + n]):
                    raise NumericsError(
                        f"row sum of width {width}: {n} rows differ from 64; accepted: --numerics fast"
                    )
