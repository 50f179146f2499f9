"""Products in batches, [b, m, I] x [b, I, O] -> [b, m, O] in float32, a row's bits independent of all others.

As `exact.Linear`: row counts from a ladder, probed when made. A GPU's library chooses kernels also by how many
products there are, so there they too have counts from a ladder: what is beyond is cut, what is between is padded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model import exact

COUNTS = (8, 64, 512)
"""Products that run at once on a GPU."""

Ladder = tuple[int, ...]


class Batched:
    """For every (I, O) of `shapes`."""

    def __init__(self, shapes: Sequence[tuple[int, int]], numerics: exact.Numerics, device: torch.device) -> None:
        self._rows: Ladder | None = None
        self._counts: Ladder | None = None
        if numerics == "exact" and device.type == "cpu":
            self._rows = batched_ladder(tuple(shapes), torch.get_num_threads())
        elif numerics == "exact":
            self._rows, self._counts = device_ladders(tuple(shapes), device)

    def height(self, rows: int) -> int:
        """Row count of the left side that holds so many rows."""
        if self._rows is None:
            return rows
        top = self._rows[-1]
        return sum(exact.padded(min(top, rows - at), self._rows) for at in range(0, rows, top))

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """left [b, m, I], its m given by `height`."""
        if self._rows is None or left.shape[1] <= self._rows[-1]:
            return self._in_counts(left, right)
        pieces = left.split(self._rows[-1], 1)
        return torch.cat([self._in_counts(piece.contiguous(), right) for piece in pieces], 1)

    def _in_counts(self, left: Tensor, right: Tensor) -> Tensor:
        if self._counts is None:
            return torch.bmm(left, right)
        most = self._counts[-1]
        pairs = zip(left.split(most), right.split(most), strict=True)
        return torch.cat([_one_count(x, y, self._counts) for x, y in pairs])


def _one_count(left: Tensor, right: Tensor, counts: Ladder) -> Tensor:
    num = len(left)
    beyond = (0, 0, 0, 0, 0, exact.padded(num, counts) - num)
    return torch.bmm(F.pad(left, beyond).contiguous(), F.pad(right, beyond).contiguous())[:num]


@functools.cache
def batched_ladder(shapes: tuple[tuple[int, int], ...], threads: int) -> Ladder:
    """Row counts at which the CPU's products agree for every (I, O) and number of products.

    `threads` keys the cache: the probe runs under the process's current thread count.
    """
    assert threads == torch.get_num_threads()
    first = 1
    for inner, outer in shapes:
        x, y = _samples(5, inner, outer, torch.device("cpu"))
        for right in (y.transpose(1, 2), y.transpose(1, 2).contiguous()):
            with exact.OneThread():
                truth = torch.bmm(x, right)
            agrees = functools.partial(_batch_agrees, x, right, truth)
            first = max(first, exact.smallest_first_rung(agrees, f"batched product {inner}x{outer}"))
    return exact.rungs(first)


def _samples(count: int, inner: int, outer: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[count, ROWS_MAX, I] and [count, O, I]."""
    return (
        exact.sample(count, exact.ROWS_MAX, inner, dtype=torch.float32, device=device),
        exact.sample(count, outer, inner, dtype=torch.float32, device=device),
    )


def _batch_agrees(x: Tensor, right: Tensor, truth: Tensor, m: int) -> bool:
    def same(batches: Iterable[int], at: int) -> bool:
        pick = torch.tensor(list(batches))
        got = torch.bmm(x[pick, at : at + m].clone(), right[pick])
        return torch.equal(got, truth[pick, at : at + m])

    many = [i % len(x) for i in range(37)]
    return all(
        same(batches, at) for batches in ([0], [3], [0, 1], [2, 4, 1], many) for at in (0, exact.ROWS_MAX - m)
    )


@functools.cache
def device_ladders(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Ladder, Ladder]:
    """Row counts, and counts of products, at all of which a GPU's products agree; else one of each.

    Raises NumericsError.
    """
    samples = []
    for inner, outer in shapes:
        x, y = _samples(COUNTS[-1], inner, outer, device)
        samples.append((x, y.transpose(1, 2).contiguous()))
    for rows, counts in _candidates():
        if all(_all_agree(x, right, rows, counts) for x, right in samples):
            return rows, counts
    raise exact.NumericsError(
        f"batched products {shapes}: no row count gives a row the same bits everywhere on {device};"
        " accepted: --numerics fast"
    )


def _candidates() -> Iterator[tuple[Ladder, Ladder]]:
    """What costs least first."""
    for first in exact.FIRST_RUNGS:
        yield exact.rungs(first), COUNTS
    for height in exact.FIXED_HEIGHTS:
        yield (height,), COUNTS
    for height in exact.FIXED_HEIGHTS:
        yield (height,), (COUNTS[1],)


def _all_agree(x: Tensor, right: Tensor, rows: Ladder, counts: Ladder) -> bool:
    """Whether a row has the same bits at each of these sizes, wherever among rows and products it stands."""
    x, right = x[: counts[-1], : rows[-1]].contiguous(), right[: counts[-1]].contiguous()
    truth = torch.bmm(x, right)
    for by in (0, 1, 5):
        moved, factor, expected = x.roll((by, by), (0, 1)), right.roll(by, 0), truth.roll((by, by), (0, 1))
        for m in rows:
            for count in counts:
                for at in {0, rows[-1] - m}:
                    got = torch.bmm(moved[:count, at : at + m].contiguous(), factor[:count].contiguous())
                    if not torch.equal(got, expected[:count, at : at + m]):
                        return False
    return True
