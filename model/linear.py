"""Products with weights however they are stored: the one place that knows two ways to hold an FP8 weight.

Either it is dequantised when it is loaded, or it is kept as it is and dequantised for every product: half of
bfloat16's memory, and slower. Both give the same bits in exact mode, so workers of one cluster need not choose
alike. Activations are not quantised.

Legend: n rows · I inputs · O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model import exact
from model.fp8 import Fp8Weight, Weight, scratch

Keep = Literal["dequantised", "fp8"]


def served(weight: Weight, dtype: torch.dtype) -> Tensor:
    """[O, I] in the dtype served."""
    return weight.dequantised(dtype) if isinstance(weight, Fp8Weight) else weight.to(dtype)


def linear(parts: Sequence[Weight], dtype: torch.dtype, numerics: exact.Numerics, keep: Keep) -> exact.Linear:
    """One product for weights [O_p, I] that share their input, outputs side by side, computed in `dtype`."""
    if keep == "fp8" and any(isinstance(part, Fp8Weight) for part in parts):
        return KeptLinear(parts, dtype, numerics)
    weights = [served(part, dtype) for part in parts]
    return exact.Linear(weights[0] if len(weights) == 1 else torch.cat(weights), numerics)


class KeptLinear(exact.Linear):
    """x [n, I] -> x W^T [n, O] as exact.Linear of the dequantised weight gives it, to the last bit if exact.

    For every call the weight is put together, dequantised, in memory that the calling thread reuses.
    """

    def __init__(self, parts: Sequence[Weight], dtype: torch.dtype, numerics: exact.Numerics) -> None:
        self._parts = [part.clone() if isinstance(part, Fp8Weight) else part.to(dtype).clone() for part in parts]
        first = parts[0].codes if isinstance(parts[0], Fp8Weight) else parts[0]
        self._describe(sum(part.shape[0] for part in parts), parts[0].shape[1], dtype, first.device)
        self.kept_as, self.nbytes = "fp8", sum(part.nbytes for part in self._parts)
        self.is_packed, self.ladder = False, None
        if numerics == "exact":
            self.is_packed, self.ladder = self._as_dequantised()

    def _operand(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        out = scratch("weight", self.compute_dtype, math.prod(shape), self.device).view(shape)
        for part, rows in zip(self._parts, out.split([part.shape[0] for part in self._parts]), strict=True):
            if isinstance(part, Fp8Weight):
                part.write(rows, self.dtype)
            else:
                rows.copy_(part)
        return exact.packed(out) if self.is_packed else out

    def _as_dequantised(self) -> tuple[bool, tuple[int, ...] | None]:
        """Whether to pack the weight for each call, and the row counts that give what the twin gives.

        Packing costs more than it saves on a weight used once, so it is done only where the plain kernel was
        seen to differ from the packed one, which the twin may use.
        """
        key = (self.out_features, self.in_features, self.dtype, self.device, torch.get_num_threads())
        if key not in _ways:
            twin = exact.Linear(torch.cat([served(part, self.dtype) for part in self._parts]), "exact")
            if not twin.is_packed:  # the twin's own kernel, on a weight at as round an address
                _ways[key] = False, twin.ladder
                return _ways[key]
            x, truth = twin.probe()
            plain = self._operand()
            agrees = functools.partial(exact.rows_agree, lambda rows: F.linear(rows, plain), x, truth)
            try:
                _ways[key] = False, exact.rungs(exact.smallest_first_rung(agrees, twin.name))
            except exact.NumericsError:
                _ways[key] = twin.is_packed, twin.ladder
        return _ways[key]


_ways: dict[tuple[object, ...], tuple[bool, tuple[int, ...] | None]] = {}
