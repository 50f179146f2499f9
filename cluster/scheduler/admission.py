"""Whether a submission may enter the queue, and when to come back if not. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import RejectCode, Submission
from cluster.scheduler.waiting import Waiting, WaitingQueue
from cluster.scheduler.workers import Starting


@dataclass(frozen=True)
class Refusal:
    code: RejectCode
    message: str
    retry_after_s: float = 0.0


class Rate:
    """What was done per second in which any sequence waited for its first token, averaged with weights that fade
    over `window_s`. Time in which none waits says nothing of what could be served, and is not counted."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._level = 0.0  # of the weighted count
        self._age_s: float | None = None  # since the first; None: there was none

    def wait(self, elapsed_s: float) -> None:
        """So long some waited."""
        if self._age_s is not None:
            self._age_s += elapsed_s
            self._level *= math.exp(-elapsed_s / self._window_s)

    def add(self, num: int) -> None:
        if self._age_s is None:
            self._age_s = 0.0
        self._level += num

    def per_second(self) -> float:
        """0 until something was done. A young window is not taken for a slow one."""
        if self._age_s is None:
            return 0.0
        age_s = max(self._age_s, 1.0)
        return self._level / (self._window_s * -math.expm1(-age_s / self._window_s))


class Service:
    """How fast sequences get their first tokens and end: while some wait for room, and while none does."""

    def __init__(self, window_s: float) -> None:
        self.is_full = False  # as the last round left it: some wait for room
        self.ended = Rate(window_s)  # sequences, while full: else they end as they come
        self._rows = Rate(window_s)  # of prompts, while full: as many as room is found for
        self._rows_alone = Rate(window_s)  # while not: as many as are computed

    def wait(self, elapsed_s: float) -> None:
        """So long some waited for their first token."""
        for rate in (self.ended, self._rows) if self.is_full else (self._rows_alone,):
            rate.wait(elapsed_s)

    def add_ended(self, num: int) -> None:
        if self.is_full:
            self.ended.add(num)

    def add_rows(self, num: int) -> None:
        (self._rows if self.is_full else self._rows_alone).add(num)

    def wait_s(self, num_ahead: int, rows_ahead: float) -> float:
        """For the first token of one behind so many sequences and rows of their prompts. While full, the shorter
        of what the two rates say, for sequences that end now may be longer, or shorter, than those ahead. While
        not, or before it is known how fast they end, only prompts are waited for. 0: not known."""
        ended, rows, alone = self.ended.per_second(), self._rows.per_second(), self._rows_alone.per_second()
        if ended > 0 and (self.is_full or not alone):
            return min(num_ahead / ended, rows_ahead / rows if rows > 0 else math.inf)
        return rows_ahead / alone if alone > 0 else 0.0


class Appointments:
    """When those that were refused were told to come again: one after the other, as room comes free, so that they
    do not all return for the same place."""

    def __init__(self) -> None:
        self._last_s = -math.inf

    def after(self, retry_after_s: float, per_second: float, now_s: float, config: SchedulerConfig) -> float:
        """How long the next of them should wait, at least `retry_after_s`."""
        if per_second <= 0:
            return retry_after_s
        soonest_s = max(now_s + retry_after_s, self._last_s + 1 / per_second)
        self._last_s = min(soonest_s, now_s + config.retry_after_s_max)
        return self._last_s - now_s


def retry_after_s(queue: WaitingQueue, service: Service, config: SchedulerConfig) -> float:
    """How long what waits now will take to be served at the measured rates, within the bounds."""
    wait_s = service.wait_s(len(queue), queue.num_tokens) or config.retry_after_s_max
    return min(max(wait_s, config.retry_after_s_min), config.retry_after_s_max)


def too_large(submission: Submission, tokens_max: int) -> str:
    num_prompt = len(submission.prompt)
    return (
        f"prompt of {num_prompt} tokens and max_tokens {submission.max_tokens} make "
        f"{num_prompt + submission.max_tokens}; a sequence may have at most {tokens_max}"
    )


def refusal(
    entry: Waiting,
    queue: WaitingQueue,
    tokens_max: int,
    starting: Starting,
    service: Service,
    config: SchedulerConfig,
) -> Refusal | None:
    """None: it may enter. `tokens_max`: of the longest sequence that some worker can run; 0 while none has joined:
    then size is not judged. `starting`: what was placed and has no token yet."""
    submission = entry.submission
    num_prompt, total = len(submission.prompt), entry.tokens_total
    if 0 < tokens_max < total:
        return Refusal(RejectCode.TOO_LARGE, too_large(submission, tokens_max))
    if not len(queue):
        return _too_late(starting.num, starting.rows, submission.time_left_s, service, config)
    num_requests = queue.num_requests + 1
    waiting_after = num_prompt * len(submission.siblings) + queue.num_tokens
    for name, value, bound in (
        ("queued_requests_max", num_requests, config.queued_requests_max),
        ("queued_tokens_max", waiting_after, config.queued_tokens_max),
    ):
        if value > bound:
            return Refusal(
                RejectCode.OVERLOADED,
                f"{queue.num_requests} requests with {queue.num_tokens} prompt tokens are waiting; "
                f"this one would make {value}, {name} is {bound}",
                retry_after_s(queue, service, config),
            )
    num_ahead = queue.ahead_of(entry)
    rows_ahead = starting.rows + queue.num_tokens * num_ahead / len(queue)  # about
    return _too_late(starting.num + num_ahead, rows_ahead, submission.time_left_s, service, config)


def _too_late(
    num_ahead: int, rows_ahead: float, time_left_s: float, service: Service, config: SchedulerConfig
) -> Refusal | None:
    """Whether its first token would come later than promised, or than its deadline. Not judged before something
    has ended."""
    bounds = [("first_token_s", config.first_token_s), ("its deadline", time_left_s)]  # 0: none
    name, bound_s = min((named for named in bounds if named[1]), key=lambda named: named[1], default=("", 0.0))
    wait_s = service.wait_s(num_ahead, rows_ahead)
    if not name or wait_s <= bound_s:
        return None
    return Refusal(
        RejectCode.OVERLOADED,
        f"{num_ahead} sequences wait before this one: it would wait {wait_s:.1f} s, {name} is {bound_s:g} s",
        min(max(wait_s - bound_s, config.retry_after_s_min), config.retry_after_s_max),
    )
