"""What one key has open and has used, against what it may. Time comes as an argument, in seconds of any clock."""

from __future__ import annotations

from gateway.errors import Overloaded


class _Allowance:
    """So much a minute: it fills evenly and holds a minute's worth, full to begin with."""

    def __init__(self, per_minute: float) -> None:
        self._per_s = per_minute / 60
        self._most = per_minute
        self._left = per_minute
        self._at_s: float | None = None

    def wait_s(self, least: float, now_s: float) -> float:
        """Until at least so much is left (no more than a minute's worth): 0 if it is."""
        if self._at_s is not None:
            self._left = min(self._most, self._left + max(0.0, now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return max(0.0, (min(least, self._most) - self._left) / self._per_s)

    def use(self, amount: float) -> None:
        """What is left may become less than nothing."""
        self._left -= amount


class Account:
    def __init__(
        self,
        name: str = "",
        in_flight_max: int | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        retry_after_s: float = 1.0,
    ) -> None:
        """None: no limit. `retry_after_s`: told where nobody can know when a call in flight will end."""
        self.num_open = 0
        self._name = name
        self._in_flight_max = in_flight_max
        self._requests = _Allowance(requests_per_minute) if requests_per_minute else None
        self._tokens = _Allowance(tokens_per_minute) if tokens_per_minute else None
        self._per_minute = (requests_per_minute, tokens_per_minute)
        self._retry_after_s = retry_after_s

    def enter(self, now_s: float) -> None:
        """A call begins, until `leave`. Raises Overloaded; then it has not begun, and nothing was used."""
        if self._in_flight_max is not None and self.num_open >= self._in_flight_max:
            raise self._refusal("calls in flight", self._in_flight_max, self._retry_after_s)
        requests, tokens = self._per_minute
        if self._tokens and tokens and (wait_s := self._tokens.wait_s(1.0, now_s)) > 0:
            raise self._refusal("tokens per minute", tokens, wait_s)
        if self._requests and requests:
            if (wait_s := self._requests.wait_s(1.0, now_s)) > 0:
                raise self._refusal("requests per minute", requests, wait_s)
            self._requests.use(1.0)
        self.num_open += 1

    def leave(self) -> None:
        self.num_open -= 1

    def charge(self, num_tokens: int) -> None:
        """Tokens of a prompt that was admitted, or of an answer."""
        if self._tokens:
            self._tokens.use(num_tokens)

    def _refusal(self, what: str, most: float, wait_s: float) -> Overloaded:
        told = f"key {self._name!r} has used its {what}; accepted: at most {most:,g}"
        return Overloaded(told, retry_after_s=wait_s)
