"""SwiGLU experts: w2(silu(w1 x) * w3 x), each expert's rows computed together.

Legend: H hidden · F expert hidden · r routes, each one row for one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import exact
from model.fp8 import Weight
from model.linear import Keep, linear


class Expert:
    """One expert's weights, ready to multiply."""

    def __init__(
        self,
        w1: Weight,
        w3: Weight,
        w2: Weight,
        dtype: torch.dtype,
        numerics: exact.Numerics,
        keep: Keep = "dequantised",
    ) -> None:
        """w1 (gate), w3 (up): [F, H]; w2 (down): [H, F]; computed in `dtype`, whatever they are stored in."""
        self.width = w1.shape[0]
        self.gate_up = linear((w1, w3), dtype, numerics, keep)  # one product instead of two
        self.down = linear((w2,), dtype, numerics, keep)
        self.kept_as = self.gate_up.kept_as
        """bfloat16, float32 or fp8."""
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, H] -> [n, H] in the weights' dtype; bf16 is rounded after each product and the activation."""
        both = self.gate_up(rows).float()
        hidden = exact.silu(both[:, : self.width].contiguous()) * both[:, self.width :]
        return self.down(hidden.to(rows.dtype))


def grouped(
    experts: dict[int, Expert], rows: Tensor, expert_ids: Tensor, between: Callable[[], None] = lambda: None
) -> Tensor:
    """Row i through expert expert_ids[i]: rows [r, H], expert_ids [r] on the host -> [r, H] on the rows' device.

    Every id must be a key of `experts`. `between`: called after each expert, for who must not fall silent. The
    loop over experts present is the oracle of faster kernels.
    """
    out = torch.empty_like(rows)
    order = torch.argsort(expert_ids, stable=True)
    present, counts = torch.unique_consecutive(expert_ids[order], return_counts=True)
    order, at = order.to(rows.device), 0
    for expert_id, count in zip(present.tolist(), counts.tolist(), strict=True):
        mine = order[at : at + count]
        out[mine] = experts[expert_id](rows[mine])
        at += count
        between()
    return out
