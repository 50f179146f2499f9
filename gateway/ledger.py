"""Each request's truth: its prompt, parameters and seeds, every token accepted for it, its current attempts.

Tokens come from workers in `deliver`; only the newest attempt's are taken, each once, in order, so a
position is streamed once (rule 4) whatever dies. An attempt that ends before its sequence is followed by the
next, which is given prompt plus accepted tokens. What a slow client has not read yet waits here: it is bounded
by n and max_tokens, and the tokens are held for a resume anyway.

One event loop calls everything here. Nothing of text, wire or HTTP is known.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from gateway.config import GatewayConfig
from gateway.errors import DeadlinePassed, GenerationFailed, NotReady, Overloaded, Refusal, presentable
from gateway.metrics import GatewayMetrics
from gateway.port import CloseReason, SchedulerPort, Sibling, Submission
from gateway.prompt_scores import is_wanted
from gateway.request import FinishReason, GenerateRequest, TokenDelta, sibling_seed


@dataclass
class _Sequence:
    """One open sequence. `choice` is its place in the call it belongs to."""

    request: GenerateRequest
    index: int
    choice: int
    generation: Generation
    attempt: int = 1
    accepted: list[int] = field(default_factory=list)
    num_scored: int = 0  # of the prompt's tokens: those whose logprobs have come, or are not wanted of this one

    def __post_init__(self) -> None:
        """Siblings have one prompt: the first brings its logprobs."""
        self.num_scored = 1 if is_wanted(self.request) and self.index == 0 else len(self.request.prompt)

    @property
    def score_from(self) -> int:
        return self.num_scored if self.num_scored < len(self.request.prompt) else 0

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.index


class Generation:
    """What one call asked for, as (choice, TokenDelta) in order of arrival; ends when every sequence has.

    Iterating raises the Refusal that ended a sequence early. `close` cancels what is still open.
    """

    def __init__(self, ledger: Ledger, silence_s_max: float, time_s: float, clock: Callable[[], float]) -> None:
        """`time_s`: from now to its deadline; may be infinite."""
        self._ledger = ledger
        self._silence_s_max = silence_s_max
        self._time_s = time_s
        self._clock = clock
        self.began_s = clock()
        self._ready: deque[tuple[int, TokenDelta]] = deque()
        self._wake = asyncio.Event()
        self._error: Refusal | None = None
        self._cut: set[int] = set()  # choices of which nothing more is wanted
        self.sequences: dict[int, _Sequence] = {}  # open ones, by choice

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, TokenDelta]:
        while True:
            if self.sequences and self.time_left_s <= 0:
                raise self.is_late()
            ready = self.take()
            if ready is not None:
                return ready
            if not self.sequences:
                raise StopAsyncIteration
            self._wake.clear()
            left_s = self.time_left_s
            try:
                async with asyncio.timeout(min(self._silence_s_max, left_s)):
                    await self._wake.wait()
            except TimeoutError:
                # Not by the clock: the loop's timers may fire a hair before what they were set to.
                if left_s <= self._silence_s_max:
                    raise self.is_late() from None
                raise NotReady(f"no token came for {self._silence_s_max:g} s", code="timeout") from None

    def take(self) -> tuple[int, TokenDelta] | None:
        """The next of what has come, without waiting. Raises the Refusal that ended a sequence early."""
        while self._ready:
            choice, delta = self._ready.popleft()
            if choice not in self._cut:
                return choice, delta
        if self._error is not None:
            raise self._error
        return None

    @property
    def time_left_s(self) -> float:
        return self.began_s + self._time_s - self._clock()

    @property
    def age_s(self) -> float:
        return self._clock() - self.began_s

    async def in_time(self, work: Awaitable[object]) -> None:
        """Raises DeadlinePassed when its time is up first."""
        if math.isinf(self._time_s):
            await work
            return
        try:
            async with asyncio.timeout(self.time_left_s):
                await work
        except TimeoutError:
            raise self.is_late() from None

    def is_late(self) -> DeadlinePassed:
        return DeadlinePassed(f"the request was not done within its {self._time_s:g} s")

    def finish(self, choice: int, position: int) -> None:
        """Nothing after `position` of a choice is wanted: what has come beyond it is dropped, not billed."""
        self._cut.add(choice)
        if choice in self.sequences:
            self._ledger.finish(self.sequences[choice], position)

    def close(self) -> None:
        """Idempotent; cancels what is still open everywhere."""
        self._ledger.cancel(self)

    def push(self, choice: int, delta: TokenDelta) -> None:
        self._ready.append((choice, delta))
        self._wake.set()

    def fail(self, error: Refusal) -> None:
        self._error = self._error or error
        self._wake.set()


class Ledger:
    def __init__(
        self,
        port: SchedulerPort,
        config: GatewayConfig,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = lambda: asyncio.get_running_loop().time(),
    ) -> None:
        self._clock = clock
        self._port = port
        self._config = config
        self._metrics = metrics
        self._sequences: dict[tuple[str, int], _Sequence] = {}

    @property
    def num_open(self) -> int:
        return len(self._sequences)

    async def open(self, requests: Sequence[GenerateRequest]) -> Generation:
        """Submit one call's requests, all or none; their sequences are numbered as choices in order.

        Raises what the scheduler answered (Overloaded, NotReady, TooLarge), or Overloaded beyond
        `in_flight_max`.
        """
        self.check_room(sum(request.n for request in requests))
        time_s = min(request.time_s for request in requests)
        generation = Generation(self, self._config.silence_s_max, time_s, self._clock)
        for request in requests:
            for index in range(request.n):
                self._add(_Sequence(request, index, len(generation.sequences), generation))
        try:
            for request in requests:
                await generation.in_time(
                    self._port.submit(_submission(request, _of(generation, request), resume=False))
                )
                self._metrics.prompt_tokens.inc(len(request.prompt))
        except BaseException:  # a refusal, or the client hung up meanwhile: nothing may stay behind
            generation.close()
            raise
        return generation

    def check_room(self, wanted: int) -> None:
        """Raises Overloaded where so many further sequences are beyond `in_flight_max`."""
        if self.num_open + wanted > self._config.in_flight_max:
            raise Overloaded(
                f"{self.num_open} sequences are open and {wanted} more were asked for; this gateway holds at "
                f"most {self._config.in_flight_max}",
                retry_after_s=self._config.retry_after_s,
            )

    # --- what the port tells -------------------------------------------------------------------

    def deliver(self, delta: TokenDelta) -> bool:
        """Take a worker's tokens; False if its attempt is not wanted (any more). Duplicates are dropped."""
        sequence = self._current(delta.request_id, delta.index, delta.attempt)
        if sequence is None:
            return self._refused("unknown" if (delta.request_id, delta.index) not in self._sequences else "stale")
        if delta.prompt_logprobs:
            return self._score(sequence, delta)
        held, end = len(sequence.accepted), delta.position + len(delta.tokens)
        if delta.position > held or (delta.tokens and sequence.score_from):
            # Tokens are missing and this attempt will not bring them: the next one starts where we stand.
            self._reopen(sequence, "gap")
            return self._refused("gap")
        if end > sequence.request.max_tokens:
            self._fail(sequence, GenerationFailed("a worker sent more tokens than were asked for"))
            return self._refused("overlong")
        if delta.finish is FinishReason.CANCELLED:
            self._reopen(sequence, CloseReason.PREEMPTED.value)
            return True
        if delta.finish is FinishReason.FAILED:
            self._fail(sequence, GenerationFailed(presentable(delta.detail)))
            return True
        if end > held or (end == held and delta.finish is not None):
            self._accept(sequence, delta.since(held))
        return True

    def close_attempt(self, request_id: str, index: int, attempt: int, reason: CloseReason, detail: str) -> None:
        """The scheduler says this attempt brings no more; an older one's end is no news."""
        sequence = self._current(request_id, index, attempt)
        if sequence is None:
            return
        if reason is CloseReason.FAILED:
            self._fail(sequence, GenerationFailed(presentable(detail)))
        elif reason is CloseReason.DEADLINE:
            self._fail(sequence, sequence.generation.is_late())
        else:
            self._reopen(sequence, reason.value)

    def refuse(self, request_id: str, error: Refusal) -> None:
        """A resume or claim was rejected: the request's sequences end with that error."""
        for sequence in [s for s in self._sequences.values() if s.request.request_id == request_id]:
            self._fail(sequence, error)

    def claims(self) -> list[Submission]:
        """What is in flight, for a scheduler that has just come (back)."""
        siblings: dict[str, list[_Sequence]] = {}
        for sequence in self._sequences.values():
            siblings.setdefault(sequence.request.request_id, []).append(sequence)
        return [_submission(open_ones[0].request, open_ones, resume=True) for open_ones in siblings.values()]

    # --- what the call tells -------------------------------------------------------------------

    def finish(self, sequence: _Sequence, position: int) -> None:
        self._port.finish(*sequence.key, sequence.attempt, position)
        self._remove(sequence)

    def cancel(self, generation: Generation) -> None:
        left = list(generation.sequences.values())
        for request_id in dict.fromkeys(sequence.request.request_id for sequence in left):
            self._port.cancel(request_id)
        for sequence in left:
            self._remove(sequence)

    # --- inside --------------------------------------------------------------------------------

    def _score(self, sequence: _Sequence, delta: TokenDelta) -> bool:
        """Take logprobs of its prompt, each once, in order."""
        end = delta.prompt_position + len(delta.prompt_logprobs)
        if delta.prompt_position > sequence.num_scored:
            self._reopen(sequence, "gap")
            return self._refused("gap")
        if end > len(sequence.request.prompt):
            self._fail(sequence, GenerationFailed("a worker sent logprobs of more tokens than the prompt has"))
            return self._refused("overlong")
        if end > sequence.num_scored:
            new = delta.scores_since(sequence.num_scored)
            sequence.num_scored = end
            sequence.generation.push(sequence.choice, new)
        return True

    def _accept(self, sequence: _Sequence, delta: TokenDelta) -> None:
        sequence.accepted.extend(delta.tokens)
        if delta.finish is None and len(sequence.accepted) == sequence.request.max_tokens:
            delta = dataclasses.replace(delta, finish=FinishReason.LENGTH)  # said or not, there can be no next
        if delta.finish is not None:
            self._remove(sequence)
        sequence.generation.push(sequence.choice, delta)

    def _reopen(self, sequence: _Sequence, reason: str) -> None:
        if sequence.attempt >= self._config.attempts_max:
            self._fail(
                sequence,
                GenerationFailed(
                    f"the sequence was placed {sequence.attempt} times (attempts_max) and lost each time: {reason}"
                ),
            )
            return
        sequence.attempt += 1
        self._metrics.attempts.labels(reason).inc()
        self._port.resume(_submission(sequence.request, [sequence], resume=True))

    def _fail(self, sequence: _Sequence, error: Refusal) -> None:
        self._remove(sequence)
        sequence.generation.fail(error)

    def _refused(self, reason: str) -> bool:
        self._metrics.deltas_refused.labels(reason).inc()
        return False

    def _current(self, request_id: str, index: int, attempt: int) -> _Sequence | None:
        sequence = self._sequences.get((request_id, index))
        return sequence if sequence is not None and sequence.attempt == attempt else None

    def _add(self, sequence: _Sequence) -> None:
        self._sequences[sequence.key] = sequence
        sequence.generation.sequences[sequence.choice] = sequence
        self._metrics.sequences.set(self.num_open)

    def _remove(self, sequence: _Sequence) -> None:
        self._sequences.pop(sequence.key, None)
        sequence.generation.sequences.pop(sequence.choice, None)
        self._metrics.sequences.set(self.num_open)


def _of(generation: Generation, request: GenerateRequest) -> list[_Sequence]:
    return [s for s in generation.sequences.values() if s.request is request]


def _submission(request: GenerateRequest, sequences: Sequence[_Sequence], *, resume: bool) -> Submission:
    siblings = tuple(
        Sibling(s.index, s.attempt, sibling_seed(request.sampling.seed, s.index), tuple(s.accepted), s.score_from)
        for s in sequences
    )
    generation = sequences[0].generation
    return Submission(
        request.request_id,
        request.prompt,
        request.sampling,
        request.stop_token_ids,
        request.max_tokens,
        request.num_logprobs,
        siblings,
        request.priority,
        request.tenant,
        resume,
        request.min_tokens,
        request.cache_salt,
        request.num_prompt_logprobs or 0,
        # A thousandth of a second stands for none at all: 0 would be no deadline.
        0.0 if math.isinf(request.time_s) else max(generation.time_left_s, 0.001),
        generation.age_s,
        request.grammar,
    )
