"""The gateway's own numbers for Prometheus, in a registry of its own. Low cardinality: no ids in labels."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class GatewayMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "expertmesh_requests_total",
            "Calls answered, by endpoint and outcome (ok, hung_up or a status).",
            ["endpoint", "outcome"],
            registry=r,
        )
        self.in_flight = Gauge("expertmesh_requests_in_flight", "Calls being answered.", registry=r)
        self.sequences = Gauge("expertmesh_sequences_in_flight", "Sequences open in this gateway.", registry=r)
        self.first_token_s = Histogram(
            "expertmesh_time_to_first_token_seconds",
            "From a call's arrival to its first token.",
            ["endpoint"],
            registry=r,
            buckets=_FIRST_TOKEN_S,
        )
        self.between_tokens_s = Histogram(
            "expertmesh_inter_token_latency_seconds",
            "Between two deliveries of one sequence.",
            ["endpoint"],
            registry=r,
            buckets=_BETWEEN_TOKENS_S,
        )
        self.prompt_tokens = Counter("expertmesh_prompt_tokens_total", "Tokens of submitted prompts.", registry=r)
        self.generated_tokens = Counter(
            "expertmesh_generation_tokens_total", "Tokens given to clients, surplus ones not counted.", registry=r
        )
        self.deltas_refused = Counter(
            "expertmesh_deltas_refused_total", "Token messages refused, by reason.", ["reason"], registry=r
        )
        self.attempts = Counter(
            "expertmesh_attempts_reopened_total",
            "Further attempts opened, by what closed the last.",
            ["reason"],
            registry=r,
        )
        self.orders_refused = Counter(
            "expertmesh_scheduler_orders_refused_total",
            "Scheduler orders refused, by reason.",
            ["reason"],
            registry=r,
        )
        self.scheduler_links = Counter(
            "expertmesh_scheduler_links_total", "Streams to the scheduler that were welcomed.", registry=r
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class Meter:
    """One call's clock: counts it in flight from birth to `end`, which may be called once or more."""

    def __init__(self, metrics: GatewayMetrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._began_s = time.monotonic()
        self._last_s: dict[int, float] = {}  # by choice
        self._is_over = False
        metrics.in_flight.inc()

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens of one choice are on their way to the client."""
        now_s = time.monotonic()
        if not self._last_s:
            self._metrics.first_token_s.labels(self._endpoint).observe(now_s - self._began_s)
        elif choice in self._last_s:
            self._metrics.between_tokens_s.labels(self._endpoint).observe(now_s - self._last_s[choice])
        self._last_s[choice] = now_s
        self._metrics.generated_tokens.inc(count)

    def end(self, outcome: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(self._endpoint, outcome).inc()
