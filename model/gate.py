"""The gate: which experts a token goes to, and with what weight. Runs on the attention side only.

Legend: T tokens · H hidden · E experts · K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model import exact


@dataclass(frozen=True)
class Routes:
    """expert_ids and weights of T tokens."""

    expert_ids: Tensor  # [T, K] int64, in ascending rank: best score first, ties to the lower id
    weights: Tensor  # [T, K] float32, sums to 1 over K


class Gate:
    """Sigmoid scores in float32; the correction bias chooses, the unbiased scores weigh."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, experts_per_token: int, numerics: exact.Numerics
    ) -> None:
        """weight [E, H] and bias [E], both taken as float32 whatever the model's dtype."""
        self.linear = exact.Linear(weight.float(), numerics)
        self.bias = bias.float() if bias is not None else None
        self.experts_per_token = experts_per_token

    def __call__(self, normed: Tensor) -> Routes:
        """normed [T, H] -> Routes [T, K]."""
        scores = exact.sigmoid(self.linear(normed.float()))  # [T, E]
        chosen_by = scores if self.bias is None else scores + self.bias
        # Stable, so that ties go to the lower expert id; torch.topk promises no order among equals.
        order = torch.sort(chosen_by, dim=-1, descending=True, stable=True).indices
        ids = order[:, : self.experts_per_token]
        weights = scores.gather(1, ids)
        total = weights[:, 0]
        for k in range(1, self.experts_per_token):
            total = total + weights[:, k]
        return Routes(ids, weights / total[:, None])
