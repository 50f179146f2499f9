"""Routes x placement -> parcels, with the recipe that puts their replies back.

Pure and deterministic: every attention worker decides alone, from what it sees, and needs nobody's consent.
A worker's time follows the number of distinct experts it must run, not the number of rows, so that is what is
balanced (Janus, arXiv 2512.13525: activated-expert-balanced scheduling).

A *position* p = k * T + t names the route of token t at rank k: the recipe is a parcel's positions, in the
order of its routes. Legend: T tokens · K experts per token · R routes planned · n rows and r routes of one
parcel · W workers · E experts of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.gate import Routes
from router.placement import Member, Placement

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class PlannedParcel:
    worker: int  # index in placement.workers
    tokens: Tensor  # [n] int64, ascending: whose rows it carries, each once
    route_rows: Tensor  # [r] int32: which of the n rows
    route_experts: Tensor  # [r] int32
    positions: Tensor  # [r] int64: the recipe


@dataclass(frozen=True)
class DispatchPlan:
    parcels: tuple[PlannedParcel, ...]  # in order of worker
    missing: frozenset[int]  # activated experts without a live holder: in no parcel


def plan(
    routes: Routes,
    placement: Placement,
    layer: int,
    lost: frozenset[Member] = frozenset(),
    positions: Tensor | None = None,
) -> DispatchPlan:
    """Choose a live holder for each activated expert; send each row once to each worker that needs it.

    routes: on the CPU. `positions` [R] int64 limits the plan to these routes (rows planned again).
    """
    expert_ids = routes.expert_ids.numpy()  # [T, K]
    experts = expert_ids.T.reshape(-1)  # [K * T], by position
    if positions is None:
        places = np.arange(experts.size)
    else:
        places = positions.numpy()
        experts = experts[places]
    if experts.size == 0:
        return DispatchPlan((), frozenset())
    destination, missing = _choose(experts, placement, layer, lost)
    return DispatchPlan(_parcels(destination, places, experts, len(expert_ids)), missing)


def _choose(
    experts: Indices, placement: Placement, layer: int, lost: frozenset[Member]
) -> tuple[Indices, frozenset[int]]:
    """The worker of each expert, [E], -1 where there is none; and the activated ones without.

    Of experts with one live holder all are given theirs first; then each of the others, in ascending order, the
    holder with the fewest so far, the first of equals.
    """
    counts = np.bincount(experts, minlength=placement.num_experts)
    if counts.size != placement.num_experts:
        raise ValueError(f"expert_ids: {counts.size - 1}; must be below {placement.num_experts}")
    holders = placement.holder_table[layer]  # [E, most replicas], -1: no more
    if lost:
        holders = _live_first(holders, placement, lost)
    destination = holders[:, 0]
    activated = np.flatnonzero(counts)
    missing = activated[destination[activated] < 0]
    if holders.shape[1] > 1:
        has_choice = holders[activated, 1] >= 0
        several, pinned = activated[has_choice], activated[~has_choice]
        load = np.bincount(destination[pinned] + 1, minlength=len(placement.workers) + 1)[1:].tolist()
        destination = destination.copy()
        destination[several] = _lightest(holders[several].tolist(), load)
    return destination, frozenset(missing.tolist())


def _live_first(holders: Indices, placement: Placement, lost: frozenset[Member]) -> Indices:
    """[E, most replicas]: without those lost, the others in the order they had, then -1."""
    gone = np.array([worker.member in lost for worker in placement.workers] + [True])[holders]  # -1: no holder
    order = np.argsort(gone, axis=1, kind="stable")
    return np.take_along_axis(np.where(gone, -1, holders), order, axis=1)


def _lightest(choices: list[list[int]], load: list[int]) -> list[int]:
    """Of each row the worker with the least `load`, which grows as they are chosen. -1: no choice."""
    chosen = []
    for workers in choices:
        lightest = workers[0]
        for worker in workers[1:]:
            if worker >= 0 and load[worker] < load[lightest]:
                lightest = worker
        load[lightest] += 1
        chosen.append(lightest)
    return chosen


def _parcels(
    destination: Indices, places: Indices, experts: Indices, num_tokens: int
) -> tuple[PlannedParcel, ...]:
    """destination [E]; places and experts [R]. One sort for all parcels, whose parts are slices of it."""
    workers = destination[experts]  # [R]
    order = np.argsort(workers.astype(np.int16), kind="stable")  # of 16 bits numpy sorts by radix
    counts = np.bincount(workers + 1)
    order = order[counts[0] :]  # without those who have nobody
    counts = counts[1:]
    workers, places, experts = workers[order], places[order], experts[order].astype(np.int32)
    token_of = places % num_tokens  # [R]
    cells = workers * num_tokens + token_of
    present = np.zeros(counts.size * num_tokens, dtype=np.bool_)
    present[cells] = True
    row_of = np.cumsum(present, dtype=np.int32)  # counted from 1, over all parcels
    tokens = np.flatnonzero(present)
    last_row = row_of[num_tokens - 1 :: num_tokens]  # [workers]
    first_row = np.concatenate((np.zeros(1, np.int32), last_row[:-1]))
    route_rows = row_of[cells] - np.int32(1) - first_row[workers]
    tokens %= num_tokens
    ends = np.cumsum(counts).tolist()
    parcels = []
    route, row = 0, 0
    for worker, (route_end, row_end) in enumerate(zip(ends, last_row.tolist(), strict=True)):
        if route_end > route:
            parcels.append(
                PlannedParcel(
                    worker,
                    torch.from_numpy(tokens[row:row_end]),
                    torch.from_numpy(route_rows[route:route_end]),
                    torch.from_numpy(experts[route:route_end]),
                    torch.from_numpy(places[route:route_end]),
                )
            )
        route, row = route_end, row_end
    return tuple(parcels)
