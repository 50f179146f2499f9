"""How many microbatches a step is cut into: predicted from what phases cost, kept only if measured better.

Steps are told apart by kind and size; each kind has a number in use, 1 at first. A number that `overlap.py`
predicts to be better is tried: `TRIAL_STEPS` steps of it between as many of the number in use, which it replaces
if its median is better by more than `GAIN_MIN` and than what noise explains. What was tried once is tried again
whatever is predicted, after 256 steps, then after twice as many each time, up to 16,384: so costs that change are
noticed, and equals do not flap.

Exploring is paid from a budget: what steps of trials took more than those of the number in use is at most
`LOSS_MAX` of all steps' time, and a trial that overdraws it ends. Pure: it is told what was measured and has no
clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

from attention_workers.overlap import Affine, Costs, Fit, step_cost

MICROBATCHES_MAX = 4
TRIAL_STEPS = 8
GAIN_MIN = 0.03
LOSS_MAX = 0.01
_WARM_STEPS = 16
_PAUSE_STEPS, _PAUSE_STEPS_MAX = 256, 1 << 14
_LOSS_ASSUMED = 0.1  # of a step, before anything is known
_RECENT = 0.05


class StepKind(NamedTuple):
    """Decode: no prompt is among the rows."""

    name: Literal["decode", "prefill"]
    bucket: int  # rows, rounded up to a power of two


def kind_of(rows: int, has_prompts: bool) -> StepKind:
    return StepKind("prefill" if has_prompts else "decode", 1 << max(0, rows - 1).bit_length())


class Phases(NamedTuple):
    """Of one step, in nanoseconds; all but the first are means over layers and microbatches."""

    step_ns: float  # all layers
    attention_ns: float  # with dispatch and merge: what keeps the attention worker busy
    experts_ns: float  # the slowest expert worker's computing
    exchange_ns: float  # there and back, of that reply, without the worker's queue


@dataclass
class _Arm:
    """One number of microbatches for one kind of step."""

    due_step: int = 0
    pause_steps: int = _PAUSE_STEPS
    ratio: float | None = None  # to the number in use, as last measured

    def rest(self, step: int) -> None:
        self.due_step = step + self.pause_steps
        self.pause_steps = min(2 * self.pause_steps, _PAUSE_STEPS_MAX)


@dataclass
class _Trial:
    candidate: int
    theirs: list[float] = field(default_factory=list)  # the candidate's steps
    ours: list[float] = field(default_factory=list)  # those of the number in use

    @property
    def is_candidates_turn(self) -> bool:
        """In the order A B B A A B B A, so that costs which drift are no one's advantage."""
        return (len(self.theirs) + len(self.ours) + 1) // 2 % 2 == 1

    @property
    def noise(self) -> float:
        """About twice how far the ratio of the medians may be off, by how the steps differ among one another."""
        spreads = [quantiles(steps, n=4) for steps in (self.theirs, self.ours)]
        return sum((q[2] - q[0]) / q[1] for q in spreads) / math.sqrt(TRIAL_STEPS)

    @property
    def is_over(self) -> bool:
        return len(self.theirs) >= TRIAL_STEPS and len(self.ours) >= TRIAL_STEPS


@dataclass
class _Known:
    """Of one kind of step."""

    best: int = 1
    step: int = 0
    rows: float = 0.0
    best_ns: float = 0.0
    arms: dict[int, _Arm] = field(default_factory=lambda: {m: _Arm() for m in range(1, MICROBATCHES_MAX + 1)})
    trial: _Trial | None = None
    trials: int = 0
    switches: int = 0


class _Fits:
    def __init__(self) -> None:
        self.attention, self.experts, self.exchange = Fit(), Fit(), Fit()

    def add(self, rows: float, microbatches: int, phases: Phases) -> None:
        self.attention.add(rows, phases.attention_ns)
        self.experts.add(rows, phases.experts_ns)
        if microbatches == 1:  # with more, a reply is found late, and lies in the link while others are computed
            self.exchange.add(rows, phases.exchange_ns)

    def costs(self) -> Costs | None:
        lines = [fit.line() for fit in (self.attention, self.experts, self.exchange)]
        known = [line for line in lines if line is not None]
        return Costs(*known) if len(known) == len(lines) else None


class MicrobatchChoice:
    """`choose` before a step, `measured` after it. Holds a few numbers for each kind of step there was."""

    def __init__(self, setting: int | Literal["auto"], layers: int) -> None:
        """`setting`: a number to use always, or auto."""
        self.setting = setting
        self._layers = layers
        self._known: dict[StepKind, _Known] = {}
        self._fits: dict[str, _Fits] = {}
        self.steps_ns = 0.0
        self.loss_ns = 0.0
        """What trials cost, of all time that steps took."""

    def choose(self, kind: StepKind, most: int) -> int:
        """`most`: of the step's sequences, which are not cut, hence of microbatches."""
        if self.setting != "auto":
            return self.setting
        known = self._known.get(kind)
        if known is None:
            return 1
        trial = known.trial
        if trial is not None and trial.candidate > most:
            known.trial = trial = None  # begun anew when there are sequences enough
        if trial is None:
            trial = known.trial = self._begin(kind, known, min(most, MICROBATCHES_MAX))
        return trial.candidate if trial is not None and trial.is_candidates_turn else min(known.best, most)

    def measured(self, kind: StepKind, microbatches: int, rows: int, phases: Phases) -> None:
        if self.setting != "auto":
            return
        self._fits.setdefault(kind.name, _Fits()).add(rows / microbatches, microbatches, phases)
        known = self._known.setdefault(kind, _Known(rows=rows, best_ns=phases.step_ns))
        self.steps_ns += phases.step_ns
        known.step += 1
        known.rows += _RECENT * (rows - known.rows)
        if microbatches == known.best:
            known.best_ns += _RECENT * (phases.step_ns - known.best_ns)
        if (trial := known.trial) is None:
            return
        if microbatches == trial.candidate:
            trial.theirs.append(phases.step_ns)
            self.loss_ns += max(0.0, phases.step_ns - (median(trial.ours) if trial.ours else known.best_ns))
        elif microbatches == known.best:
            trial.ours.append(phases.step_ns)
        if trial.is_over or self._credit_ns < 0:
            self._conclude(known, trial)

    def current(self, kind: StepKind) -> int:
        """In use for this kind."""
        if self.setting != "auto":
            return self.setting
        return self._known[kind].best if kind in self._known else 1

    @property
    def _credit_ns(self) -> float:
        return LOSS_MAX * self.steps_ns - self.loss_ns

    def _begin(self, kind: StepKind, known: _Known, most: int) -> _Trial | None:
        """Of the nearest number that is worth it and whose time has come, if it can be paid. Near ones cost least,
        and teach how costs grow with rows."""
        if known.step < _WARM_STEPS:
            return None
        promising = []
        for microbatches in range(1, most + 1):
            arm = known.arms[microbatches]
            if microbatches == known.best or known.step < arm.due_step:
                continue
            ratio = self._predicted(kind, known, microbatches) * self._disproved(kind, known, microbatches)
            is_worth_it = arm.ratio is not None or ratio < 1 - GAIN_MIN
            loss = _LOSS_ASSUMED if arm.ratio is None else max(_LOSS_ASSUMED, arm.ratio - 1)
            if is_worth_it and loss * TRIAL_STEPS * known.best_ns <= self._credit_ns:
                promising.append((abs(microbatches - known.best), microbatches))
        return _Trial(min(promising)[1]) if promising else None

    def _predicted(self, kind: StepKind, known: _Known, microbatches: int) -> float:
        """Its step's time to that of the number in use; 1 where nothing can be told."""
        costs = self._fits[kind.name].costs()
        if costs is None:
            return 1.0
        ours = step_cost(costs, known.rows, known.best, self._layers)
        return step_cost(costs, known.rows, microbatches, self._layers) / ours if ours else 1.0

    def _disproved(self, kind: StepKind, known: _Known, microbatches: int) -> float:
        """By how much smaller numbers took longer than predicted: then this one will, too."""
        tried = [(m, arm.ratio) for m, arm in known.arms.items() if arm.ratio is not None and m < microbatches]
        return max((ratio / self._predicted(kind, known, m) for m, ratio in tried), default=1.0)

    def _conclude(self, known: _Known, trial: _Trial) -> None:
        known.trial = None
        known.trials += 1
        candidate = known.arms[trial.candidate]
        candidate.ratio = median(trial.theirs) / median(trial.ours) if trial.theirs and trial.ours else None
        loser = candidate
        if trial.is_over and candidate.ratio is not None and candidate.ratio < 1 - max(GAIN_MIN, trial.noise):
            loser, ratio = known.arms[known.best], candidate.ratio
            for arm in known.arms.values():
                arm.ratio = None if arm.ratio is None else arm.ratio / ratio
            loser.ratio = 1 / ratio
            candidate.ratio = None
            known.best_ns *= ratio
            known.best = trial.candidate
            known.switches += 1
        loser.rest(known.step)

    def explain(self) -> tuple[dict[str, Any], ...]:
        """For each kind of step what is in use and why: times in milliseconds, ratios to the number in use."""
        return tuple(
            {
                "kind": kind.name,
                "rows_max": kind.bucket,
                "microbatches": known.best,
                "steps": known.step,
                "step_ms": round(known.best_ns / 1e6, 3),
                "predicted": {
                    str(m): round(self._predicted(kind, known, m), 3) for m in known.arms if m != known.best
                },
                "measured": {
                    str(m): round(ratio, 3)
                    for m, ratio in [(m, arm.ratio) for m, arm in known.arms.items()]
                    if ratio is not None
                },
                "trials": known.trials,
                "switches": known.switches,
                "costs_us": _shown(self._fits[kind.name].costs(), known.rows),
            }
            for kind, known in sorted(self._known.items())
        )


def _shown(costs: Costs | None, rows: float) -> dict[str, dict[str, float]]:
    """Of one microbatch with all the rows, at one layer."""
    if costs is None:
        return {}
    return {name: _line(line, rows) for name, line in zip(costs._fields, costs, strict=True)}


def _line(line: Affine, rows: float) -> dict[str, float]:
    return {
        "all": round(line.at(rows) / 1e3, 2),
        "per_row": round(line.slope / 1e3, 3),
        "fixed": round(line.fixed / 1e3, 2),
    }
