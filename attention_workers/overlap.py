"""How long a step takes in m microbatches: MegaScale-Infer's condition (arXiv 2504.02263), costs as measured.

A microbatch of b rows costs T = a * b + c in attention (T_a: all that keeps the attention worker busy), at the
experts (T_e) and in exchange (T_c, there and back). For a layer each microbatch goes the whole round T_a + T_e +
T_c; meanwhile the others' rounds go on, and whatever serves one at a time serves m of them: attention, the
experts, and in each direction the part of the exchange that grows with rows, which is what a bandwidth costs. So a
layer takes

    max(m * T_f, T_a + T_e + T_c)   with  T_f = max(T_a, T_e, half of what grows in T_c)

and m hides the exchange once m >= (T_a + T_e + T_c) / T_f, which for T_a = T_e and one way T_c / 2 is the paper's
m >= 2 (1 + one way / T_f). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_FORGET = 0.98  # of what was seen, with each further step: some fifty steps count
_SPREAD_MIN = 0.1  # of row counts, relative to their mean, below which they are one and no slope can be told


class Affine(NamedTuple):
    """Cost of b rows: slope * b + fixed, neither negative."""

    slope: float
    fixed: float

    def at(self, rows: float) -> float:
        return self.slope * rows + self.fixed


class Costs(NamedTuple):
    """Of one microbatch at one layer."""

    attention: Affine
    experts: Affine
    exchange: Affine  # there and back


@dataclass
class Fit:
    """Least squares of costs over rows, older ones counting less. Five sums, however long it is fed."""

    weight: float = 0.0
    rows: float = 0.0
    cost: float = 0.0
    rows_rows: float = 0.0
    rows_cost: float = 0.0

    def add(self, rows: float, cost: float) -> None:
        self.weight = _FORGET * self.weight + 1
        self.rows = _FORGET * self.rows + rows
        self.cost = _FORGET * self.cost + cost
        self.rows_rows = _FORGET * self.rows_rows + rows * rows
        self.rows_cost = _FORGET * self.rows_cost + rows * cost

    def line(self) -> Affine | None:
        """None before anything was seen. Where all was seen at one row count, no slope can be told: then the most
        hopeful for small slices, all of it growing with rows."""
        if not self.weight:
            return None
        mean_rows, mean_cost = self.rows / self.weight, self.cost / self.weight
        variance = self.rows_rows / self.weight - mean_rows**2
        if variance < (_SPREAD_MIN * mean_rows) ** 2:
            return Affine(mean_cost / mean_rows, 0.0)
        slope = max(0.0, (self.rows_cost / self.weight - mean_rows * mean_cost) / variance)
        fixed = mean_cost - slope * mean_rows
        return Affine(slope, fixed) if fixed >= 0 else Affine(mean_cost / mean_rows, 0.0)


def step_cost(costs: Costs, rows: float, microbatches: int, layers: int) -> float:
    """Of all layers, for `rows` in so many even slices, in the unit of the costs."""
    each = rows / microbatches
    attention, experts, exchange = (cost.at(each) for cost in costs)
    slowest = max(attention, experts, costs.exchange.slope * each / 2)
    round_trip = attention + experts + exchange
    return round_trip + (layers - 1) * max(microbatches * slowest, round_trip) + (microbatches - 1) * slowest


def hides_from(costs: Costs, rows_each: float) -> float:
    """The number of microbatches of so many rows from which on the exchange is hidden: 2 (1 + T_c / T_f)."""
    attention, experts, exchange = (cost.at(rows_each) for cost in costs)
    slowest = max(attention, experts, costs.exchange.slope * rows_each / 2)
    return (attention + experts + exchange) / slowest if slowest else 1.0
