"""Writes each scenario's story anew, beside it: `python -m tests.scenarios.write`. Then look at the difference."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from cluster.cli import main


def write() -> None:
    for path in sorted(Path(__file__).parent.glob("*.scenario")):
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            main(["simulate", "--scenario", str(path), "--trace"])
        path.with_suffix(".golden").write_text(told.getvalue())
        print(f"{path.stem}: {told.getvalue().splitlines()[-1]}")


if __name__ == "__main__":
    write()
