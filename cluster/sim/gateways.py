"""A simulated gateway: the real ledger and token service; its stream to the scheduler is as in `gateway.link`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from expertmesh.v1 import schedule_pb2, step_pb2

from cluster.events import Exit, OrderBody, Register, Role
from cluster.sim.arithmetic import SHAPE
from cluster.sim.attention_links import SCHEDULER
from cluster.sim.member_link import MemberLink
from cluster.sim.network import End, Network
from cluster.sim.process import Process
from cluster.sim.settings import GATEWAY
from gateway import wire
from gateway.errors import NotReady, Refusal
from gateway.ledger import Ledger
from gateway.metrics import GatewayMetrics
from gateway.port import Submission
from gateway.token_service import TokenService
from router.membership import Health, HealthState


class Answer:
    """To one submission: awaited by the ledger, given by the scheduler or by time."""

    def __init__(self, on_given: Callable[[], None]) -> None:
        self._on_given = on_given
        self._given: int | Refusal | None = None

    def give(self, answer: int | Refusal) -> None:
        if self._given is None:
            self._given = answer
            self._on_given()

    def __await__(self) -> Generator[None, None, int]:
        while self._given is None:
            yield
        if isinstance(self._given, Refusal):
            raise self._given
        return self._given


class Port:
    """A SchedulerPort."""

    model_len_max = 0
    not_ready = ""

    def __init__(self, process: Process, network: Network, identity: wire.Identity) -> None:
        self._process, self._network, self._identity = process, network, identity
        self._pending: dict[str, Answer] = {}
        self._end: End | None = None  # while it is welcome
        self._term = 0
        self._pause_s = GATEWAY.reconnect_s_min
        self.ledger: Ledger | None = None
        self.obeyed: list[int] = []  # terms, of the orders that were obeyed since they were last looked at
        self.go_on: Callable[[], None] = lambda: None  # an answer has come

    async def submit(self, submission: Submission) -> int:
        if self._term == 0:
            raise NotReady("the scheduler has not been reached yet", retry_after_s=GATEWAY.retry_after_s)
        answer = self._pending[submission.request_id] = Answer(self.go_on)
        late = NotReady("the scheduler did not answer in time", retry_after_s=GATEWAY.retry_after_s)
        self._process.after(GATEWAY.submit_timeout_s, lambda: answer.give(late))
        try:
            submit = wire.submit(submission, GATEWAY.submit_bytes_max)
            self._send(schedule_pb2.GatewayMessage(submit=submit))
            return await answer
        finally:
            del self._pending[submission.request_id]

    def resume(self, submission: Submission) -> None:
        for submit in wire.submits(submission, GATEWAY.submit_bytes_max):
            self._send(schedule_pb2.GatewayMessage(submit=submit))

    def cancel(self, request_id: str) -> None:
        self._send(schedule_pb2.GatewayMessage(cancel=schedule_pb2.Cancel(request_id=request_id)))

    def finish(self, request_id: str, index: int, attempt: int, position: int) -> None:
        self._send(schedule_pb2.GatewayMessage(finish=wire.finish(request_id, index, attempt, position)))

    def _send(self, message: schedule_pb2.GatewayMessage) -> None:
        """Without a stream the next welcome makes up for it."""
        if self._end is not None:
            self._end.send(self._sealed(message))

    def _sealed(self, message: schedule_pb2.GatewayMessage) -> schedule_pb2.GatewayMessage:
        message.MergeFrom(wire.envelope(self._identity, self._term))
        return message

    def connect(self) -> None:
        end = self._network.connect(
            self._process, SCHEDULER, lambda order: self._hear(end, order), lambda _why: self._ended()
        )
        hello = schedule_pb2.GatewayHello(token_address=self._identity.token_address)
        end.send(self._sealed(schedule_pb2.GatewayMessage(hello=hello)))
        self._process.after(GATEWAY.connect_timeout_s, lambda: self._expect_welcome(end))

    def _expect_welcome(self, end: End) -> None:
        if end.is_open and self._end is not end:
            self._drop(end)

    def _drop(self, end: End) -> None:
        end.close()
        self._ended()

    def _ended(self) -> None:
        self._end = None
        self._process.after(self._pause_s, self.connect)
        self._pause_s = min(2 * self._pause_s, GATEWAY.reconnect_s_max)

    def _hear(self, end: End, order: schedule_pb2.GatewayOrder) -> None:
        if order.fingerprint != self._identity.fingerprint or order.term < self._term:
            self._drop(end)
            return
        self._term = order.term
        self.obeyed.append(order.term)
        if order.HasField("welcome"):
            self._welcomed(end)
        else:
            self._obey(order)

    def _welcomed(self, end: End) -> None:
        if self._end is end:
            return
        self._end, self._pause_s = end, GATEWAY.reconnect_s_min
        assert self.ledger is not None
        for submission in self.ledger.claims():
            self.resume(submission)

    def _obey(self, order: schedule_pb2.GatewayOrder) -> None:
        assert self.ledger is not None
        match order.WhichOneof("body"):
            case "accepted":
                self._answer(order.accepted.request_id, order.accepted.queued_before)
            case "rejected":
                error = wire.rejection(order.rejected, GATEWAY)
                if not self._answer(order.rejected.request_id, error):
                    self.ledger.refuse(order.rejected.request_id, error)
            case "closed":
                at, reason = order.closed.attempt, wire.close_reason(order.closed)
                self.ledger.close_attempt(at.request_id, at.index, at.number, reason, order.closed.detail)

    def _answer(self, request_id: str, answer: int | Refusal) -> bool:
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.give(answer)
        return pending is not None


class GatewayShell:
    """`on_turn`: something may have come for clients."""

    def __init__(self, process: Process, network: Network) -> None:
        self.process = process
        member = process.member
        identity = wire.Identity(member.id, member.incarnation, SHAPE.fingerprint, f"tokens-of-{process}")
        metrics = GatewayMetrics()
        self.port = Port(process, network, identity)
        self.ledger = self.port.ledger = Ledger(self.port, GATEWAY, metrics, process.now_s)
        self._tokens = TokenService(identity, "", self.ledger, GATEWAY, metrics)
        self.member_link = MemberLink(process, network, self._register, self._health, self._obey)
        network.listen(identity.token_address, process, self._accept)
        self.member_link.start()
        self.port.connect()

    def _register(self) -> Register:
        return Register(Role.GATEWAY, self.process.pid, self.process.node, "cpu", "http://")

    def _health(self) -> Health:
        return Health(HealthState.READY)

    def _obey(self, order: OrderBody) -> None:
        if isinstance(order, Exit):
            self.process.after(0.05, lambda: self.process.end(f"told to exit: {order.reason}"))

    def _accept(self, end: End) -> None:
        end.on_message = lambda batch: self._take(end, batch)

    def _take(self, end: End, batch: Any) -> None:
        assert isinstance(batch, step_pb2.TokenBatch)
        end.send(self._tokens.take(batch))
