"""Whether another process has ended is seen whoever waits for it."""

from __future__ import annotations

import subprocess
import sys

import psutil

from cluster.processes import has_ended


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
