"""What a scheduler must hold after all it was told: written down anew from its words, slow and obvious.

It shares no code with the core. It hears every event with the commands that answered it, keeps in plain
dictionaries where each sequence has to be, and compares. What is up to the scheduler (whom it accepts, where it
places, who gives way) it reads off the commands, and judges by the promises: nothing lost, nothing run twice, room
as it was reported, bounds of the queue, of giving way and of fairness.
"""

from __future__ import annotations

from cluster.scheduler import events as ev
from cluster.scheduler.config import SchedulerConfig
from tests.unit.scheduler_fairness import Fairness
from tests.unit.scheduler_parts import AtWorker, Key, Sequence, Worker


class Model:
    def __init__(self, config: SchedulerConfig, term: int) -> None:
        self.config, self.term = config, term
        self.sequences: dict[Key, Sequence] = {}
        self.submissions: dict[Key, ev.Submission] = {}  # as last said
        self.owners: dict[str, ev.Incarnation] = {}
        self.deadlines: dict[str, float] = {}
        self.ended: dict[Key, int] = {}  # number of the last attempt that ended without finishing
        self.gateways: dict[str, tuple[ev.Incarnation, float | None]] = {}  # and since when its link is gone
        self.workers: dict[ev.Incarnation, Worker] = {}
        self.draining: frozenset[ev.Incarnation] = frozenset()
        self.expected: frozenset[ev.Incarnation] | None = None
        self.expected_once: set[ev.Incarnation] = set()
        self.ever_started: set[int] = set()
        self.unclaimed: dict[str, float] = {}
        self.fairness = Fairness()
        self.last_s = 0.0

    # --- what the scheduler hears ------------------------------------------------------------------

    def heard(self, event: ev.Event, commands: list[ev.Command], now_s: float) -> None:
        if now_s - self.last_s > self.config.tick_gap_s_max:
            self._restart_deadlines(now_s)
        self.last_s = now_s
        dropped = any(isinstance(command, ev.DropLink) for command in commands)
        handler = getattr(self, "_" + type(event).__name__)
        handler(event, commands, now_s, dropped)
        for command in commands:
            if isinstance(command, ev.CloseAttempt):
                self._close(command)
        self._note_waiting()

    def _restart_deadlines(self, now_s: float) -> None:
        for name, (gateway, lost_s) in self.gateways.items():
            self.gateways[name] = (gateway, None if lost_s is None else now_s)
        for worker in self.workers.values():
            worker.lost_s = None if worker.lost_s is None else now_s
        self.unclaimed = dict.fromkeys(self.unclaimed, now_s)

    def _GatewayJoined(self, event, commands, now_s, dropped) -> None:
        if dropped:
            return
        known = self.gateways.get(event.gateway.id)
        assert not (known and known[0] > event.gateway), f"{event.gateway} joins"
        if known and known[0] < event.gateway:
            self._withdraw_gateway(known[0])
        self.gateways[event.gateway.id] = (event.gateway, None)

    def _GatewayLost(self, event, commands, now_s, dropped) -> None:
        known = self.gateways.get(event.gateway.id)
        if known == (event.gateway, None):
            self.gateways[event.gateway.id] = (event.gateway, now_s)

    def _Submitted(self, event, commands, now_s, dropped) -> None:
        if not any(isinstance(c, ev.Accept) for c in commands):
            assert not self._is_known(event.gateway) or commands, f"{event} was not answered"
            return
        said = event.submission
        closed = {c.attempt for c in commands if isinstance(c, ev.CloseAttempt)}
        self._judge_bounds(said)
        self.unclaimed.pop(said.request_id, None)
        for sibling in said.siblings:
            key = (said.request_id, sibling.index)
            attempt = ev.AttemptId(*key, sibling.attempt)
            live = self.sequences.get(key)
            if attempt in closed or (live and live.attempt > attempt):
                continue
            self.submissions[key] = said
            if live and live.attempt == attempt:
                if live.place and live.place[1] in self.workers[live.place[0]].holds:
                    self._recognise(self.workers[live.place[0]].holds[live.place[1]], said, sibling)
                continue
            if live:
                self._withdraw(key)
            runs = said.resume and (sibling.attempt > 1 or sibling.accepted)
            left = said.max_tokens - len(sibling.accepted)
            tenant = "" if runs else said.tenant
            self.sequences[key] = Sequence(attempt, None, tenant, left + (0 if runs else len(said.prompt)))
        if said.time_left_s and said.request_id not in self.deadlines:
            self.deadlines[said.request_id] = now_s + said.time_left_s
        self.owners[said.request_id] = event.gateway
        self._tidy(said.request_id)  # all of it may have been closed at once

    def _judge_bounds(self, said: ev.Submission) -> None:
        if said.resume or any(key[0] == said.request_id for key in self.sequences):
            return
        waiting = {key[0] for key, sequence in self.sequences.items() if sequence.place is None}
        tokens = sum(len(self.submissions[k].prompt) for k, s in self.sequences.items() if s.place is None)
        if waiting:
            assert len(waiting) < self.config.queued_requests_max
            assert tokens + len(said.prompt) * len(said.siblings) <= self.config.queued_tokens_max

    def _CancelRequested(self, event, commands, now_s, dropped) -> None:
        if self.owners.get(event.request_id) == event.gateway:
            for key in [key for key in self.sequences if key[0] == event.request_id]:
                self._withdraw(key)

    def _FinishRequested(self, event, commands, now_s, dropped) -> None:
        live = self.sequences.get(event.attempt[:2])
        is_owner = self.owners.get(event.attempt.request_id) == event.gateway
        if live and live.attempt == event.attempt and is_owner and event.attempt.request_id not in self.unclaimed:
            self._withdraw(event.attempt[:2])

    def _WorkerJoined(self, event, commands, now_s, dropped) -> None:
        is_stale = any(w.id == event.worker.id and w > event.worker for w in self.workers)
        is_past = any(w.id == event.worker.id and w >= event.worker for w in self.expected_once)
        is_lost = is_past and event.worker not in (self.expected or ())
        assert dropped == (is_stale or is_lost), f"{event.worker} joins"
        if dropped:
            return
        for other in [w for w in self.workers if w.id == event.worker.id and w != event.worker]:
            self._lose(other)
        worker = self.workers.get(event.worker)
        if worker is None:
            worker = self.workers[event.worker] = Worker(event.limits, event.report, {}, 0)
        self._take_report(event.worker, event.report)
        worker.limits, worker.lost_s = event.limits, None
        worker.sent = event.report.plan_number if event.report.term == self.term else 0
        self._take_state(event.worker, event.report.state or (), 1 << 62, now_s)

    def _WorkerLost(self, event, commands, now_s, dropped) -> None:
        worker = self.workers.get(event.worker)
        if worker and worker.lost_s is None:
            worker.lost_s = now_s
            if self.expected is not None and event.worker not in self.expected:
                self._lose(event.worker)

    def _WorkerReported(self, event, commands, now_s, dropped) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.lost_s is not None:
            return
        if dropped:
            worker.lost_s = now_s
            return
        self._take_report(event.worker, event)
        if event.state is not None:
            applied = event.plan_number if event.term == self.term else 0
            self._take_state(event.worker, event.state, applied, now_s)

    def _take_report(self, name: ev.Incarnation, report: ev.WorkerReported) -> None:
        worker = self.workers[name]
        for handle, reason, num_tokens in zip(*report.endings[:3], strict=True):
            self._give_back(worker.holds.get(handle), num_tokens)
            self._end_at(name, handle, is_finish=reason in (1, 2))
        for attempt in report.undelivered:
            for handle in [h for h, held in worker.holds.items() if held.attempt == attempt]:
                self._give_back(worker.holds[handle], 0)
                self._end_at(name, handle, is_finish=False)
        for handle in report.prompts_done:
            if handle in worker.holds:
                worker.holds[handle].prompt_done = True
        worker.report = report

    def _take_state(self, name: ev.Incarnation, state: tuple[ev.Running, ...], applied: int, now_s: float) -> None:
        worker = self.workers[name]
        said = {running.handle: running for running in state}
        for handle, held in list(worker.holds.items()):
            if handle not in said and held.plan <= applied:
                self._give_back(held, 0)
                self._end_at(name, handle, is_finish=False)
            elif handle in said and applied == 1 << 62:
                held.prompt_done |= said[handle].prompt_done
        for handle, running in said.items():
            if handle not in worker.holds:
                worker.holds[handle] = held = AtWorker(
                    running.attempt, 0, running.num_tokens, prompt_done=running.prompt_done
                )
                self._adopt(name, handle, held, now_s)

    def _adopt(self, name: ev.Incarnation, handle: int, held: AtWorker, now_s: float) -> None:
        """It goes on, unless something newer is known."""
        attempt, key = held.attempt, held.attempt[:2]
        live = self.sequences.get(key)
        if live is None and self.ended.get(key, 0) < attempt.number:
            if not any(other[0] == key[0] for other in self.sequences):
                self.unclaimed[key[0]] = now_s
                self.owners.pop(key[0], None)
                self.deadlines.pop(key[0], None)
            self.sequences[key] = Sequence(attempt, (name, handle))
        elif live and live.attempt == attempt and live.place is None:
            live.place = (name, handle)
            said = self.submissions[key]
            sibling = next(s for s in said.siblings if s.index == key[1])
            self._recognise(held, said, sibling)
        elif live and live.attempt < attempt and key[0] in self.unclaimed:
            self.sequences[key] = Sequence(attempt, (name, handle))

    def _recognise(self, held: AtWorker, said: ev.Submission, sibling: ev.Sibling) -> None:
        if not held.charged:
            held.charged, held.tenant, held.priority = said.max_tokens, said.tenant, said.priority
            self.fairness.out_of_turn(said.tenant, said.max_tokens - len(sibling.accepted))

    def _MembersExpected(self, event, commands, now_s, dropped) -> None:
        self.expected, self.draining = event.workers, event.draining
        self.expected_once |= event.workers
        for name in [n for n, w in self.workers.items() if w.lost_s is not None and n not in event.workers]:
            self._lose(name)

    def _Tick(self, event, commands, now_s, dropped) -> None:
        for name, worker in list(self.workers.items()):
            if worker.lost_s is not None and now_s - worker.lost_s >= self.config.worker_deadline_s:
                self._lose(name)
        for name, (gateway, lost_s) in list(self.gateways.items()):
            if lost_s is not None and now_s - lost_s >= self.config.gateway_lease_s:
                self._withdraw_gateway(gateway)
                del self.gateways[name]
        for request_id, since_s in list(self.unclaimed.items()):
            if now_s - since_s >= self.config.gateway_lease_s:
                for key in [key for key in self.sequences if key[0] == request_id]:
                    self._withdraw(key)
        for request_id, at_s in list(self.deadlines.items()):
            if at_s <= now_s:
                for key in [key for key in self.sequences if key[0] == request_id]:
                    self._withdraw(key)

    # --- what it orders ----------------------------------------------------------------------------

    def ordered(self, commands: list[ev.Command], now_s: float) -> None:
        """The commands of a round."""
        for command in commands:
            if isinstance(command, ev.CloseAttempt):
                self._judge_victim(command)
                self._close(command)
            elif isinstance(command, ev.SendPlan):
                self._judge_plan(command.to, command.plan)
        self._note_waiting()

    def _judge_victim(self, command: ev.CloseAttempt) -> None:
        live = self.sequences.get(command.attempt[:2])
        if command.reason is not ev.CloseReason.PREEMPTED or "gives way to priority" not in command.detail:
            return
        assert live is not None
        assert live.place is not None, f"{command.attempt} gives way, but does not run"
        priority = self.workers[live.place[0]].holds[live.place[1]].priority
        called = int(command.detail.rsplit(" ", 1)[1])
        assert priority > called, f"priority {priority} gives way to {called}"
        assert command.attempt.number <= self.config.yields_max

    def _judge_plan(self, to: ev.Incarnation, plan: ev.Plan) -> None:
        worker = self.workers[to]
        assert worker.lost_s is None
        assert plan.number == worker.sent + 1
        worker.sent = plan.number
        assert plan.draining == (to in self.draining) or self.expected is None
        for attempt in plan.stops:
            held = [h for h in worker.holds.values() if h.attempt == attempt]
            live = self.sequences.get(attempt[:2])
            assert held, f"{attempt} is stopped, and not there"
            assert not (live and live.attempt == attempt and live.place), f"{attempt} is stopped, and wanted"
        for start in plan.starts:
            self._judge_start(to, worker, plan.number, start)
        if plan.starts:
            self._judge_room(to, worker)

    def _judge_start(self, to: ev.Incarnation, worker: Worker, number: int, start: ev.Start) -> None:
        assert to not in self.draining, f"{start.attempt} starts at {to}, which drains"
        assert start.handle not in self.ever_started
        self.ever_started.add(start.handle)
        key = start.attempt[:2]
        live = self.sequences[key]
        assert (live.attempt, live.place) == (start.attempt, None), f"{start.attempt} starts, and {live}"
        live.place = (to, start.handle)
        said = self.submissions[key]
        assert start.priority == said.priority
        assert self.ended.get(key, 0) < start.attempt.number, f"{start.attempt} starts again"
        num_tokens = len(start.prompt) + len(start.accepted)
        worker.holds[start.handle] = AtWorker(
            start.attempt, number, num_tokens, said.max_tokens, said.tenant, start.priority
        )
        charge = self.fairness.in_turn if live.tenant else self.fairness.out_of_turn
        charge(said.tenant, live.cost)

    def _judge_room(self, to: ev.Incarnation, worker: Worker) -> None:
        limits, report = worker.limits, worker.report
        assert len(worker.holds) <= limits.sequences_max
        assert (report.num_paused, report.experts_missing) == (0, False)
        full = sliding = 0
        for held in worker.holds.values():
            if not held.prompt_done:
                blocks = -(-(held.num_tokens + 1) // limits.block_tokens)
                full += blocks
                if limits.sliding_window:
                    seen = limits.sliding_window - 1 + self.config.chunk_tokens_max
                    sliding += min(blocks, -(-(seen - 1) // limits.block_tokens) + 1, limits.sliding_blocks_total)
        assert full <= report.blocks_free, f"{to} was promised {full} blocks of {report.blocks_free}"
        assert sliding <= report.sliding_blocks_free

    # --- moves -------------------------------------------------------------------------------------

    def _is_known(self, gateway: ev.Incarnation) -> bool:
        return self.gateways.get(gateway.id, (None,))[0] == gateway

    def _close(self, command: ev.CloseAttempt) -> None:
        """It is ended for its gateway; whoever runs it still has to say so."""
        live = self.sequences.get(command.attempt[:2])
        if live and live.attempt == command.attempt:
            self._withdraw(command.attempt[:2])
        self.ended[command.attempt[:2]] = max(self.ended.get(command.attempt[:2], 0), command.attempt.number)

    def _withdraw(self, key: Key) -> None:
        live = self.sequences.pop(key)
        self.ended[key] = live.attempt.number
        self._tidy(key[0])

    def _withdraw_gateway(self, gateway: ev.Incarnation) -> None:
        for key in [key for key in self.sequences if self.owners.get(key[0]) == gateway]:
            self._withdraw(key)

    def _end_at(self, name: ev.Incarnation, handle: int, *, is_finish: bool) -> None:
        held = self.workers[name].holds.pop(handle, None)
        if held is None:
            return
        key = held.attempt[:2]
        live = self.sequences.get(key)
        if live and live.place == (name, handle):
            del self.sequences[key]
            if not is_finish:
                self.ended[key] = held.attempt.number
            self._tidy(key[0])

    def _lose(self, name: ev.Incarnation) -> None:
        for handle in list(self.workers[name].holds):
            self._give_back(self.workers[name].holds[handle], 0)
            self._end_at(name, handle, is_finish=False)
        del self.workers[name]

    def _tidy(self, request_id: str) -> None:
        if not any(key[0] == request_id for key in self.sequences):
            self.unclaimed.pop(request_id, None)
            self.deadlines.pop(request_id, None)
            self.owners.pop(request_id, None)

    def _give_back(self, held: AtWorker | None, num_tokens: int) -> None:
        if held is not None:
            self.fairness.given_back(held.tenant, max(0, held.charged - num_tokens))

    # --- what must hold ----------------------------------------------------------------------------

    def _note_waiting(self) -> None:
        self.fairness.note({s.tenant for s in self.sequences.values() if s.place is None and s.tenant})

    def agrees(self, gauges: dict[str, float]) -> None:
        """Nothing is lost, and nothing is kept that has ended."""
        placed = [s.place for s in self.sequences.values() if s.place]
        assert len(placed) == len(set(placed))
        for name, handle in placed:
            assert handle in self.workers[name].holds
        waiting = sum(sequence.place is None for sequence in self.sequences.values())
        assert gauges["waiting"] == waiting, f"{gauges['waiting']:g} wait, {waiting} should"
        assert gauges["requests"] == len({key[0] for key in self.sequences})
        for name, worker in self.workers.items():
            held = gauges[f"worker/{name.id}/held"]
            assert held == len(worker.holds), f"{name} has {held:g}, {len(worker.holds)} should be there"
        assert gauges["running"] == sum(len(worker.holds) for worker in self.workers.values())
        self.fairness.judge()
