"""What the benchmarks' commands share: how they read values, and how they show results."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console

from cluster.config import ConfigError

T = TypeVar("T")


def counts(flag: str, text: str, least: int, most_each: int, most: int = 32) -> list[int]:
    """Comma-separated whole numbers, at most `most` of them. Raises ConfigError."""
    values = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not least <= int(part) <= most_each:
            raise ConfigError(f"{flag}: {part!r}; accepted: whole numbers from {least} to {most_each}")
        values.append(int(part))
    refuse_many(flag, values, most)
    return values


def chosen(flag: str, text: str, accepted: Sequence[str], most: int = 32) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in accepted:
            raise ConfigError(f"{flag}: {name!r}; accepted: {', '.join(accepted)}")
    refuse_many(flag, names, most)
    return names


def refuse_many(flag: str, values: Sequence[T], most: int = 32) -> None:
    """Raises ConfigError."""
    if len(values) > most or len(set(values)) < len(values):
        raise ConfigError(f"{flag}: {len(values)} values; accepted: at most {most}, none twice")


def teller() -> Callable[[str], None]:
    """A line of progress on standard error, with the seconds since it was made."""
    began_s = time.monotonic()
    return lambda text: print(f"{time.monotonic() - began_s:6.1f} s  {text}", file=sys.stderr, flush=True)


def console() -> Console:
    """Lines of a file are not broken."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def failed(benchmark: str, error: Exception) -> int:
    print(f"expertmesh bench {benchmark}: {error}", file=sys.stderr)
    return 1


def print_json(benchmark: str, **result: Any) -> None:
    from benchmarks import machine

    print(json.dumps({"benchmark": benchmark, "command": _command(), "machine": machine.describe(), **result}))


def show_machine(console: Console) -> None:
    from benchmarks import machine

    found = machine.describe()
    load = " ".join(map(str, found["load_average"]))
    console.print(f"$ {_command()}", highlight=False)
    console.print(
        f"{found['date']}, {found['cpu']}, {found['cores']} cores ({' '.join(found['flags'])}), "
        f"torch {found['torch']}, load average {load}",
        highlight=False,
    )


def _command() -> str:
    return shlex.join(["expertmesh", *sys.argv[1:]])
