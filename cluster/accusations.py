"""What attention workers say of expert workers whose links broke, and who is lost for it. Pure.

A broken link has two ends, and one report does not say which is to blame. So a report alone is no death: the
accused is lost once something else says so too (its own stream, its silence, a second observer), and where nothing
does, the accuser is. Until then nobody waits: the accuser computes with other replicas. Decision 15 says why so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from cluster.roster import Worker
from router.placement import Member


@dataclass(frozen=True)
class Verdict:
    """This worker is to be lost."""

    worker: Worker
    reason: str


@dataclass
class Accusations:
    doubt_s: float
    """How long an accusation waits for others that would confirm it before its accuser is looked at; and so long
    has an accused been silent whose silence confirms it."""

    patience_s: float
    """How long it then stands beside observers that say nothing."""

    _accusers: dict[Member, dict[Member, float]] = field(default_factory=dict)  # of each accused: who, since when

    def hear(self, accuser: Member, accused: Member, now_s: float) -> None:
        self._accusers.setdefault(accused, {}).setdefault(accuser, now_s)

    def confirmed(self, experts: Iterable[Worker], present: Collection[Member]) -> list[Verdict]:
        """At any time: whose stream has closed, or whom two lives accuse, one after the other or at once.

        `experts`: those that may live and do not leave. `present`: members whose stream to the controller stands.
        """
        verdicts = []
        for worker in self._accused(experts):
            accusers = sorted(self._accusers[worker.member])
            said = f"its link to {accusers[0].id} broke"
            if len(accusers) > 1:
                verdicts.append(Verdict(worker, f"{said}, and that to {accusers[1].id}"))
            elif worker.is_live and worker.member not in present:
                verdicts.append(Verdict(worker, said))
        return verdicts

    def due(self, experts: Collection[Worker], observers: Collection[Worker], now_s: float) -> list[Verdict]:
        """By the clock: the silent, and what nobody has confirmed. `observers`: attention workers that live and
        use an epoch."""
        verdicts: dict[Member, Verdict] = {}
        living = {observer.member: observer for observer in observers}
        for worker in self._accused(experts):
            [(accuser, since_s)] = self._accusers[worker.member].items()  # of two it would be lost by now
            said, heard_s = f"its link to {accuser.id} broke", worker.heard_s if worker.is_live else since_s
            if now_s - heard_s > self.doubt_s:
                verdicts[worker.member] = Verdict(worker, f"{said}, and it has been silent since")
                continue
            lives = worker.is_live and heard_s > since_s + self.doubt_s / 2
            if not lives or now_s - since_s <= self.doubt_s or accuser not in living:
                continue  # too early; or who accuses is gone: its successor sees for itself
            accuses = [member for member, by in self._accusers.items() if accuser in by]
            if len(accuses) > max(1, len(experts) / 2):
                why = f"it alone reports {len(accuses)} of {len(experts)} expert workers, which live"
                verdicts[accuser] = Verdict(living[accuser], why)
            elif len(living) == 1:
                verdicts[worker.member] = Verdict(worker, said)
            elif now_s - since_s > self.patience_s:
                why = f"it alone has reported {worker.id}, which lives, for {now_s - since_s:.1f} s"
                verdicts[accuser] = Verdict(living[accuser], why)
        return list(verdicts.values())

    def _accused(self, experts: Iterable[Worker]) -> list[Worker]:
        return [worker for worker in experts if worker.member in self._accusers]

    def forget(self, experts: Collection[Worker]) -> None:
        """Those who do not live any more; an accuser's word outlives it."""
        living = {worker.member for worker in experts}
        self._accusers = {member: by for member, by in self._accusers.items() if member in living}

    def restart_deadlines(self, now_s: float) -> None:
        """We were not looking for a while: nothing is due yet."""
        for by in self._accusers.values():
            by.update(dict.fromkeys(by, now_s))
