"""Loading is shown: a line per change where no terminal is, a bar per worker where one is."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cluster.progress import LoadingBars, LoadingLines, loading_display

MIB = 1 << 20


def document(state: str, loaded: int = 0, detail: str = "", incarnation: int = 1) -> dict[str, Any]:
    worker = {
        "id": "expert-0", "state": state, "detail": detail, "incarnation": incarnation,
        "bytes_loaded": loaded, "bytes_total": 4 * MIB if loaded else 0,
    }  # fmt: skip
    return {"workers": [worker]}


def lines(*documents: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    display = loading_display(Console(file=out, width=200))
    assert isinstance(display, LoadingLines)
    for each in documents:
        display.update(each)
    display.close()
    return out.getvalue().splitlines()


def test_each_change_is_one_line_and_no_change_none() -> None:
    loading = document("loading", MIB, "loading experts")
    assert lines(document("starting"), document("starting"), loading, loading, document("ready", 4 * MIB)) == [
        "expert-0: starting",
        "expert-0: loading: loading experts, 1.0 MiB of 4.0 MiB",
        "expert-0: ready, 4.0 MiB of 4.0 MiB",
    ]


def test_further_life_is_told_with_the_reason_of_the_last() -> None:
    assert lines(document("starting", detail="again, after: silent for 5.1 s", incarnation=2)) == [
        "expert-0: starting (life 2): again, after: silent for 5.1 s"
    ]


def test_bars_show_bytes_of_the_total_on_a_terminal() -> None:
    out = io.StringIO()
    display = loading_display(Console(file=out, width=120, force_terminal=True))
    assert isinstance(display, LoadingBars)
    display.update(document("starting"))
    display.update(document("loading", MIB))
    display.close()
    assert "1.0 MiB of 4.0 MiB" in out.getvalue()
