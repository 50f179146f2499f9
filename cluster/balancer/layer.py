"""One layer: who holds which expert, how the load divides over the workers, and the one step that helps most.

Load is in any unit that adds up: expert workers count how often each expert's weights were read. An expert with
one holder burdens that one. Of an expert with several, `router.plan` gives each microbatch to the holder that has
the fewest experts to run so far, pinned ones counted first, in ascending order of experts. Over many microbatches
that is a pouring of its load into the lowest of its holders' levels, which is what `divide` computes.

Legend: E experts of the layer · W workers. Pure and deterministic: of equals the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Loads = NDArray[np.float64]
Flags = NDArray[np.bool_]

_TRIED_MAX = 6  # of the best steps by estimate, until one proves to help
_EQUAL = 0.01  # of the mean level: steps as good as one another to within so much
_LEAST = 1e-9  # relative: less is no progress


@dataclass(frozen=True)
class Step:
    """`expert` goes from `source` to `target`; or in exchange for `other`; or is copied and stays as well, perhaps
    in place of a replica that `target` gives up."""

    expert: int
    source: int
    target: int
    other: int = -1  # an expert of the target's that goes to the source
    stays: bool = False
    given_up: int = -1  # an expert of the target's that others hold too


class Found(NamedTuple):
    """A step, and what it would lead to."""

    step: Step
    amounts: Loads  # [E, W]
    levels: Loads  # [W]

    @property
    def ends(self) -> float:
        """The higher of both ends' levels."""
        return float(max(self.levels[self.step.source], self.levels[self.step.target]))


@dataclass
class Layer:
    load: Loads  # [E]
    held: Flags  # [E, W]
    had: Flags  # [E, W]: what workers hold now, whatever is planned: to hold anything else they must load it
    hosts: NDArray[np.int64]  # [W]: which host each worker is on
    replicas: int
    """Holders that every expert should keep, on as many hosts, where it has them."""
    together: Loads | None = None  # [E, E]: how often two experts were asked for by one token
    amounts: Loads = field(init=False)  # [E, W]: each holder's part of an expert's load
    levels: Loads = field(init=False)  # [W]
    mean: float = field(init=False)  # of the levels, whatever the placement

    def __post_init__(self) -> None:
        self.mean = float(self.load.sum()) / self.held.shape[1]
        self.refresh()

    @property
    def busiest(self) -> float:
        return float(self.levels.max())

    def refresh(self) -> None:
        """After `held` has changed."""
        self.amounts = divide(self.load, self.held)
        self.levels = self.amounts.sum(axis=0)

    def apply(self, step: Step, amounts: Loads | None = None) -> None:
        """amounts [E, W]: what it leads to, where that is known."""
        self._set(step)
        self.amounts = divide(self.load, self.held) if amounts is None else amounts
        self.levels = self.amounts.sum(axis=0)

    def _set(self, step: Step) -> None:
        self.held[step.expert, step.target] = True
        self.held[step.expert, step.source] = step.stays
        if step.given_up >= 0:
            self.held[step.given_up, step.target] = False
        if step.other >= 0:
            self.held[step.other, step.target] = False
            self.held[step.other, step.source] = True

    def outcome(self, step: Step) -> Loads:
        """[E, W]: the amounts after this step, which is not taken."""
        before = self.held.copy()
        self._set(step)
        amounts = divide(self.load, self.held)
        self.held[...] = before
        return amounts

    def cost(self, step: Step) -> int:
        """Experts whose weights must be loaded for it beyond what is to be loaded already; may be negative."""
        loads = int(not self.had[step.expert, step.target])
        if not step.stays:
            loads -= int(not self.had[step.expert, step.source])
        if step.given_up >= 0:
            loads -= int(not self.had[step.given_up, step.target])
        if step.other >= 0:
            loads += int(not self.had[step.other, step.source]) - int(not self.had[step.other, step.target])
        return loads

    @property
    def num_loads(self) -> int:
        """Experts whose weights must be loaded."""
        return int((self.held & ~self.had).sum())

    # Steps that relieve a worker.

    def best_rearrangement(self, source: int, has_room: Flags, left: int) -> Found | None:
        """The move or exchange that leaves the higher of both ends' levels lowest. `has_room` [W]; `left`: what it
        may cost."""
        return self._first_helpful([*self._moves(source, has_room, left), *self._exchanges(source, left)])

    def best_copy(self, source: int, has_room: Flags) -> Found | None:
        """The further replica, of an expert that `source` holds, that relieves it most: on a worker with room, or
        in the place of the replica that a worker can best do without."""
        experts = np.flatnonzero(self.held[:, source])
        given_up = self._least_needed()
        surplus = np.clip((self.levels[source] - self.levels) / 2, 0, None)  # [W]: what may be poured into each
        poured = np.minimum(self.amounts[experts, source][:, None], surplus[None, :])
        poured[self.held[experts] | ~(has_room | (given_up >= 0))[None, :]] = 0
        best = np.argsort(-poured, axis=None, kind="stable")[:_TRIED_MAX]
        found = []
        for flat in best[poured.reshape(-1)[best] > 0].tolist():
            row, target = divmod(flat, len(self.levels))
            after = self.levels[source] - poured[row, target]
            gone = -1 if has_room[target] else int(given_up[target])
            found.append((float(after), Step(int(experts[row]), source, target, stays=True, given_up=gone)))
        return self._first_helpful(found)

    def _least_needed(self) -> NDArray[np.int64]:
        """[W]: of the replicas beyond those each expert should have, the one that each worker is least asked for;
        -1: it has none."""
        extra = np.count_nonzero(self.held, axis=1) > self.replicas
        if not extra.any():
            return np.full(len(self.levels), -1)
        amounts = np.where(self.held & extra[:, None] & self._spread_without(), self.amounts, np.inf)
        least = amounts.argmin(axis=0)
        return np.where(np.isfinite(amounts[least, np.arange(len(least))]), least, -1)

    def best_move(self, source: int, has_room: Flags) -> Step | None:
        """As `best_rearrangement`, of moves alone, and whether or not it helps: for a worker that is too full."""
        moves = self._moves(source, has_room, 1, must_help=False)
        return min(moves, key=lambda found: found[0])[1] if moves else None

    def _moves(self, source: int, has_room: Flags, left: int, must_help: bool = True) -> list[tuple[float, Step]]:
        experts = np.flatnonzero(self.held[:, source])
        amount = self.amounts[experts, source][:, None]
        after = np.maximum(self.levels[source] - amount, self.levels[None, :] + amount)
        after[self.held[experts] | ~has_room[None, :] | ~self.may_go(source)[experts]] = np.inf
        if left < 1:
            after[self._loads(experts, source) > left] = np.inf
        bound = self.levels[source] if must_help else np.inf
        return [
            (value, Step(int(experts[row]), source, target)) for value, row, target in _least(after, float(bound))
        ]

    def _loads(self, experts: NDArray[np.int64], source: int) -> NDArray[np.int64]:
        """[n, W]: what it costs to move these from `source` to each worker."""
        return np.asarray(self.had[experts, source][:, None].astype(np.int64) - self.had[experts])

    def _exchanges(self, source: int, left: int) -> list[tuple[float, Step]]:
        mine = np.flatnonzero(self.held[:, source])
        others, targets = np.nonzero(self.held & ~self.held[:, source][:, None])  # that the source does not hold
        if not others.size:
            return []
        gives = self.amounts[mine, source][:, None] - self.amounts[others, targets][None, :]
        after = np.maximum(self.levels[source] - gives, self.levels[targets][None, :] + gives)
        after[self.held[mine][:, targets] | ~self.may_go(source)[mine][:, targets]] = np.inf
        after[:, ~self.may_come(source)[others, targets]] = np.inf
        if left < 2:
            back = self.had[others, targets].astype(np.int64) - self.had[others, source]
            after[self._loads(mine, source)[:, targets] + back > left] = np.inf
        return [
            (value, Step(int(mine[row]), source, int(targets[column]), int(others[column])))
            for value, row, column in _least(after, float(self.levels[source]))
        ]

    def _first_helpful(self, found: list[tuple[float, Step]]) -> Found | None:
        """Of the best by estimate, the first that lowers the levels: of those about equal, one that loads less and
        parts co-activated experts."""
        found.sort(key=lambda pair: pair[0])
        if found:
            equal = [pair for pair in found if pair[0] <= found[0][0] + _EQUAL * self.mean]
            found[: len(equal)] = sorted(equal, key=lambda p: (self.cost(p[1]), self._joined_by(p[1]), p[0]))
        now = float(np.square(self.levels).sum())
        for _, step in found[:_TRIED_MAX]:
            amounts = self.outcome(step)
            levels = amounts.sum(axis=0)
            if levels.max() <= self.busiest * (1 + _LEAST) and np.square(levels).sum() < now * (1 - _LEAST):
                return Found(step, amounts, levels)
        return None

    # Who may be where.

    def may_go(self, source: int) -> Flags:
        """[E, W]: leaving `source` for each worker keeps an expert's replicas on as many hosts as it needs."""
        if self.hosts.max(initial=0) == 0:
            return np.ones_like(self.held)
        at_host = self._at_hosts()  # [E, hosts]
        at_host[:, self.hosts[source]] -= self.held[:, source]
        left = (at_host > 0).sum(axis=1)
        after = left[:, None] + (at_host[:, self.hosts] == 0)
        return np.asarray(after >= self._hosts_needed()[:, None])

    def may_come(self, source: int) -> Flags:
        """[E, W]: likewise for coming to `source` from each worker."""
        if self.hosts.max(initial=0) == 0:
            return np.ones_like(self.held)
        at_host = self._at_hosts()
        left = at_host[:, self.hosts] - self.held  # [E, W]: of the worker's host, without it
        after = (at_host > 0).sum(axis=1)[:, None] - ((left == 0) & self.held)
        after += (at_host[:, self.hosts[source]] == 0)[:, None] | (
            (left == 0) & (self.hosts == self.hosts[source])
        )
        return np.asarray(after >= self._hosts_needed()[:, None])

    def may_move(self, expert: int, source: int, target: int) -> bool:
        """As `may_go`, of one expert."""
        return bool(self.may_go(source)[expert, target])

    def on_hosts(self) -> Flags:
        """[E, hosts]: which hosts have a holder."""
        return self._at_hosts() > 0

    def hosts_lacking(self) -> Flags:
        """[E]: whether replicas that should be on distinct hosts share one."""
        wanted = np.minimum(np.minimum(self.held.sum(axis=1), self.replicas), int(self.hosts.max()) + 1)
        return np.asarray(self.on_hosts().sum(axis=1) < wanted)

    def is_spread_without(self, expert: int, worker: int) -> bool:
        """Whether its other holders are on as many hosts as it needs."""
        return bool(self._spread_without()[expert, worker])

    def _spread_without(self) -> Flags:
        """[E, W]: likewise of each."""
        if self.hosts.max(initial=0) == 0:
            return np.ones_like(self.held)
        at_host = self._at_hosts()
        is_alone = self.held & (at_host[:, self.hosts] == 1)
        return np.asarray((at_host > 0).sum(axis=1)[:, None] - is_alone >= self._hosts_needed()[:, None])

    def is_as_safe(self, held: Flags) -> bool:
        """Whether `held` [E, W] keeps as many holders of each expert as it needs, on as many hosts."""
        needed = np.minimum(self.held.sum(axis=1), self.replicas)
        if (held.sum(axis=1) < needed).any():
            return False
        at_hosts = [held[:, self.hosts == host].any(axis=1) for host in range(int(self.hosts.max()) + 1)]
        return bool((np.sum(at_hosts, axis=0) >= self._hosts_needed()).all())

    def _at_hosts(self) -> NDArray[np.int64]:
        """[E, hosts]: holders of each expert on each host."""
        return np.stack(
            [self.held[:, self.hosts == host].sum(axis=1) for host in range(int(self.hosts.max()) + 1)], axis=1
        )

    def _hosts_needed(self) -> NDArray[np.int64]:
        return np.asarray(np.minimum((self._at_hosts() > 0).sum(axis=1), self.replicas))

    def _joined_by(self, step: Step) -> float:
        """How much more often, after this step, one token would ask one worker for two of its experts."""
        if self.together is None:
            return 0.0
        company = self.together @ self.held  # [E, W]
        joined = company[step.expert, step.target]
        if not step.stays:
            joined -= company[step.expert, step.source]
        if step.other >= 0:
            joined += company[step.other, step.source] - company[step.other, step.target]
            joined -= 2 * self.together[step.expert, step.other]
        return float(joined)


def divide(load: Loads, held: Flags) -> Loads:
    """load [E] over its holders [E, W] -> [E, W]: what of each expert each worker is asked for."""
    counts = np.count_nonzero(held, axis=1)
    amounts = np.zeros(held.shape)
    single = np.flatnonzero(counts == 1)
    amounts[single, held[single].argmax(axis=1)] = load[single]
    several = np.flatnonzero(counts > 1)
    if not several.size:
        return amounts
    levels: list[float] = amounts.sum(axis=0).tolist()
    rows, workers = np.nonzero(held[several])
    ends = np.cumsum(counts[several]).tolist()
    poured: list[float] = []
    holders, begin = workers.tolist(), 0
    for amount, end in zip(load[several].tolist(), ends, strict=True):
        if end - begin == 2:  # most often: written out
            one, two = holders[begin], holders[begin + 1]
            first = (amount + levels[two] - levels[one]) / 2
            first = 0.0 if first < 0 else amount if first > amount else first
            levels[one] += first
            levels[two] += amount - first
            poured += (first, amount - first)
        else:
            poured += _pour(amount, holders[begin:end], levels)
        begin = end
    amounts[several[rows], workers] = poured
    return amounts


def _pour(amount: float, holders: list[int], levels: list[float]) -> list[float]:
    """Raise the lowest of the holders' levels until all of `amount` is given: what each was given."""
    order = sorted(holders, key=levels.__getitem__)
    total, surface = amount, math.inf
    for count, holder in enumerate(order, start=1):
        if levels[holder] >= surface:
            break
        total += levels[holder]
        surface = total / count
    given = []
    for holder in holders:
        more = max(0.0, surface - levels[holder])
        levels[holder] += more
        given.append(more)
    return given


def _least(after: Loads, bound: float) -> list[tuple[float, int, int]]:
    """The smallest few below `bound`, smallest first: (value, row, column)."""
    flat = after.reshape(-1)
    few = 4 * _TRIED_MAX
    best = np.argpartition(flat, few)[:few] if flat.size > few else np.arange(flat.size)
    best = best[np.lexsort((best, flat[best]))]
    return [(float(flat[i]), *divmod(int(i), after.shape[1])) for i in best if flat[i] < bound]
