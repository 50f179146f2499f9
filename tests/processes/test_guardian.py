"""The guardian: whatever ends `serve`, what it started ends too, and its folder is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

WITHIN_S = 20.0

# As `serve`: guarded, with a child that starts a grandchild in another session. Says their pids, and waits.
GUARDED = """
import subprocess, sys
from cluster.guardian import Guardian
guardian = Guardian(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
sys.stdin.readline()
guardian.close()
"""
CHILD = """
import subprocess
grandchild = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(grandchild.pid, flush=True)
grandchild.wait()
"""


def started(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    serve = subprocess.Popen(
        [sys.executable, "-c", GUARDED, str(folder), CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return serve, [psutil.Process(int(pid)) for pid in serve.stdout.readline().split()]


def guardians(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or ())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "em-test" / "logs").mkdir(parents=True)
    return tmp_path / "em-test"


def test_kill_9_leaves_no_process_and_no_folder(folder: Path) -> None:
    serve, family = started(folder)
    [guardian] = [p for p in guardians(folder) if p.pid != serve.pid]
    family[0].suspend()  # would not hear a gentler word
    serve.kill()
    serve.communicate()
    _, alive = psutil.wait_procs([*family, guardian], WITHIN_S)
    assert not alive
    assert not folder.exists()


def test_of_ray_processes_that_lost_the_mark_those_that_write_to_the_folder_end(folder: Path) -> None:
    """A title may lie over the environment. Whoever only reads there, and another Ray, stay."""
    with (
        (folder / "logs" / "agent.log").open("w") as log,
        (folder.parent / "elsewhere.log").open("w") as elsewhere,
    ):
        sleep = {"executable": "/bin/sleep", "env": {}}
        agent = subprocess.Popen(["ray::Agent", "600"], stdout=log, **sleep)
        others = [
            subprocess.Popen(["ray::Agent", "600"], stdout=elsewhere, **sleep),
            subprocess.Popen(["tail", "600"], stdin=log, **sleep),
        ]
    serve, _ = started(folder)
    serve.kill()
    serve.communicate()
    assert agent.wait(WITHIN_S) == -signal.SIGKILL
    while guardians(folder):
        continue
    assert [other.poll() for other in others] == [None, None]
    for other in others:
        other.kill()
        other.wait()


def test_an_orderly_end_waits_for_it_and_leaves_nothing_either(folder: Path) -> None:
    serve, family = started(folder)
    serve.communicate("end\n", WITHIN_S)
    assert serve.returncode == 0
    assert not folder.exists()
    _, alive = psutil.wait_procs(family, WITHIN_S)
    assert not alive
    assert not guardians(folder)


def test_ctrl_c_in_the_terminal_does_not_reach_it(folder: Path) -> None:
    """It is in a session of its own: `serve` may take its time to drain."""
    serve, family = started(folder)
    [guardian] = [p for p in guardians(folder) if p.pid != serve.pid]
    assert os.getsid(guardian.pid) not in (os.getsid(0), os.getsid(serve.pid))
    guardian.send_signal(signal.SIGTERM)
    assert guardian.is_running()
    serve.communicate("end\n", WITHIN_S)
    psutil.wait_procs([*family, guardian], WITHIN_S)
    assert not folder.exists()
