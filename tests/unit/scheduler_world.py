"""A cluster under virtual time: the real scheduler among simulated peers, with seeded faults.

Links lose what is in flight when they break. The world asserts at every move what must never happen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.core import Scheduler
from cluster.scheduler.events import (
    AttemptId,
    CancelRequested,
    Command,
    DropLink,
    Event,
    FinishReason,
    FinishRequested,
    GatewayJoined,
    GatewayLost,
    Incarnation,
    MembersExpected,
    SendPlan,
    Tick,
    WorkerLimits,
    WorkerLost,
)
from tests.unit.scheduler_model import Model
from tests.unit.scheduler_peers import MODEL, SimGateway, SimRequest, SimSequence, SimWorker, token_at


class World:
    """One scheduler at a time, its peers, and what is under way between them."""

    def __init__(self, seed: int, config: SchedulerConfig, limits: WorkerLimits) -> None:
        self.rng = random.Random(seed)
        self.config, self.limits = config, limits
        self.now_s = 0.0
        self.term = 1
        self.scheduler = Scheduler(config, 1, MODEL)
        self.model = Model(config, 1)
        self.draining: set[str] = set()
        self.said: deque[Event] = deque(maxlen=12)  # what may be said again
        self.inbox: list[Event] = []
        self.orders: dict[Incarnation, deque[Command]] = {}  # to linked peers
        self.workers: dict[str, SimWorker] = {}
        self.gateways: dict[str, SimGateway] = {}
        self.past: list[SimGateway] = []
        self.log: list[Command] = []
        self._names = itertools.count()

    # --- life of peers ---------------------------------------------------------------------------

    def start_worker(self, name: str) -> None:
        number = self.workers[name].incarnation.number + 1 if name in self.workers else 1
        self.kill_worker(name)
        self.workers[name] = SimWorker(Incarnation(name, number), self.limits)
        self.tell_members()

    def kill_worker(self, name: str) -> None:
        if name in self.workers:
            self.unlink(self.workers[name].incarnation)

    def start_gateway(self, name: str) -> None:
        number = 1
        if name in self.gateways:
            self.unlink(self.gateways[name].incarnation)
            self.past.append(self.gateways[name])
            number += self.gateways[name].incarnation.number
        self.gateways[name] = SimGateway(Incarnation(name, number), lambda: self.now_s)

    def tell_members(self) -> None:
        here = {w.incarnation for w in self.workers.values()}
        draining = frozenset(worker for worker in here if worker.id in self.draining)
        self.inbox.append(MembersExpected(frozenset(here), draining))

    def link(self, peer: SimWorker | SimGateway) -> None:
        if peer.incarnation in self.orders:
            return
        self.orders[peer.incarnation] = deque()
        if isinstance(peer, SimWorker):
            self.inbox.append(peer.hello())
        else:
            peer.is_welcome = False
            self.inbox.append(GatewayJoined(peer.incarnation, peer.address))

    def unlink(self, peer: Incarnation) -> None:
        """What is under way to it is lost; of what it said, the end may be."""
        if self.orders.pop(peer, None) is None:
            return
        said = [
            event for event in self.inbox if peer in (getattr(event, "worker", 0), getattr(event, "gateway", 0))
        ]
        for event in said[len(said) - self.rng.randrange(len(said) + 1) :]:
            self.inbox.remove(event)
        self.inbox.append(WorkerLost(peer) if peer.id in self.workers else GatewayLost(peer))

    def restart_scheduler(self) -> None:
        self.orders.clear()
        self.inbox.clear()
        self.term += 1
        self.scheduler = Scheduler(self.config, self.term, MODEL)
        self.model = Model(self.config, self.term)
        self.tell_members()

    # --- moves -----------------------------------------------------------------------------------

    def submit(
        self, n: int, num_prompt: int, max_tokens: int, priority: int, tenant: str = "", time_s: float = 0.0
    ) -> None:
        """`time_s`: until its deadline; 0: it has none."""
        gateway = self.rng.choice(sorted(self.gateways.values(), key=lambda g: g.incarnation))
        request_id = f"{gateway.incarnation}-{next(self._names)}"
        attempts = dict.fromkeys(range(n), 1)
        gateway.requests[request_id] = SimRequest(
            num_prompt, max_tokens, priority, tenant, attempts, {index: [] for index in attempts},
            deadline_s=self.now_s + time_s if time_s else math.inf,
        )  # fmt: skip
        if gateway.is_welcome and gateway.incarnation in self.orders:
            self.inbox.append(gateway.submission(request_id, list(attempts), resume=False))

    def give_up(self, *, whole_request: bool) -> None:
        """A client hangs up, or a stop string was found."""
        found = [(g, *sequence) for g in self.gateways.values() for sequence in g.open_sequences()]
        if not found:
            return
        gateway, request_id, index = self.rng.choice(found)
        request = gateway.requests[request_id]
        said: Event = FinishRequested(gateway.incarnation, AttemptId(request_id, index, request.attempts[index]))
        ending = [index]
        if whole_request:
            said, ending = CancelRequested(gateway.incarnation, request_id), request.open_indices()
        for one in ending:
            request.end(one, "given up")
        if gateway.incarnation in self.orders:
            self.inbox.append(said)

    def work(self, worker: SimWorker) -> None:
        for sequence in worker.step(chunk_tokens=self.rng.choice([1, 7, 64])):
            self._sample(worker, sequence)
        if worker.incarnation in self.orders:
            self.said.append(worker.report())
            self.inbox.append(self.said[-1])

    def _sample(self, worker: SimWorker, sequence: SimSequence) -> None:
        attempt, position = sequence.start.attempt, len(sequence.tokens)
        token = token_at(attempt.request_id, attempt.index, position)
        sequence.tokens.append(token)
        worker.tokens += 1
        finish = None
        if token % 13 == 0:
            finish = FinishReason.STOP
        elif len(sequence.tokens) == sequence.start.spec:
            finish = FinishReason.LENGTH
        gateway = next((g for g in self.gateways.values() if g.address == sequence.start.gateway_address), None)
        if gateway is None:
            worker.drop(attempt)
            worker.tell("undelivered", attempt)
        elif not gateway.take(attempt, position, token, finish):
            worker.end(attempt, FinishReason.CANCELLED)
        elif finish is not None:
            worker.end(attempt, finish)

    def deliver(self, peer: SimWorker | SimGateway, most: int) -> None:
        orders = self.orders.get(peer.incarnation, deque())
        for _ in range(min(most, len(orders))):
            order = orders.popleft()
            if isinstance(order, SendPlan):
                assert isinstance(peer, SimWorker)
                answer = peer.apply(self.term, order.plan)
                self.inbox.extend([answer] if answer else [])
                self._assert_runs_once()
            else:
                assert isinstance(peer, SimGateway)
                self.inbox.extend(peer.obey(order))

    def turn(self, elapsed_s: float = 0.05) -> None:
        """One turn of the shell."""
        self.now_s += elapsed_s
        events, self.inbox = self.inbox, []
        for event in [*events, Tick()]:
            commands = self.scheduler.step(event, self.now_s)
            self.model.heard(event, commands, self.now_s)
            self._send(commands)
        commands = self.scheduler.round(self.now_s)
        self.model.ordered(commands, self.now_s)
        self._send(commands)
        self.scheduler.check()
        self.model.agrees(self.scheduler.snapshot())

    def _send(self, commands: list[Command]) -> None:
        self.log.extend(commands)
        for command in commands:
            if isinstance(command, DropLink):
                self.unlink(command.to)
            elif command.to in self.orders:
                self.orders[command.to].append(command)
            if isinstance(command, SendPlan) and command.plan.starts:
                self._assert_room(command.to)

    # --- what must hold --------------------------------------------------------------------------

    def _assert_room(self, worker: Incarnation) -> None:
        gauges = self.scheduler.snapshot()
        for space in ("blocks", "sliding_blocks"):
            free, promised = (gauges[f"worker/{worker.id}/{space}_{n}"] for n in ("free", "promised"))
            assert promised <= free, f"{worker} was promised {promised} {space} of {free}"
        assert gauges[f"worker/{worker.id}/held"] <= self.limits.sequences_max

    def _assert_runs_once(self) -> None:
        """No attempt runs at two workers."""
        running = [attempt for worker in self.workers.values() for attempt in worker.sequences]
        assert len(running) == len(set(running))

    def heal(self, turns_max: int) -> int:
        """Everyone links; returns how many turns it took until nothing was open."""
        for turns in range(turns_max):
            for peer in [*self.gateways.values(), *self.workers.values()]:
                self.link(peer)
                self.deliver(peer, 100)
            for worker in self.workers.values():
                self.work(worker)
            self.turn()
            settled = not any(gateway.open_sequences() for gateway in self.gateways.values())
            if settled and not any(worker.sequences for worker in self.workers.values()) and not self.inbox:
                return turns
        raise AssertionError(f"not settled after {turns_max} turns: {self.scheduler.snapshot()}")
