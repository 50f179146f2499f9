"""Root-mean-square norm and partial rotary embedding (MiniMax-M2: `reference/model.md` section 1).

Computed in float32 and rounded once, so that bf16 models lose nothing on the way; exact per row.
Legend: T tokens · H width · N heads · D head width · R rotary width (the first R of D are rotated).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import exact
from model.device import HOST


class RmsNorm:
    """x [T, H] -> x / rms(x) * weight, in x's dtype. The statistic runs over the whole last axis."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.float()
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        x32 = x.float()
        mean = exact.row_sum(x32 * x32) / x.shape[-1]
        scale = 1.0 / torch.sqrt(mean + self.eps)
        return (x32 * scale.unsqueeze(-1) * self.weight).to(x.dtype)


class HeadNorm:
    """x [T, N*D] -> the same shape: an RMS of each head's D channels, before heads are turned."""

    def __init__(self, weight: Tensor, head_dim: int, eps: float) -> None:
        """weight [D]: gains shared by all heads; [N*D]: each head's own."""
        self.head_dim = head_dim
        self.norm = RmsNorm(weight.reshape(-1, head_dim), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(len(x), -1, self.head_dim)).view(len(x), -1)


class Rotary:
    """Rotates pairs (i, i + R/2) of each head by position * theta^(-2i/R); dims from R on stay."""

    def __init__(self, rotary_dim: int, theta: float, positions: int, device: torch.device) -> None:
        """Angles are made on the host: the same table on every device."""
        self.half = rotary_dim // 2
        step = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=HOST) / rotary_dim
        angle = torch.arange(positions, dtype=torch.float32, device=HOST)[:, None] * (1.0 / theta**step)
        self.cos, self.sin = (table.to(device) for table in exact.cos_sin(angle))  # [positions, R/2] each

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [T, N, D], positions [T] -> [T, N, D]."""
        cos = self.cos[positions].unsqueeze(1)  # [T, 1, R/2]
        sin = self.sin[positions].unsqueeze(1)
        first = x[..., : self.half].float()
        second = x[..., self.half : 2 * self.half].float()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
        return torch.cat((turned, x[..., 2 * self.half :]), -1)
