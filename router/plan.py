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
    workers = destination[experts]  # [R]
    parcels = []
    for worker in np.flatnonzero(np.bincount(workers[workers >= 0])):
        chosen = workers == worker
        parcels.append(_parcel(int(worker), places[chosen], experts[chosen], len(expert_ids)))
    return DispatchPlan(tuple(parcels), missing)


def _choose(
    experts: Indices, placement: Placement, layer: int, lost: frozenset[Member]
) -> tuple[Indices, frozenset[int]]:
    """The worker of each activated expert, [E], -1 where there is none; and those experts."""
    counts = np.bincount(experts, minlength=placement.num_experts)
    if counts.size != placement.num_experts:
        raise ValueError(f"expert_ids: {counts.size - 1}; must be below {placement.num_experts}")
    activated = np.flatnonzero(counts)
    holders = placement.holder_table[layer, activated]  # [activated, most replicas], -1: no more
    if lost:
        alive = np.array([worker.member not in lost for worker in placement.workers] + [False])
        holders = np.where(alive[holders], holders, -1)
    num_live = np.count_nonzero(holders >= 0, axis=1)
    destination = np.full(placement.num_experts, -1, dtype=np.int64)

    pinned = num_live == 1
    destination[activated[pinned]] = holders[pinned].max(axis=1)
    load = np.bincount(holders[pinned].max(axis=1), minlength=len(placement.workers)).tolist()
    several = num_live > 1
    for expert, choices in zip(activated[several].tolist(), holders[several].tolist(), strict=True):
        lightest = min((load[worker], worker) for worker in choices if worker >= 0)[1]
        load[lightest] += 1
        destination[expert] = lightest
    return destination, frozenset(activated[num_live == 0].tolist())


def _parcel(worker: int, places: Indices, experts: Indices, num_tokens: int) -> PlannedParcel:
    token_of = places % num_tokens  # [r]
    present = np.zeros(num_tokens, dtype=np.bool_)
    present[token_of] = True
    row_of = np.cumsum(present, dtype=np.int32) - np.int32(1)  # [T], meaningful where present
    return PlannedParcel(
        worker=worker,
        tokens=torch.from_numpy(np.flatnonzero(present)),
        route_rows=torch.from_numpy(row_of[token_of]),
        route_experts=torch.from_numpy(experts.astype(np.int32)),
        positions=torch.from_numpy(places),
    )
