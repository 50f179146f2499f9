"""What runs on this worker, and what the next step computes: standing orders, chunks, blocks. No tensors.

Decodes come first, prompts fill the step's token budget in chunks. When the block pool is dry the sequence of
lowest priority is paused: its blocks go back, its tokens stay, and it is recomputed when there is room, which
in exact mode changes no bit of it. So the pool serves on without the scheduler.

Each layer type has a block space of its own (`kv_blocks.py`); in that of sliding layers a sequence holds what
its window sees, and gives back after each step what has left it.

What is cached of a prompt (`prefix_cache.py`) is held from the moment its plan arrives, and looked for again
before each of its chunks: so a sequence that was paused, or whose prompt another computes just now, does not
compute what has come meanwhile. The last token is always computed, for its logits; where logprobs of the prompt
are wanted, all tokens are from the first on whose logits somebody waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from attention_workers import prefix_names
from attention_workers.batching import GOES_ON, Pace, in_turn, share
from attention_workers.kv_blocks import BlockTable, KvBlocks
from attention_workers.prefix_cache import PrefixCache
from attention_workers.sequence import Guide, Sequence, Span
from attention_workers.step import (
    AttemptId,
    Completion,
    FinishReason,
    Plan,
    PromptLogprob,
    RunningSequence,
    Start,
    StepResult,
    TokenDelta,
)
from model.layer_types import FULL, SLIDING, LayerType


class OrderRefused(Exception):
    """A plan of an older term, for another life, or out of order. Nothing of it was applied."""


class Book:
    def __init__(
        self,
        fingerprint: str,
        incarnation: int,
        blocks: KvBlocks,
        block_tokens: int,
        sequences_max: int,
        model_len_max: int,
        rows_max: int = 1024,
        sliding: KvBlocks | None = None,
        prefix_cache: bool = True,
        guide_of: Callable[[Start], Guide | None] = lambda _: None,
    ) -> None:
        """`rows_max`: rows of one step that the exchange can carry; at least `sequences_max`. `sliding`: the
        space of sliding layers, with room for at least one token and its window; None where no layer slides.
        `guide_of`: what leads a sequence along its grammar."""
        assert sequences_max <= rows_max
        self.spaces: dict[LayerType, KvBlocks] = {FULL: blocks}
        if sliding is not None:
            self.spaces[SLIDING] = sliding
        self.prefixes = PrefixCache(self.spaces, block_tokens, prefix_cache)
        self.chunk_fits = min(space.chunk_max(block_tokens) for space in self.spaces.values())
        assert self.chunk_fits >= 1
        self.fingerprint = fingerprint
        self.incarnation = incarnation
        self.block_tokens = block_tokens
        self.sequences_max = sequences_max
        self.model_len_max = model_len_max
        self.rows_max = rows_max
        self.sequences: dict[AttemptId, Sequence] = {}
        self.term = 0
        self.plan_number = 0
        self.num_refused = 0
        self.is_draining = False
        self.pace = Pace()
        self._guide_of = guide_of
        self._step_tokens_max = 512
        self._chunk_tokens_max = 256

    # --- orders ------------------------------------------------------------------------------

    def apply(self, plan: Plan, result: StepResult) -> None:
        """Apply a plan, adding what it ends to `result`. Raises OrderRefused and changes nothing else."""
        self._refuse_unless_next(plan, result)
        self.term, self.plan_number = plan.term, plan.number
        self._step_tokens_max = min(max(1, plan.step_tokens_max), self.rows_max)
        self._chunk_tokens_max = max(1, plan.chunk_tokens_max)
        self.pace.promise(plan.inter_token_s)
        self.is_draining = plan.draining
        for attempt in plan.stops:
            if attempt in self.sequences:
                self._end(self.sequences[attempt], FinishReason.CANCELLED, result)
        for start in plan.starts:
            self._start(start, result)
        if plan.send_state:
            self._tell_all(result)

    def _tell_all(self, result: StepResult) -> None:
        result.state, result.kept = self.state(), self.prefixes.all()
        result.evicted = []

    def restate(self, result: StepResult) -> None:
        """Before `result` is told: all that runs is said as it is now, after everything else in it. What was said
        to run and has ended since would be heard of the other way round, and thought to run for ever."""
        if result.state is not None:
            result.state = self.state()

    def _refuse_unless_next(self, plan: Plan, result: StepResult) -> None:
        wrong = ""
        if (plan.fingerprint, plan.incarnation) != (self.fingerprint, self.incarnation):
            wrong = f"plan is for checkpoint {plan.fingerprint} and incarnation {plan.incarnation}"
        elif plan.term < self.term:
            wrong = f"plan has term {plan.term}, newest seen is {self.term}"
        elif plan.number != (self.plan_number + 1 if plan.term == self.term else 1):
            wrong = f"plan {plan.number} of term {plan.term} does not follow {self.plan_number} of {self.term}"
            self._tell_all(result)
        if wrong:
            self.num_refused += 1
            raise OrderRefused(wrong)

    def _start(self, start: Start, result: StepResult) -> None:
        newest = max((a.number for a in self.sequences if _same_sequence(a, start.attempt)), default=0)
        if newest >= start.attempt.number:
            return
        for attempt in [a for a in self.sequences if _same_sequence(a, start.attempt)]:
            self._end(self.sequences[attempt], FinishReason.CANCELLED, result)
        if len(self.sequences) >= self.sequences_max:
            # No fault of the request: a plan of an earlier stream came through after this one's sender was told
            # what runs. Given back, it is placed again.
            result.completions.append(Completion(start.attempt, FinishReason.CANCELLED, len(start.accepted)))
            return
        tables = {kind: BlockTable() for kind in self.spaces}
        root = prefix_names.root(self.fingerprint, start.cache_salt)
        sequence = Sequence(start, [*start.prompt, *start.accepted], tables, root)
        self.sequences[start.attempt] = sequence
        why = self._cannot_run(sequence)
        if why:
            self.fail(sequence, why, result)
        elif sequence.num_generated and (reason := self._finish_reason(sequence)):
            self._deliver(sequence, TokenDelta(start.attempt, sequence.num_generated, (), finish=reason), result)
            self._end(sequence, reason, result)
        else:
            sequence.guide = self._guide_of(start)
            self.prefixes.num_tokens += len(sequence.tokens)
            if not any(s.is_paused and s.order < sequence.order for s in self.sequences.values()):
                self._skip_cached(sequence)

    def _cannot_run(self, sequence: Sequence) -> str:
        room = min(self.model_len_max, self.spaces[FULL].total * self.block_tokens)
        if len(sequence.tokens) > room:
            return f"sequence has {len(sequence.tokens)} tokens, this worker holds at most {room}"
        if not sequence.start.prompt:
            return "prompt is empty"
        return ""

    # --- steps -------------------------------------------------------------------------------

    def compose(self, result: StepResult) -> list[Span]:
        """The next step's spans, with blocks taken for them: decodes first, then prompt chunks."""
        running = [s for s in self.sequences.values() if s.pending and s.has_begun]
        running.sort(key=lambda s: s.order)
        spans: dict[AttemptId, Span] = {}
        budget = self._step_tokens_max
        for sequence in [s for s in running if s.pending == 1 and s.computed]:
            if self._make_room(sequence, 1, result):
                spans[sequence.start.attempt] = Span(sequence, sequence.computed, 1)
                budget -= 1
        waiting = [s for s in running if s.pending > 1 or not s.computed]
        num_waiting = sum(GOES_ON if s.num_generated else 1 for s in waiting)
        budget = self.pace.prompt_rows(len(spans), budget, num_waiting)
        under_way: set[bytes] = set()  # blocks that this step works at
        prompts = in_turn(waiting)
        for number, sequence in enumerate(prompts):
            if budget <= 0:
                break
            num_paused = len(result.paused)
            if not self._may_enter(sequence):
                break  # in order: a later one does not take what an earlier one waits for
            self._skip_cached(sequence)
            if self._next_name(sequence) in under_way:
                continue  # an earlier one computes it: the next step finds it cached
            rows = share(budget, len(prompts) - number)
            count = min(sequence.pending, self._chunk_tokens_max, self.chunk_fits, rows)
            if not self._make_room(sequence, count, result):
                break
            span = spans[sequence.start.attempt] = Span(sequence, sequence.computed, count)
            under_way.update(self._names_within(span))
            budget -= count
            if len(result.paused) > num_paused:
                break  # nor what one gave up that now waits: that one may come before those not looked at yet
        # A sequence that gave up its blocks for another after it was chosen is no longer in this step.
        chosen = spans.values()
        return [span for span in chosen if not span.sequence.is_paused and span.first == span.sequence.computed]

    def _skip_cached(self, sequence: Sequence) -> None:
        """Go on behind what is cached of what it would compute, all but what logits are wanted of."""
        prefix_names.follow(sequence.names, sequence.tokens, self.block_tokens, sequence.root)
        at = sequence.computed
        end = (sequence.scored if sequence.is_scoring else len(sequence.tokens)) - 1
        reach, furthest = self.prefixes.reach(sequence.names, sequence.tables, at, end)
        if furthest > at:
            sequence.parted = furthest
        if reach == at:
            return
        self.prefixes.skip(sequence.names, sequence.tables, at, reach)
        num_new = max(0, reach - max(at, sequence.reached))
        if num_new:
            self.prefixes.num_hits += not sequence.num_cached
            self.prefixes.num_hit_tokens += num_new
            from_prompt = min(reach, len(sequence.start.prompt)) - max(at, sequence.reached)
            sequence.num_cached += max(0, from_prompt)
        sequence.computed = reach
        sequence.reached = max(sequence.reached, reach)

    def _next_name(self, sequence: Sequence) -> bytes | None:
        """Of the block that it computes next from its beginning, if it could be skipped."""
        at = sequence.computed
        if (
            sequence.is_scoring
            or not self.prefixes.enabled
            or at % self.block_tokens
            or at + self.block_tokens >= len(sequence.tokens)
        ):
            return None
        return sequence.names[at // self.block_tokens]

    def _names_within(self, span: Span) -> list[bytes]:
        """Of the blocks that a span lies in, where they will be whole without another token."""
        last = -(-(span.first + span.count) // self.block_tokens)
        return span.sequence.names[span.first // self.block_tokens : last]

    def _may_enter(self, sequence: Sequence) -> bool:
        """A paused sequence comes back only when all it holds fits, or nothing else is computed."""
        if not sequence.is_paused:
            return True
        fits = all(
            space.num_available
            >= space.most_held(len(sequence.tokens) + 1, self._chunk_tokens_max, self.block_tokens)
            for space in self.spaces.values()
        )
        if fits or not any(s.holds_blocks for s in self.sequences.values()):
            sequence.is_paused = False
        return not sequence.is_paused

    def _make_room(self, sequence: Sequence, count: int, result: StepResult) -> bool:
        """Take blocks for `count` more tokens, pausing later sequences while a space is dry."""
        if sequence.is_paused:
            return False
        for kind, space in self.spaces.items():
            table = sequence.tables[kind]
            while table.end * self.block_tokens < sequence.computed + count:
                block = space.take()
                if block is not None:
                    table.blocks.append(block)
                elif not self._pause_later(sequence, result):
                    return False
        return True

    def _pause_later(self, sequence: Sequence, result: StepResult) -> bool:
        """Pause the last in order; if that is this one, say that it must wait."""
        holders = [s for s in self.sequences.values() if s.holds_blocks]
        last = max(holders, key=lambda s: s.order, default=sequence)
        if last.order > sequence.order:
            self._pause(last, result)
            return True
        if sequence.holds_blocks:
            self._pause(sequence, result)
        return False

    def _pause(self, sequence: Sequence, result: StepResult) -> None:
        self._give_back_all(sequence)
        sequence.computed = 0
        sequence.is_paused = True
        result.paused.append(sequence.start.attempt)

    def _give_back_all(self, sequence: Sequence) -> None:
        for kind, space in self.spaces.items():
            space.give_back(sequence.tables[kind].clear())

    def computed(self, spans: list[Span], result: StepResult) -> None:
        """The step's keys and values are in the pool; what no later token sees goes back."""
        for span in spans:
            sequence = span.sequence
            sequence.computed = span.first + span.count
            sequence.reached = max(sequence.reached, sequence.computed)
            prefix_names.follow(sequence.names, sequence.tokens, self.block_tokens, sequence.root)
            self.prefixes.keep(sequence.names, sequence.tables, span.first, sequence.computed)
            given = len(sequence.start.prompt) + len(sequence.start.accepted)
            self.prefixes.leave(sequence.tables, sequence.computed, given, sequence.parted)
            if not sequence.is_prompt_done and sequence.computed >= given:
                sequence.is_prompt_done = True
                result.prompts_done.append(sequence.start.handle)
                self._tell_changes(result)

    def _tell_changes(self, result: StepResult) -> None:
        kept, evicted = self.prefixes.changes()
        result.kept += kept
        result.evicted += evicted

    def scored(
        self, sequence: Sequence, position: int, logprobs: tuple[PromptLogprob, ...], result: StepResult
    ) -> None:
        """A step brought logprobs of a prompt's tokens from `position` on, where they were wanted next."""
        assert position == sequence.scored
        sequence.scored += len(logprobs)
        delta = TokenDelta(
            sequence.start.attempt, sequence.num_generated, (), prompt_position=position, prompt_logprobs=logprobs
        )
        self._deliver(sequence, delta, result)

    def sampled(self, sequence: Sequence, token: int, delta: TokenDelta, result: StepResult) -> None:
        """A step brought a token; `delta` carries it and its logprobs."""
        num_cached = sequence.num_cached if delta.position == 0 else 0
        sequence.tokens.append(token)
        reason = self._finish_reason(sequence)
        if reason is not None or num_cached:
            delta = replace(delta, finish=reason, num_cached=num_cached)
        self._deliver(sequence, delta, result)
        if reason is not None:
            self._end(sequence, reason, result)

    def give_back(self, result: StepResult) -> None:
        """End everything here without an answer: the scheduler queues again what is still wanted."""
        self.stop(list(self.sequences), result)

    def drop(self, gateway_address: str, result: StepResult) -> list[AttemptId]:
        """Forget the sequences of a gateway that cannot be reached; it resumes what it still wants."""
        gone = [s for s in self.sequences.values() if s.start.gateway_address == gateway_address]
        for sequence in gone:
            self._end(sequence, FinishReason.CANCELLED, result)
        return [s.start.attempt for s in gone]

    def stop(self, attempts: list[AttemptId], result: StepResult) -> None:
        """Forget attempts, without a word to their gateways."""
        for attempt in attempts:
            if attempt in self.sequences:
                self._end(self.sequences[attempt], FinishReason.CANCELLED, result)

    # --- ends --------------------------------------------------------------------------------

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in sequence.start.stop_token_ids:
            return FinishReason.STOP
        full = min(self.model_len_max, self.spaces[FULL].total * self.block_tokens)
        if sequence.num_generated >= sequence.start.max_tokens or len(sequence.tokens) >= full:
            return FinishReason.LENGTH
        return None

    def fail(self, sequence: Sequence, why: str, result: StepResult) -> None:
        self.prefixes.disown(sequence.names)
        delta = TokenDelta(sequence.start.attempt, sequence.num_generated, (), (), FinishReason.FAILED, why)
        self._deliver(sequence, delta, result)
        self._end(sequence, FinishReason.FAILED, result, why)

    def _deliver(self, sequence: Sequence, delta: TokenDelta, result: StepResult) -> None:
        result.deltas.setdefault(sequence.start.gateway_address, []).append(delta)

    def _end(self, sequence: Sequence, reason: FinishReason, result: StepResult, detail: str = "") -> None:
        del self.sequences[sequence.start.attempt]
        self._give_back_all(sequence)
        self._tell_changes(result)
        start, num_tokens = sequence.start, sequence.num_generated
        result.completions.append(Completion(start.attempt, reason, num_tokens, detail, start.handle))

    def state(self) -> list[RunningSequence]:
        return [
            RunningSequence(
                s.start.attempt,
                len(s.tokens),
                s.is_prompt_done,
                s.start.arrival,
                s.start.handle,
            )
            for s in self.sequences.values()
        ]

    def check(self) -> None:
        """In each space: blocks conserved, each held by as many as its count says, by sequences that have all they
        see and no more. Nobody holds what an earlier one waits for."""
        first_waiting = min((s.order for s in self.sequences.values() if s.is_paused), default=None)
        if first_waiting is not None:
            assert not any(s.holds_blocks for s in self.sequences.values() if s.order > first_waiting)
        for kind, space in self.spaces.items():
            space.check(Counter(b for s in self.sequences.values() for b in s.tables[kind].blocks))
            for s in self.sequences.values():
                table = s.tables[kind]
                assert s.computed <= table.end * self.block_tokens
                assert len(set(table.blocks)) == len(table.blocks)
                assert table.first == space.first_seen(s.computed) // self.block_tokens
                assert not (s.is_paused and table.blocks)


def _same_sequence(a: AttemptId, b: AttemptId) -> bool:
    return (a.request_id, a.index) == (b.request_id, b.index)
