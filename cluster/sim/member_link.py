"""A simulated process's stream to the controller: as `cluster.member_link`, without gRPC and threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cluster.events import Order, OrderBody, Register, Report, ReportBody
from cluster.sim.arithmetic import SHAPE
from cluster.sim.network import End, Network
from cluster.sim.process import Process
from cluster.sim.settings import HEARTBEAT_S
from router.membership import Health

CONTROLLER = "controller"
_PAUSE_S_MIN, _PAUSE_S_MAX = 0.05, 1.0
_REPORTS_MAX = 256


class MemberLink:
    def __init__(
        self,
        process: Process,
        network: Network,
        register: Callable[[], Register],
        health: Callable[[], Health],
        on_order: Callable[[OrderBody], None],
    ) -> None:
        self._process, self._network = process, network
        self._register, self._health, self._on_order = register, health, on_order
        self._end: End | None = None
        self._reports: deque[ReportBody] = deque()
        self._pause_s = _PAUSE_S_MIN
        self.term = 0  # newest seen
        self.obeyed: list[int] = []  # terms, of the orders that were obeyed since they were last looked at

    def start(self) -> None:
        self._end = self._network.connect(self._process, CONTROLLER, self._hear, self._ended)
        self._say(self._register())
        while self._reports:
            self._say(self._reports.popleft())
        self._beat(self._end)

    def report(self, body: ReportBody | None = None) -> None:
        if body is not None:
            if len(self._reports) >= _REPORTS_MAX:
                self._reports.popleft()
            self._reports.append(body)
        if self._end is not None:
            while self._reports:
                self._say(self._reports.popleft())
            self._say(self._health())

    def _say(self, body: ReportBody) -> None:
        assert self._end is not None
        self._end.send(Report(self._process.member, SHAPE.fingerprint, self.term, body))

    def _beat(self, end: End) -> None:
        if self._end is end:
            self._say(self._health())
            self._process.after(HEARTBEAT_S, lambda: self._beat(end))

    def _hear(self, order: Order) -> None:
        self._pause_s = _PAUSE_S_MIN
        if order.term < self.term or order.fingerprint != SHAPE.fingerprint:
            return
        self.term = order.term
        self.obeyed.append(order.term)
        self._on_order(order.body)

    def _ended(self, _why: str) -> None:
        self._end = None
        self._process.after(self._pause_s, self.start)
        self._pause_s = min(2 * self._pause_s, _PAUSE_S_MAX)
