"""What must hold after every event, and at the end.

Looked at wherever a process has just done something. That each position reaches its client once, in order and with
the right token is seen by the clients; that no row is merged twice and no block used by two, by the tokens.
"""

from __future__ import annotations

from attention_workers.step import AttemptId
from cluster.controller import Phase
from cluster.events import Command, Prepare, Publish, Retire, Role, Send
from cluster.sim.attention import AttentionShell
from cluster.sim.clients import Clients
from cluster.sim.cluster import Cluster, Shell
from cluster.sim.deciders import ControllerShell, SchedulerShell
from cluster.sim.experts import ExpertShell, Slot
from cluster.sim.gateways import GatewayShell
from router.placement import EpochId, Member, Placement


class Checks:
    def __init__(self, cluster: Cluster, clients: Clients) -> None:
        self._cluster, self._clients = cluster, clients
        self._touched: dict[Member, Shell] = {}
        self._terms: dict[tuple[Member, str], int] = {}  # newest obeyed, by process and decider
        self._runs: dict[Member, set[AttemptId]] = {}
        self._epochs: dict[Member, EpochId] = {}  # in use
        self._given: dict[tuple[Member, EpochId], frozenset[Slot]] = {}  # what epochs give an expert worker
        self._prepared: dict[Member, set[EpochId]] = {}

    def touch(self, shell: Shell) -> None:
        self._touched[shell.process.member] = shell

    def look(self) -> None:
        """After every event."""
        touched, self._touched = self._touched, {}
        for member, shell in touched.items():
            match shell:
                case AttentionShell():
                    self._attention(member, shell)
                case ExpertShell():
                    self._expert(member, shell)
                case SchedulerShell():
                    if shell.has_changed:
                        shell.has_changed = False
                        shell.scheduler.check()
                case GatewayShell():
                    self._obeyed(member, "scheduler", shell.port.obeyed)
            if not isinstance(shell, ControllerShell):
                self._obeyed(member, "controller", shell.member_link.obeyed)

    def _obeyed(self, member: Member, decider: str, terms: list[int]) -> None:
        newest = self._terms.get((member, decider), 0)
        for term in terms:
            assert term >= newest, f"{member.id} obeyed the {decider}'s term {term} after {newest}: stale"
            newest = term
        if terms:
            self._terms[member, decider] = newest
            terms.clear()

    def _attention(self, member: Member, shell: AttentionShell) -> None:
        if not shell.has_changed:
            return
        shell.has_changed = False
        shell.book.check()
        self._obeyed(member, "scheduler", shell.streams.obeyed)
        runs = set(shell.book.sequences)
        if runs != self._runs.get(member):
            self._runs[member] = runs
            self._alone(member, runs)
        if shell.has_placement:
            epoch, before = shell.dispatcher.epoch, self._epochs.get(member)
            assert before is None or epoch >= before, f"{member.id}: epoch {epoch} after {before}"
            self._epochs[member] = epoch

    def _alone(self, member: Member, runs: set[AttemptId]) -> None:
        for other, theirs in self._runs.items():
            both = runs & theirs if other != member and self._cluster.shells[other].process.is_alive else None
            assert not both, f"{member.id} and {other.id} both run {both}"

    def _expert(self, member: Member, shell: ExpertShell) -> None:
        """What an epoch gives it stays, once prepared, until that epoch is retired."""
        if not shell.has_changed:
            return
        shell.has_changed = False
        prepared = self._prepared.setdefault(member, set())
        if shell.epoch is not None:
            prepared.add(shell.epoch)
        for epoch in [e for e in prepared if e >= shell.oldest]:
            gone = self._given[member, epoch] - shell.slots
            assert not gone, f"{member.id}: slots {sorted(gone)[:4]} freed, epoch {epoch} is not retired"

    # What a controller may order.

    def commanded(self, shell: ControllerShell, command: Command) -> None:
        match command:
            case Send(to, Prepare(placement)):
                (given,) = [frozenset(w.experts) for w in placement.workers if w.member == to]
                self._given[to, placement.epoch] = given
            case Send(_, Publish(placement)):
                self._complete(placement)
            case Send(to, Retire(epoch)):
                self._unused(shell, epoch)

    def _complete(self, placement: Placement) -> None:
        placement.validate()
        for placed in placement.workers:
            holder = self._cluster.shells[placed.member]
            assert isinstance(holder, ExpertShell), f"{placed.member} is placed, and is no expert worker"
            missing = set(placed.experts) - holder.slots
            assert not missing, f"{placement.epoch} is published, {placed.member.id} lacks {sorted(missing)[:4]}"

    def _unused(self, shell: ControllerShell, retired: EpochId) -> None:
        roster = shell.controller.roster
        users = [
            member.id for member, epoch in self._epochs.items()
            if epoch <= retired and self._cluster.shells[member].process.is_alive and roster.find(member)
        ]  # fmt: skip
        assert not users, f"{retired} is retired while {users} use it or an older one"

    # When all is healed.

    def unrest(self) -> str:
        """What has not come to rest yet; empty when everything has."""
        if self._clients.num_open:
            return f"{self._clients.num_open} requests have not ended"
        controller, scheduler = self._cluster.controller, self._cluster.find("scheduler")
        if controller is None or not isinstance(scheduler, SchedulerShell):
            return "a decider is missing"
        if controller.controller.phase is not Phase.READY:
            return f"the cluster is {controller.controller.phase.value}"
        gauges = scheduler.scheduler.snapshot()
        if left := [name for name in ("requests", "waiting", "running") if gauges[name]]:
            return f"the scheduler's books are not empty: {', '.join(f'{gauges[name]:g} {name}' for name in left)}"
        attention = [shell for shell in self._cluster.living() if isinstance(shell, AttentionShell)]
        roster = controller.controller.roster
        if leaving := [worker.id for worker in roster.workers.values() if not worker.is_wanted]:
            return f"{leaving} have not left"
        if gauges["workers"] != len(roster.wanted(Role.ATTENTION)) or len(attention) != gauges["workers"]:
            return f"{gauges['workers']:g} attention workers are with the scheduler, {len(attention)} live"
        for shell in attention:
            held = {
                k: s.total - s.num_available for k, s in shell.book.spaces.items() if s.total != s.num_available
            }
            if held or shell.book.sequences:
                return f"{shell.process} runs {len(shell.book.sequences)} sequences and holds {held} blocks"
        return self._epochs_at_rest(controller, attention)

    def _epochs_at_rest(self, shell: ControllerShell, attention: list[AttentionShell]) -> str:
        epochs = shell.controller.epochs
        published = epochs.published
        if (
            published is None
            or epochs.preparing is not None
            or len(published.workers) != len(shell.controller.roster.wanted(Role.EXPERT))
        ):
            return f"a placement is being prepared, or not all expert workers are placed: {published}"
        if late := [str(a.process) for a in attention if a.dispatcher.epoch != published.epoch]:
            return f"{late} have not adopted {published.epoch}"
        return ""
