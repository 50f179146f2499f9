"""One worker's book: what it was given, what it has said, what may still be given to it.

The worker owns its blocks; here are counts only, of both block spaces, and there must be room in both.
What it reported free stands for everything its report had seen; prompts given to it and not yet reported
done are promised on top of that in full, so the room is never taken for larger than it is. The growth of
running sequences is not promised: a worker that runs dry pauses a sequence itself, says so, and is given
nothing until none is paused. So is one that finds experts missing, until they are there.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import (
    AttemptId,
    Blocks,
    Incarnation,
    Plan,
    Running,
    SequenceKey,
    Start,
    WorkerLimits,
    WorkerReported,
)
from cluster.scheduler.prefixes import Prefixes, hints_of
from cluster.scheduler.waiting import Waiting

STOP_BYTES = 300  # of a plan, at most: request ids are limited to 256 bytes


NONE = Blocks(0, 0)


@dataclass(slots=True, eq=False)
class Held:
    """A sequence at a worker, or under way to it."""

    attempt: AttemptId
    worker: Incarnation
    handle: int
    blocks_promised: Blocks  # NONE once its prompt is done: from then on the worker's own count has them
    rows_ahead: int  # of its prompt, without what was expected to be cached; 0 once it is done
    since_plan: int
    tenant: str = ""  # who paid for it
    max_tokens: int = 0  # of its answer; 0: not known here
    num_accepted: int = 0
    tokens_total: int = 0  # prompt and answer at their longest; 0: not known here
    priority: int = 0
    num_tokens: int = 0  # when it began here: prompt and accepted
    tokens_then: int = 0  # sampled by the worker before it began
    stopping: bool = False  # a stop is given or due; it counts until the worker says it has ended
    gives_way: bool = False  # to a higher priority

    def describe(self, entry: Waiting) -> None:
        """As its gateway submitted it."""
        submission = entry.submission
        self.tenant, self.max_tokens, self.priority = submission.tenant, submission.max_tokens, submission.priority
        self.num_accepted, self.tokens_total = len(entry.sibling.accepted), entry.tokens_total


@dataclass(slots=True)
class Starting:
    """Sequences that were placed and whose prompt is not done, at all workers together."""

    num: int = 0
    rows: int = 0  # that are left of those prompts

    def add(self, num: int, rows: int) -> None:
        self.num += num
        self.rows += rows


class WorkerBook:
    def __init__(
        self, worker: Incarnation, chunk_tokens_max: int, prefix_hints_max: int, starting: Starting
    ) -> None:
        self.worker = worker
        self.starting = starting
        self.chunk_tokens_max = chunk_tokens_max
        self.prefixes = Prefixes(prefix_hints_max)
        self.rows_ahead = 0  # of prompts given to it and not yet done
        self.num_starting = 0  # sequences whose prompts those are
        self.rows_done = 0  # of prompts that are done, all there ever were
        self.held: dict[int, Held] = {}  # by handle
        self.unlinked_s: float | None = None  # since when its link is gone
        self.is_draining = False  # it is given nothing more
        self._told_draining = False  # by the last plan
        self._kept: dict[SequenceKey, tuple[Blocks, float]] = {}  # for those on their way here, and since when
        self.paused: set[int] = set()  # handles of those that have given up their blocks, or had, and wait there
        self._promised = NONE  # over all held
        self._starts: list[Start] = []  # of the next plan
        self._starts_bytes = 0
        self._stopping: set[AttemptId] = set()
        self._stops: set[AttemptId] = set()  # of those, still to be said

    def link(self, limits: WorkerLimits, report: WorkerReported, term: int) -> list[Held]:
        """Its stream began: nothing is under way, so its state is all it runs.

        Plan numbers go on from the last it applied. Returns what it no longer runs, released.
        """
        state = report.state or ()
        self.limits = limits
        self.unlinked_s = None
        self.sent = self.applied = report.plan_number if report.term == term else 0
        self._told_draining = report.draining
        self._count(report)
        self._prompts_done(running.handle for running in state if running.prompt_done)
        gone = self._absent(state, self.held)
        self._stops = set(self._stopping)
        return gone

    def violation(self, report: WorkerReported, term: int) -> str | None:
        """What in this report cannot be. Its stream is then closed: joining again settles it."""
        applied = report.plan_number if report.term == term else 0
        if applied > self.sent:
            return f"plan {applied} applied, {self.sent} given"
        limits = self.limits
        if report.blocks_free > limits.blocks_total:
            return f"{report.blocks_free} blocks free of {limits.blocks_total}"
        if report.sliding_blocks_free > limits.sliding_blocks_total:
            return f"{report.sliding_blocks_free} sliding blocks free of {limits.sliding_blocks_total}"
        if report.state is not None and report.refused_orders > self.refused_orders and applied < self.sent:
            return f"plan {applied + 1} of {self.sent} refused"
        return None

    def update(self, report: WorkerReported, term: int) -> list[Held]:
        """Take its counts. Returns what its state, if it sent one, no longer has, released."""
        self.applied = report.plan_number if report.term == term else 0
        self._count(report)
        self._prompts_done(report.prompts_done)
        if report.state is None:
            return []
        known = [handle for handle, held in self.held.items() if held.since_plan <= self.applied]
        return self._absent(report.state, known)

    def room(self) -> Blocks:
        """Blocks that nothing has a claim on."""
        room = self.blocks_free.minus(self._promised)
        for blocks, _ in self._kept.values():
            room = room.minus(blocks)
        return room

    def accepts(self) -> bool:
        is_able = self.unlinked_s is None and not self.num_paused and not self.experts_missing
        return is_able and not self.is_draining and self.places() > 0

    def could_ever_hold(self, entry: Waiting) -> bool:
        return entry.tokens_total <= self.limits.tokens_max and not self.is_draining

    def has_room_for(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens fits now."""
        return num_tokens <= self.limits.tokens_max and self.blocks_for(num_tokens).fits(self.room())

    @property
    def has_starts(self) -> bool:
        """For its next plan."""
        return bool(self._starts)

    def could_take(self, entry: Waiting) -> bool:
        """Whether it would, had others given it room: all that are paused are known."""
        is_able = self.unlinked_s is None and not self.experts_missing and len(self.paused) >= self.num_paused
        return is_able and self.could_ever_hold(entry) and entry.attempt not in self._stopping

    def places(self) -> int:
        """Sequences that may be added."""
        return self.limits.sequences_max - len(self.held) - len(self._kept)

    def blocks_of(self, held: Held) -> Blocks:
        """What it gives back when it ends, at least; what it shares with others stays."""
        if held.handle in self.paused:
            return NONE
        return held.blocks_promised if held.rows_ahead else self.limits.blocks_for(held.num_tokens, 1)

    def lost_by(self, held: Held) -> int:
        """Tokens to be computed again when it ends now, about: those of its prompt that are done, and its share of
        what was sampled here since it began."""
        if held.handle in self.paused:
            return 0
        sampled = (self.tokens - held.tokens_then) // max(1, len(self.held))
        return held.num_tokens - held.rows_ahead + min(sampled, held.max_tokens)

    def keep_room(self, key: SequenceKey, num_tokens: int, now_s: float) -> None:
        """For a sequence of so many tokens that is taken off another worker, until it is there to be placed."""
        self._kept[key] = (self.blocks_for(num_tokens), now_s)

    def give_room(self, key: SequenceKey) -> None:
        """It is there, or will not come."""
        self._kept.pop(key, None)

    def keeps_room(self, key: SequenceKey) -> bool:
        return key in self._kept

    def expire_room(self, before_s: float) -> None:
        """What was kept since before that is wanted no more."""
        for key in [key for key, (_, since_s) in self._kept.items() if since_s < before_s]:
            del self._kept[key]

    def takes(self, entry: Waiting, plan_bytes_max: int) -> bool:
        """Whether there is room now, for what it brings and its first token, and in the next plan."""
        stops_bytes = min(len(self._stops) * STOP_BYTES, plan_bytes_max // 2)
        return (
            self.could_ever_hold(entry)
            and entry.attempt not in self._stopping  # and forgotten elsewhere: it must end first
            and self.blocks_for(entry.num_tokens).fits(self.room())
            and stops_bytes + self._starts_bytes + entry.submission.num_bytes <= plan_bytes_max
        )

    def num_cached(self, entry: Waiting) -> int:
        """Tokens of a prompt that it need not compute, as far as is known; never the last one, nor one that is to
        be scored."""
        if not self.limits.prefix_cache or not len(self.prefixes):
            return 0
        matched = self.prefixes.matched(hints_of(entry.submission, self.limits.block_tokens))
        wanted_from = entry.sibling.score_from or len(entry.submission.prompt)
        return min(matched * self.limits.block_tokens, wanted_from - 1)

    def expect(self, entry: Waiting) -> None:
        """Its prompt will be cached there: those that begin alike and come before it is may follow it."""
        if self.limits.prefix_cache:
            self.prefixes.expect(hints_of(entry.submission, self.limits.block_tokens))

    def start(self, entry: Waiting, gateway_address: str, num_cached: int, handle: int) -> Held:
        """Give it this sequence with the next plan."""
        attempt, submission, sibling = entry.attempt, entry.submission, entry.sibling
        rows = entry.num_tokens - num_cached
        blocks = self.blocks_for(entry.num_tokens)
        held = self._hold(attempt, handle, entry.num_tokens, blocks, self.sent + 1, rows)
        held.describe(entry)
        self._starts_bytes += submission.num_bytes
        self._starts.append(
            Start(
                attempt=attempt,
                gateway_address=gateway_address,
                prompt=submission.prompt,
                accepted=sibling.accepted,
                spec=submission.spec,
                seed=sibling.seed,
                priority=submission.priority,
                arrival=entry.arrival,
                score_from=sibling.score_from,
                handle=handle,
            )
        )
        return held

    def adopt(self, running: Running) -> Held:
        """It runs this, and we did not know."""
        blocks = NONE if running.prompt_done else self.blocks_for(running.num_tokens)
        rows = 0 if running.prompt_done else running.num_tokens
        return self._hold(running.attempt, running.handle, running.num_tokens, blocks, self.applied, rows)

    def stop(self, held: Held) -> None:
        """Have it end this with the next plan."""
        held.stopping = True
        self._stopping.add(held.attempt)
        self._stops.add(held.attempt)

    def release(self, handles: Sequence[int]) -> list[Held | None]:
        """These have ended there. None: it was not there (any more)."""
        pop = self.held.pop
        found = [pop(handle, None) for handle in handles]
        for held in found:
            if held is not None and (held.stopping or held.blocks_promised is not NONE):
                self.rows_done += 0 if held.stopping else held.rows_ahead  # done and ended in one report
                self._prompt_done(held)
                self._stopping.discard(held.attempt)
                self._stops.discard(held.attempt)
        if self.paused:
            self.paused.difference_update(handles)
        return found

    def named(self, attempts: Sequence[AttemptId]) -> list[Held]:
        """Those of these that are there."""
        if not attempts:
            return []
        held = {held.attempt: held for held in self.held.values()}
        return [held[attempt] for attempt in attempts if attempt in held]

    def next_plan(self, config: SchedulerConfig) -> Plan | None:
        """None when nothing changed. The first of a term is sent all the same: orders of older terms are
        refused from then on, and its answer is the first state that none of them can change."""
        is_first = self.sent == 0
        is_news = is_first or self._starts or self._stops or self.is_draining != self._told_draining
        if self.unlinked_s is not None or not is_news:
            return None
        stops = sorted(self._stops)[: config.plan_bytes_max // 2 // STOP_BYTES]
        starts, self._starts, self._starts_bytes = tuple(self._starts), [], 0
        self._stops.difference_update(stops)
        self._told_draining = self.is_draining
        self.sent += 1
        return Plan(
            number=self.sent,
            starts=starts,
            stops=tuple(stops),
            step_tokens_max=config.step_tokens_max,
            chunk_tokens_max=config.chunk_tokens_max,
            inter_token_s=config.inter_token_s,
            send_state=is_first,
            draining=self.is_draining,
        )

    def gauges(self) -> dict[str, float]:
        return {
            "held": len(self.held),
            "paused": self.num_paused,
            "experts_missing": self.experts_missing,
            "draining": self.is_draining,
            "blocks_total": self.limits.blocks_total,
            "blocks_free": self.blocks_free.full,
            "blocks_promised": self._promised.full,
            "sliding_blocks_total": self.limits.sliding_blocks_total,
            "sliding_blocks_free": self.blocks_free.sliding,
            "sliding_blocks_promised": self._promised.sliding,
            "prefix_hints": len(self.prefixes),
            "plan": self.sent,
            "tokens": self.tokens,
            "refused_orders": self.refused_orders,
        }

    def check(self) -> None:
        """Raises AssertionError when its counts contradict one another."""
        promised = NONE
        for held in self.held.values():
            promised = promised.plus(held.blocks_promised)
        assert promised == self._promised, f"{self.worker}: promised {self._promised}, held {promised}"
        assert sum(held.rows_ahead for held in self.held.values()) == self.rows_ahead, f"{self.worker}: rows"
        starting = sum(held.blocks_promised is not NONE for held in self.held.values())
        assert starting == self.num_starting, f"{self.worker}: {self.num_starting} starting, held {starting}"
        stopping = {held.attempt for held in self.held.values() if held.stopping}
        assert self._stops <= self._stopping == stopping, f"{self.worker}: stops of nothing held"
        assert self.applied <= self.sent, f"{self.worker}: applied {self.applied} of {self.sent}"

    def blocks_for(self, num_tokens: int) -> Blocks:
        """For so many tokens and the one they bring."""
        return self.limits.blocks_for(num_tokens + 1, self.chunk_tokens_max)

    def _hold(
        self, attempt: AttemptId, handle: int, num_tokens: int, blocks: Blocks, since_plan: int, rows: int
    ) -> Held:
        held = self.held[handle] = Held(attempt, self.worker, handle, blocks, rows, since_plan)
        held.num_tokens, held.tokens_then = num_tokens, self.tokens
        self._promised = self._promised.plus(blocks)
        self._count_starting(blocks is not NONE, rows)
        return held

    def _prompt_done(self, held: Held) -> None:
        """Or it has ended."""
        self._promised = self._promised.minus(held.blocks_promised)
        self._count_starting(-(held.blocks_promised is not NONE), -held.rows_ahead)
        held.blocks_promised, held.rows_ahead = NONE, 0

    def _count(self, report: WorkerReported) -> None:
        self.blocks_free = Blocks(report.blocks_free, report.sliding_blocks_free)
        self.num_paused = report.num_paused
        if not report.num_paused:
            self.paused.clear()
        self.paused.update(held.handle for held in self.named(report.paused))
        self.experts_missing = report.experts_missing
        self.refused_orders = report.refused_orders
        self.tokens = report.tokens
        self.prefixes.hear(report)

    def _prompts_done(self, handles: Iterable[int]) -> None:
        """Summed up first: ten thousand in a round."""
        get, none = self.held.get, NONE
        full = sliding = rows = num_done = 0
        for handle in handles:
            held = get(handle)
            if held is not None:
                blocks = held.blocks_promised
                full += blocks[0]
                sliding += blocks[1]
                rows += held.rows_ahead
                num_done += blocks is not none
                held.blocks_promised, held.rows_ahead = none, 0
        self._promised = self._promised.minus(Blocks(full, sliding))
        self.rows_done += rows
        self._count_starting(-num_done, -rows)

    def _count_starting(self, num: int, rows: int) -> None:
        self.num_starting += num
        self.rows_ahead += rows
        self.starting.add(num, rows)

    def _absent(self, state: Iterable[Running], known: Iterable[int]) -> list[Held]:
        present = {running.handle for running in state}
        gone = [self.held[handle] for handle in known if handle not in present]
        self.release([held.handle for held in gone])
        return sorted(gone, key=lambda held: held.attempt)
