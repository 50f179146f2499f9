"""Reply rows -> the experts' sum of every token, in one order whoever computed them.

Rows travel unweighted and are summed here in ascending rank, with separate multiply and add in float32: both
are exact functions of their own element, so batch, placement and replica leave no trace in any bit. A fused
multiply-add would, and so do sums per worker, which are the replies where numerics are fast and rows.py says so.
Legend: T tokens · K experts per token · H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOST = torch.device("cpu")


def empty_ranks(num_tokens: int, num_ranks: int, hidden: int, device: torch.device = HOST) -> Tensor:
    """[K * T, H] float32 for the rows of every position (see router.plan); not initialised."""
    return torch.empty(num_ranks * num_tokens, hidden, dtype=torch.float32, device=device)


def place(ranks: Tensor, positions: Tensor, rows: Tensor) -> None:
    """Put one reply's rows [r, H] (bfloat16 or float32), on the same device, at their positions [r] of the host;
    `rows` may go afterwards."""
    ranks.index_copy_(0, positions.to(ranks.device), rows.to(torch.float32))


def merge(ranks: Tensor, weights: Tensor) -> Tensor:
    """[T, H] float32: from zero, + weights[t, k] * row(t, k), k ascending. Uses up `ranks`.

    Every position must have been placed.
    """
    num_tokens, num_ranks = weights.shape
    hidden = ranks.shape[1]
    rows = ranks.view(num_ranks, num_tokens, hidden)  # [K, T, H]
    rows.mul_(weights.t().unsqueeze(-1))
    merged = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=ranks.device)
    for rank in rows:
        merged.add_(rank)
    return merged


def empty_sums(num_tokens: int, hidden: int, device: torch.device = HOST) -> Tensor:
    """[T, H] float32 zeros, for replies that are sums."""
    return torch.zeros(num_tokens, hidden, device=device)


def add(sums: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """One reply's sums [n, H] (bfloat16 or float32) on the same device, to those of its tokens [n] of the
    host; `rows` may go afterwards."""
    if len(tokens) == len(sums):
        sums.add_(rows)
    else:
        sums.index_add_(0, tokens.to(sums.device), rows.to(torch.float32))
