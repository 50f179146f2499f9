"""One life of one process: a clock of its own, work in several threads, and the ways it stands still or ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeAlias

from cluster.sim.world import Action, World
from router.placement import Member

SKEW_MAX = 0.02  # by how much a clock runs fast or slow
AGE_S_MAX = 1e6  # what a clock shows at first: nobody's can be compared with another's


class Bell:
    """Wakes the one thread that waits for it; rung before, it does not let it wait."""

    def __init__(self) -> None:
        self.is_rung = False
        self.wake: Action | None = None

    def ring(self) -> None:
        self.is_rung = True
        if self.wake is not None:
            self.wake()


Wait: TypeAlias = tuple[Bell | None, float]
"""What a thread yields: it goes on when the bell is rung, or after so many seconds of its process's clock."""
Work: TypeAlias = Generator[Wait, None, None]


class Process:
    def __init__(self, world: World, member: Member, node: str, pid: int) -> None:
        self.world, self.member, self.node, self.pid = world, member, node, pid
        self.is_alive = True
        self.frozen_since_s: float | None = None
        self.slow = 1.0  # how many times as long its work takes
        self.on_end: list[Callable[[str], None]] = []
        self.on_done: Callable[[Process], None] = lambda _process: None  # after everything it did
        self._rate = 1.0 + world.between(-SKEW_MAX, SKEW_MAX)
        self._age_s = world.between(0.0, AGE_S_MAX)
        self._backlog: list[Action] = []

    def __str__(self) -> str:
        return f"{self.member.id}#{self.member.incarnation}"

    def now_s(self) -> float:
        """By its own clock."""
        return self._age_s + self.world.now_s * self._rate

    def after(self, delay_s: float, action: Action) -> None:
        self.world.at(delay_s / self._rate, lambda: self.do(action))

    def do(self, action: Action) -> None:
        """Now, once it turns again, or never."""
        if not self.is_alive:
            return
        if self.frozen_since_s is not None:
            self._backlog.append(action)
            return
        action()
        self.on_done(self)

    def spawn(self, work: Work) -> None:
        """A thread."""
        _Thread(self, work).go_on(0)

    def freeze(self) -> None:
        """As SIGSTOP does."""
        if self.is_alive and self.frozen_since_s is None:
            self.frozen_since_s = self.world.now_s

    def thaw(self) -> None:
        """As SIGCONT does; nothing where it turns already."""
        self.frozen_since_s = None
        backlog, self._backlog = self._backlog, []
        for action in backlog:
            self.do(action)

    def end(self, why: str) -> None:
        """As SIGKILL does."""
        if self.is_alive:
            self.is_alive = False
            for told in self.on_end:
                told(why)


class _Thread:
    def __init__(self, process: Process, work: Work) -> None:
        self._process, self._work = process, work
        self._number = 0  # of the wait that it is in

    def go_on(self, number: int) -> None:
        if number != self._number:
            return  # the other reason to go on came first
        self._number += 1
        wanted = next(self._work, None)
        if wanted is None:
            return
        bell, seconds = wanted
        at = self._number
        if bell is not None:
            bell.wake = lambda: self._rung(bell, at)
            if bell.is_rung:
                seconds = 0.0
            bell.is_rung = False
        self._process.after(seconds, lambda: self.go_on(at))

    def _rung(self, bell: Bell, at: int) -> None:
        if at == self._number and bell.is_rung:
            bell.is_rung, bell.wake = False, None
            self._process.after(0.0, lambda: self.go_on(at))
