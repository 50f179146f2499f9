"""Routes: which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """expert_ids and weights of T tokens. Legend: T tokens · K experts per token."""

    expert_ids: Tensor  # [T, K] int64, in ascending rank: best score first, ties to the lower id
    weights: Tensor  # [T, K] float32, sums to 1 over K
