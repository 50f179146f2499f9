"""A simulated attention worker's streams: as `attention_workers.streams` and `links`, with the real deliveries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from expertmesh.v1 import step_pb2

from attention_workers import wire
from attention_workers.book import Book
from attention_workers.deliveries import Batch, Deliveries, parted
from attention_workers.step import Completion, StepResult
from attention_workers.streams import AttemptsRefused, GatewayGone, Greeted, Item, Snapshot
from cluster.sim.network import End, Network
from cluster.sim.process import Process
from cluster.sim.settings import REPORT_EVERY_S, TOKEN_BACKLOG_MAX

SCHEDULER = "scheduler"
_DELAY_MIN_S, _DELAY_MAX_S = 0.05, 2.0


class Streams:
    """`open` once the worker can run sequences; `hand_over` what each turn of its compute thread brought."""

    def __init__(self, process: Process, network: Network, book: Book, tell: Callable[[Item], None]) -> None:
        self._process, self._network, self._book, self._tell = process, network, book, tell
        self._scheduler: End | None = None
        self._delay_s = _DELAY_MIN_S
        self._is_open = False
        self._tokens: dict[str, TokenLink] = {}  # by gateway address
        self._latest = Snapshot(step_pb2.WorkerReport(), step_pb2.State())
        self.obeyed: list[int] = []  # terms, of the plans that were applied since they were last looked at

    def open(self) -> None:
        """Further calls change nothing."""
        if self._is_open:
            return
        self._is_open = True
        counts = wire.report_pb(self._process.member, self._book, 0, 0, experts_missing=False)
        self._latest = Snapshot(counts, wire.state_pb(self._book.state()))
        self._connect()
        self._process.after(REPORT_EVERY_S, lambda: self._report_counts(counts))

    def hand_over(self, result: StepResult, has_orders: bool, steps: int, tokens: int, is_missing: bool) -> None:
        if not self._is_open:
            return
        self._book.restate(result)
        counts = wire.report_pb(self._process.member, self._book, steps, tokens, experts_missing=is_missing)
        is_news, running = result.is_news(), self._latest.running
        if is_news or has_orders:
            running = wire.state_pb(self._book.state())
        self._latest = Snapshot(counts, running)
        batches, now = parted(result)
        for address, batch in batches.items():
            self._send(address, batch)
        if now or replace(result, completions=[]).is_news():
            self._report(wire.news_pb(counts, result, now))

    @property
    def is_draining(self) -> bool:
        return self._latest.counts.draining

    @property
    def num_open(self) -> int:
        """Those that run, or have ended and whose last tokens may not have arrived."""
        return len(self._book.sequences) + sum(
            len(link.deliveries.undelivered()) for link in self._tokens.values()
        )

    # To the scheduler.

    def _connect(self) -> None:
        self._scheduler = self._network.connect(self._process, SCHEDULER, self._hear, self._ended)
        self._tell(Greeted())
        hello = step_pb2.WorkerReport()
        hello.CopyFrom(self._latest.counts)
        hello.hello.CopyFrom(wire.hello_pb(self._book))
        hello.state.CopyFrom(self._latest.running)
        self._scheduler.send(hello)

    def _hear(self, plan: step_pb2.Plan) -> None:
        self._delay_s = _DELAY_MIN_S
        self._tell(wire.plan(plan))

    def _ended(self, _why: str) -> None:
        self._scheduler = None
        self._process.after(self._delay_s, self._connect)
        self._delay_s = min(2 * self._delay_s, _DELAY_MAX_S)

    def _report(self, report: step_pb2.WorkerReport) -> None:
        """Without a stream the next hello tells all."""
        if self._scheduler is not None:
            self._scheduler.send(report)

    def _report_counts(self, sent: step_pb2.WorkerReport) -> None:
        counts = self._latest.counts
        if counts != sent:
            self._report(counts)
        self._process.after(REPORT_EVERY_S, lambda: self._report_counts(counts))

    # To gateways.

    def _send(self, address: str, batch: Batch) -> None:
        if address not in self._tokens:
            self._tokens[address] = TokenLink(self, address)
        link = self._tokens[address]
        if not link.send(batch):
            link.end.close("too far behind")
            self._broken(link)

    def _broken(self, link: TokenLink) -> None:
        if self._tokens.get(link.address) is link:
            del self._tokens[link.address]
            self._tell(GatewayGone(link.address, link.deliveries.undelivered()))

    def _acknowledged(self, completions: list[Completion]) -> None:
        """Their last tokens have arrived: now the scheduler may forget them."""
        self._report(wire.news_pb(self._latest.counts, StepResult(), completions))


class TokenLink:
    """One stream to one gateway, until it breaks."""

    def __init__(self, streams: Streams, address: str) -> None:
        self.address = address
        self.deliveries = Deliveries(TOKEN_BACKLOG_MAX)
        self._streams = streams
        network = streams._network
        self.end = network.connect(streams._process, address, self._hear, lambda _why: streams._broken(self))

    def send(self, batch: Batch) -> bool:
        """False when the gateway has fallen too far behind."""
        if not self.deliveries.send(batch.completions):
            return False
        streams, number = self._streams, self.deliveries.number
        self.end.send(wire.batch_pb(streams._process.member, streams._book.fingerprint, batch.deltas, number))
        return True

    def _hear(self, ack: step_pb2.TokenAck) -> None:
        if completions := self.deliveries.acknowledge(ack.number):
            self._streams._acknowledged(completions)
        if ack.refused:
            self._streams._tell(AttemptsRefused([wire.attempt(a) for a in ack.refused]))
