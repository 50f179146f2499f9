"""SwiGLU experts: w2(silu(w1 x) * w3 x), each expert's rows computed together.

Legend: H hidden · F expert hidden · n rows · r routes, each one row for one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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
        self.gate_up = linear((w1, w3), dtype, numerics, keep)  # one product instead of two
        self.down = linear((w2,), dtype, numerics, keep)
        self.kept_as = self.gate_up.kept_as
        """bfloat16, float32 or fp8."""
        self.nbytes = self.gate_up.nbytes + self.down.nbytes


def grouped(
    experts: dict[int, Expert],
    rows: Tensor,
    route_rows: Tensor,
    expert_ids: Tensor,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Route i is row route_rows[i] through expert expert_ids[i]: [r, H], in the order of the routes.

    rows [n, H] on the experts' device; route_rows, expert_ids [r] on the host, every id a key of `experts`.
    bf16 is rounded after each product and the activation. `between`: called after each of an expert's two
    products, for who must not fall silent.

    One product after the other for each expert present; all that is elementwise, once for all of them.
    """
    order = torch.argsort(expert_ids, stable=True)
    present, counts = torch.unique_consecutive(expert_ids[order], return_counts=True)
    r = len(order)
    if r == 0:
        return rows.new_empty(0, rows.shape[1])
    runs = list(zip(present.tolist(), counts.cumsum(0).tolist(), counts.tolist(), strict=True))
    mine = _with_room(rows, route_rows[order].to(rows.device))
    parts = []
    for expert_id, end, count in runs:
        parts.append(experts[expert_id].gate_up.rows_of(mine, end - count, count))
        between()
    both = torch.cat(parts).float()
    width = both.shape[1] // 2
    hidden = exact.silu(both[:, :width].contiguous()) * both[:, width:]  # [r, F]
    hidden = F.pad(hidden.to(rows.dtype), (0, 0, 0, exact.ROWS_MAX))
    parts.clear()
    for expert_id, end, count in runs:
        parts.append(experts[expert_id].down.rows_of(hidden, end - count, count))
        between()
    return torch.empty_like(mine[:r]).index_copy_(0, order.to(rows.device), torch.cat(parts))


def _with_room(rows: Tensor, picked: Tensor) -> Tensor:
    """rows[picked] [r, H], and zeros behind: see `Linear.rows_of`."""
    r = len(picked)
    taken = rows.new_empty(r + exact.ROWS_MAX, rows.shape[1])
    torch.index_select(rows, 0, picked, out=taken[:r])
    taken[r:].zero_()
    return taken
