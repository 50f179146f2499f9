"""Whether another process has ended is seen whoever waits for it; and who starts goes behind those who serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.processes import BEHIND, has_ended, import_behind


def test_a_killed_process_has_ended_whether_or_not_anyone_has_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    with child.stdin:
        seen = psutil.Process(child.pid)
        assert not has_ended(seen)
        child.kill()
        while not has_ended(seen):  # nobody waits: it is a zombie from now on
            continue
        assert child.wait() == -9
        assert has_ended(seen)


def test_imports_go_behind_and_who_asked_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Niceness is a thread's own: the one that will compute keeps what it had."""
    (tmp_path / "imported_behind.py").write_text("import os\nNICENESS = os.nice(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = os.nice(0)
    import_behind("imported_behind")
    assert min(before + BEHIND, 19) == sys.modules.pop("imported_behind").NICENESS
    assert os.nice(0) == before
