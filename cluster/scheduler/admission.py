"""Whether a submission may enter the queue, and when to come back if not. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import RejectCode, Submission, WorkerLimits
from cluster.scheduler.waiting import Waiting, WaitingQueue


@dataclass(frozen=True)
class Refusal:
    code: RejectCode
    message: str
    retry_after_s: float = 0.0


class CompletionRate:
    """Sequences ended per second, averaged with weights that fade over `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._level = 0.0  # of the weighted count, as of `_at_s`
        self._began_s: float | None = None
        self._at_s = 0.0

    def add(self, num_sequences: int, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._at_s = now_s
        self._level = self._level * math.exp((self._at_s - now_s) / self._window_s) + num_sequences
        self._at_s = now_s

    def per_second(self, now_s: float) -> float:
        """0 until something has ended. A young window is not taken for a slow one."""
        if self._began_s is None:
            return 0.0
        level = self._level * math.exp((self._at_s - now_s) / self._window_s)
        age_s = max(now_s - self._began_s, 1.0)
        return level / (self._window_s * -math.expm1(-age_s / self._window_s))


def retry_after_s(queue: WaitingQueue, per_second: float, config: SchedulerConfig) -> float:
    """How long what waits now will take to be served at the measured rate, within the bounds."""
    if per_second <= 0:
        return config.retry_after_s_max
    return min(max(len(queue) / per_second, config.retry_after_s_min), config.retry_after_s_max)


def too_large(submission: Submission, tokens_max: int) -> str:
    num_prompt = len(submission.prompt)
    return (
        f"prompt of {num_prompt} tokens and max_tokens {submission.max_tokens} make "
        f"{num_prompt + submission.max_tokens}; a sequence may have at most {tokens_max}"
    )


def refusal(
    entry: Waiting,
    queue: WaitingQueue,
    workers: Iterable[WorkerLimits],
    per_second: float,
    config: SchedulerConfig,
) -> Refusal | None:
    """None: it may enter. `workers` may be empty while they are expected: then size is not judged."""
    submission = entry.submission
    num_prompt, total = len(submission.prompt), entry.tokens_total
    tokens_max = max((limits.tokens_max for limits in workers), default=total)
    if total > tokens_max:
        return Refusal(RejectCode.TOO_LARGE, too_large(submission, tokens_max))
    if not len(queue):
        return None
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
                retry_after_s(queue, per_second, config),
            )
    return _too_late(queue.ahead_of(entry), submission.time_left_s, per_second, config)


def _too_late(num_ahead: int, time_left_s: float, per_second: float, config: SchedulerConfig) -> Refusal | None:
    """Whether its first token would come later than promised, or than its deadline. Not judged before something
    has ended."""
    bounds = [("first_token_s", config.first_token_s), ("its deadline", time_left_s)]  # 0: none
    name, bound_s = min((named for named in bounds if named[1]), key=lambda named: named[1], default=("", 0.0))
    if not name or per_second <= 0 or num_ahead <= bound_s * per_second:
        return None
    wait_s = num_ahead / per_second
    return Refusal(
        RejectCode.OVERLOADED,
        f"{num_ahead} sequences wait before this one and {per_second:.3g} end in a second: it would wait "
        f"{wait_s:.0f} s, {name} is {bound_s:g} s",
        min(max(wait_s - bound_s, config.retry_after_s_min), config.retry_after_s_max),
    )
