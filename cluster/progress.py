"""Shows a cluster coming up: a bar per worker on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cluster.commands.sizes import show_size

_LINE_EVERY_S = 2.0


class LoadingDisplay(Protocol):
    def update(self, document: dict[str, Any]) -> None:
        """Show this status document."""

    def close(self) -> None:
        """Idempotent."""


def loading_display(console: Console) -> LoadingDisplay:
    return LoadingBars(console) if console.is_terminal else LoadingLines(console)


class LoadingBars:
    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:14}"), BarColumn(), TextColumn("{task.fields[loaded]:24}"))
        self._bars = Progress(*columns, TextColumn("{task.fields[doing]}"), console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()

    def update(self, document: dict[str, Any]) -> None:
        for worker in document["workers"]:
            if worker["id"] not in self._tasks:
                self._tasks[worker["id"]] = self._bars.add_task(worker["id"], total=None, loaded="", doing="")
            total = worker["bytes_total"] or None
            is_ready = worker["state"] == "ready"
            self._bars.update(
                self._tasks[worker["id"]], total=total or (1 if is_ready else None),
                completed=worker["bytes_loaded"] if total else int(is_ready), loaded=_loaded(worker),
                doing=_doing(worker),
            )  # fmt: skip

    def close(self) -> None:
        self._bars.stop()


class LoadingLines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[str, str, float]] = {}  # id -> state, loaded, when

    def update(self, document: dict[str, Any]) -> None:
        now_s = time.monotonic()
        for worker in document["workers"]:
            state, loaded = _doing(worker), _loaded(worker)
            before = self._shown.get(worker["id"], ("", "", 0.0))
            is_due = loaded != before[1] and now_s - before[2] >= _LINE_EVERY_S
            if state != before[0] or is_due:
                self._shown[worker["id"]] = (state, loaded, now_s)
                line = f"{worker['id']}: {state}{', ' + loaded if loaded else ''}"
                self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is held."""


def _loaded(worker: dict[str, Any]) -> str:
    total = worker["bytes_total"]
    return f"{show_size(worker['bytes_loaded'])} of {show_size(total)}" if total else ""


def _doing(worker: dict[str, Any]) -> str:
    life = f" (life {worker['incarnation']})" if worker["incarnation"] > 1 else ""
    detail = f": {worker['detail']}" if worker["detail"] else ""
    return f"{worker['state']}{life}{detail}"
