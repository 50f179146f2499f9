"""Plan and merge: whatever the placement, the replicas and the lost, the sum has the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.gate import Routes
from router.merge import empty_ranks, merge, place
from router.placement import EpochId, Member, PlacedWorker, Placement
from router.plan import DispatchPlan, plan
from tests.unit import placement_table

LAYER = 1
HIDDEN = 3


@dataclass(frozen=True)
class Case:
    routes: Routes
    placement: Placement
    lost: frozenset[Member]
    rows: Tensor  # [T, H]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 8))
    num_tokens, num_ranks = draw(st.integers(0, 6)), draw(st.integers(1, num_experts))
    members = [Member(f"expert-{number}", draw(st.integers(1, 3))) for number in range(draw(st.integers(1, 4)))]
    slots = st.sets(st.tuples(st.just(LAYER), st.integers(0, num_experts - 1)))
    workers = tuple(PlacedWorker(member, "", tuple(draw(slots))) for member in members)
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.stack([torch.randperm(num_experts, generator=chance)[:num_ranks] for _ in range(num_tokens)] or
                      [torch.zeros(num_ranks, dtype=torch.int64)])[:num_tokens]  # fmt: skip
    weights = torch.rand(num_tokens, num_ranks, generator=chance)
    rows = torch.randn(num_tokens, HIDDEN, generator=chance)
    table = Placement(EpochId(1, 1), "abc", LAYER + 1, num_experts, workers)
    return Case(Routes(ids, weights), table, frozenset(draw(st.sets(st.sampled_from(members)))), rows)


def held_by_one(num_experts: int) -> Placement:
    every = tuple((LAYER, expert) for expert in range(num_experts))
    return Placement(EpochId(1, 2), "abc", LAYER + 1, num_experts, (PlacedWorker(Member("all", 1), "", every),))


def planned(case: Case) -> DispatchPlan:
    return plan(case.routes, case.placement, LAYER, case.lost)


def run_expert(expert: int, rows: Tensor) -> Tensor:
    """[n, H] -> [n, H]: any function of row and expert will do."""
    return rows * (1.1 + expert) - 0.3 * expert


def direct_sum(case: Case) -> Tensor:
    """[T, H]: token by token, rank by rank, as one would write it on paper."""
    total = torch.zeros(case.rows.shape)
    for token, (ids, weights) in enumerate(zip(case.routes.expert_ids, case.routes.weights, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            product = weight * run_expert(expert, case.rows[token])
            total[token] = total[token] + product
    return total


def compute(case: Case, ranks: Tensor, plan: DispatchPlan) -> None:
    """Play every expert worker, and place its reply."""
    for parcel in plan.parcels:
        sent = case.rows[parcel.tokens]
        reply = torch.empty(len(parcel.positions), HIDDEN)
        for route, row in enumerate(parcel.route_rows.tolist()):
            reply[route] = run_expert(int(parcel.route_experts[route]), sent[row])
        place(ranks, parcel.positions, reply)


def holders(case: Case, expert: int) -> list[int]:
    """The live ones."""
    return [
        index for index in placement_table.holders(case.placement, LAYER, expert)
        if case.placement.workers[index].member not in case.lost
    ]  # fmt: skip


@given(cases())
def test_each_route_goes_to_one_live_holder_or_is_missing(case: Case) -> None:
    """Nothing is computed twice, nothing is forgotten, nobody gets what it does not hold."""
    result = planned(case)
    num_tokens = len(case.rows)
    seen = []
    for parcel in result.parcels:
        assert len(parcel.positions), "an empty parcel is not worth sending"
        for route, position in enumerate(parcel.positions.tolist()):
            rank, token = divmod(position, num_tokens)
            expert = int(parcel.route_experts[route])
            assert parcel.tokens[parcel.route_rows[route]] == token
            assert case.routes.expert_ids[token, rank] == expert
            assert parcel.worker in holders(case, expert)
            seen.append(position)
    activated = set(case.routes.expert_ids.flatten().tolist())
    assert result.missing == {expert for expert in activated if not holders(case, expert)}
    every = range(case.routes.expert_ids.numel())
    assert sorted(seen) == [
        position for position in every
        if case.routes.expert_ids.t().flatten()[position].item() not in result.missing
    ]  # fmt: skip


@given(cases())
def test_each_row_travels_once_to_each_worker_that_needs_it(case: Case) -> None:
    """Bandwidth follows distinct rows, not routes; one parcel per worker, one worker per expert."""
    result = planned(case)
    assert [parcel.worker for parcel in result.parcels] == sorted({parcel.worker for parcel in result.parcels})
    chosen: dict[int, int] = {}
    for parcel in result.parcels:
        tokens = parcel.tokens.tolist()
        assert tokens == sorted(set(tokens))
        assert set(range(len(tokens))) == set(parcel.route_rows.tolist())
        for expert in parcel.route_experts.tolist():
            assert chosen.setdefault(expert, parcel.worker) == parcel.worker


@given(cases())
def test_planning_is_deterministic(case: Case) -> None:
    """No coordination: whoever plans the same comes to the same."""
    for one, other in zip(planned(case).parcels, planned(case).parcels, strict=True):
        for name in ("tokens", "route_rows", "route_experts", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@given(cases())
def test_replicas_follow_the_rule_of_the_fewest_activated(case: Case) -> None:
    """Against the rule written naively: the sole holder first; then by id to the lightest, ties to the lower."""
    activated = sorted(set(case.routes.expert_ids.flatten().tolist()))
    load = dict.fromkeys(range(len(case.placement.workers)), 0)
    expected = {}
    for several in (False, True):
        for expert in activated:
            choices = holders(case, expert)
            if choices and (len(choices) > 1) == several:
                expected[expert] = min(choices, key=lambda worker: (load[worker], worker))
                load[expected[expert]] += 1
    chosen = {
        expert: parcel.worker for parcel in planned(case).parcels for expert in parcel.route_experts.tolist()
    }
    assert chosen == expected


@given(cases())
def test_plan_and_merge_equal_the_direct_sum_bit_for_bit(case: Case) -> None:
    """Rule 2: placement, replicas and losses leave no trace; what has no holder is planned again later."""
    num_tokens, num_ranks = case.routes.weights.shape
    ranks = empty_ranks(num_tokens, num_ranks, HIDDEN)
    first = planned(case)
    compute(case, ranks, first)
    if first.missing:
        experts = case.routes.expert_ids.t().flatten().tolist()
        unplaced = torch.tensor([position for position, expert in enumerate(experts) if expert in first.missing])
        compute(case, ranks, plan(case.routes, held_by_one(case.placement.num_experts), LAYER, positions=unplaced))
    assert torch.equal(merge(ranks, case.routes.weights), direct_sum(case))


@given(cases())
@settings(max_examples=30)
def test_a_token_does_not_see_who_else_is_in_the_batch(case: Case) -> None:
    """Alone or among others, the same bits."""
    num_tokens, num_ranks = case.routes.weights.shape
    whole = held_by_one(case.placement.num_experts)
    together = direct_sum(case)
    for token in range(num_tokens):
        alone = Case(
            Routes(case.routes.expert_ids[token : token + 1], case.routes.weights[token : token + 1]),
            whole, frozenset(), case.rows[token : token + 1],
        )  # fmt: skip
        ranks = empty_ranks(1, num_ranks, HIDDEN)
        compute(alone, ranks, planned(alone))
        assert torch.equal(merge(ranks, alone.routes.weights)[0], together[token])


def test_the_merge_rounds_after_every_multiply_and_every_add() -> None:
    """A fused multiply-add, or another order, gives other bits: here it would give 0 and 1."""
    tiny = 2.0**-12
    weights = torch.tensor([[1.0, 1.0 + tiny]])
    ranks = empty_ranks(1, 2, 1)
    place(ranks, torch.tensor([0]), torch.tensor([[-(1.0 + 2 * tiny)]]))
    place(ranks, torch.tensor([1]), torch.tensor([[1.0 + tiny]]))
    assert merge(ranks, weights).item() == 0.0  # fused: tiny * tiny, 2^-24
    big = torch.tensor([[1.0, 1.0, 1.0]])
    ranks = empty_ranks(1, 3, 1)
    for rank, value in enumerate((1e8, -1e8, 1.0)):
        place(ranks, torch.tensor([rank]), torch.tensor([[value]]))
    assert merge(ranks, big).item() == 1.0  # descending order: 0


def test_bfloat16_replies_are_summed_in_float32() -> None:
    """What a row lost in bfloat16 is lost; the sum loses nothing more."""
    ranks = empty_ranks(1, 2, 1)
    place(ranks, torch.tensor([0, 1]), torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16))
    merged = merge(ranks, torch.ones(1, 2))
    assert merged.dtype == torch.float32
    assert merged.item() == 257.0


def test_an_expert_the_model_does_not_have_is_refused() -> None:
    """A gate and a placement of different models must not meet silently."""
    table = Placement(EpochId(1, 1), "abc", 1, 2, (PlacedWorker(Member("expert-0", 1), "", ((0, 0), (0, 1))),))
    with pytest.raises(ValueError, match="expert_ids: 2; must be below 2"):
        plan(Routes(torch.tensor([[0, 2]]), torch.ones(1, 2)), table, 0)
