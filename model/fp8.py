"""Weights in FP8 blocks of 128 x 128, as the released checkpoints store them.

    W[i, j] = float32(codes[i, j]) * scale_inv[i // 128, j // 128]

That product is float32; it is then rounded to the dtype served. Matrices whose sides are no multiple of 128 end in
narrower blocks.

Legend: I inputs · O outputs · R = ceil(O/128) · C = ceil(I/128).
"""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
CODE_MAX = 448.0  # the largest finite float8_e4m3fn
SCALE_MAX = 128.0
"""Scales stay below it: weights beyond 57,344 are no weights, and 2^120 times a scale must be finite."""

_NAN = 0x7F  # with either sign: the only codes that are not finite
_TO_BF16 = 1 << 4
_SIGN_AND_CODE = 0x87F0 - (1 << 16)
_EXPONENTS_APART = 2.0**120
"""Shifted into bfloat16's place, a code's exponent counts from 127 instead of 7."""


class Fp8Weight:
    """One weight as stored."""

    def __init__(self, codes: Tensor, scale_inv: Tensor) -> None:
        """codes [O, I] float8_e4m3fn, scale_inv [R, C] float32, 0 < scale_inv < SCALE_MAX."""
        self.codes, self.scale_inv = codes, scale_inv
        self.nbytes = codes.nbytes + scale_inv.nbytes

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def is_finite(self) -> bool:
        return bool(((self.codes.view(torch.int8) & _NAN).amax() != _NAN).item())

    def to(self, device: torch.device) -> Fp8Weight:
        return Fp8Weight(self.codes.to(device), self.scale_inv.to(device))

    def clone(self) -> Fp8Weight:
        """A copy in memory of its own: a stored weight is mapped from its file."""
        return Fp8Weight(self.codes.clone(), self.scale_inv.clone())

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[O, I] in bfloat16 or float32."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.write(out, dtype)
        return out

    def write(self, out: Tensor, dtype: torch.dtype) -> None:
        """Values of `dtype` into `out` [O, I], which may be wider.

        The library converts one code at a time, 3 ns each. A code shifted by four bits is a bfloat16, its value
        times 2^-120, subnormals included: that takes whole vectors, and the factor goes into the scale, exactly.
        """
        height, width = self.shape
        device = self.codes.device
        codes, across = self.codes.view(torch.int8), self.scale_inv.shape[1]
        for block, top in enumerate(range(0, height, BLOCK)):
            rows = min(BLOCK, height - top)
            bits = scratch("bits", torch.int16, rows * width, device).view(rows, width)
            blocks = scratch("values", torch.float32, rows * across * BLOCK, device).view(rows, across, BLOCK)
            values = blocks.view(rows, across * BLOCK)[:, :width]
            bits.copy_(codes[top : top + rows]).mul_(_TO_BF16).bitwise_and_(_SIGN_AND_CODE)
            values.copy_(bits.view(torch.bfloat16))
            blocks.mul_((self.scale_inv[block] * _EXPONENTS_APART).unsqueeze(1))
            out[top : top + rows].copy_(values if out.dtype == dtype else values.to(dtype))


Weight = Tensor | Fp8Weight


def quantise(weight: Tensor) -> Fp8Weight:
    """[O, I] finite float32, each block by its own largest magnitude: scale_inv = amax / 448."""
    height, width = weight.shape
    down, across = math.ceil(height / BLOCK), math.ceil(width / BLOCK)
    padded = F.pad(weight, (0, across * BLOCK - width, 0, down * BLOCK - height))
    blocks = padded.view(down, BLOCK, across, BLOCK)
    largest = blocks.abs().amax((1, 3))
    scale_inv = torch.where(largest > 0, largest / CODE_MAX, 1.0)
    scaled = (blocks / scale_inv[:, None, :, None]).clamp(-CODE_MAX, CODE_MAX).view(padded.shape)
    return Fp8Weight(scaled[:height, :width].to(torch.float8_e4m3fn).contiguous(), scale_inv)


_reused = threading.local()


def scratch(role: str, dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """[count], contents undefined: valid until this thread asks for the same role, dtype and device again."""
    name = f"{role}-{dtype}-{device}"
    held: Tensor | None = getattr(_reused, name, None)
    if held is None or len(held) < count:
        with torch.inference_mode(False):  # else it could not be written outside of inference mode
            held = torch.empty(count, dtype=dtype, device=device)
        setattr(_reused, name, held)
    return held[:count]
