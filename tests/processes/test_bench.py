"""`expertmesh bench` with its real processes, on models and counts too small to mean anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    assert main(["make-checkpoint", "--preset", "tiny", "--out", str(folder)]) == 0
    return folder


# As in a terminal: a shell that runs these tests in its background has told its children to ignore Ctrl-C. Said in
# the child: a fork that runs Python would wake gRPC's threads of this process in it, and close their descriptors.
HEEDING_INTERRUPTS = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("cluster.cli", run_name="__main__", alter_sys=True)
"""


def start(*argv: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "proto")))
    return subprocess.Popen(
        [sys.executable, "-c", HEEDING_INTERRUPTS, "bench", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip


def document(child: subprocess.Popen[str]) -> dict:
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return json.loads(out)


def test_decode_runs_every_way_and_compares_their_tokens(tiny: Path) -> None:
    """One process, and processes of their own over both links, up to two of a kind: all the same tokens. More
    prompts than one step computes."""
    few = "--batches 12 --microbatches 1 --threads 1 --topologies 1x1,2x2 --context 8 --steps 2 --rounds 2"
    child = start("decode", "--model", str(tiny), *few.split(), "--json")
    found = document(child)
    ways = {(lane["transport"], (lane["topology"] or {}).get("attention")) for lane in found["lanes"]}
    assert ways == {("local", None), ("shm", 1), ("grpc", 1), ("shm", 2), ("grpc", 2)}
    assert all(lane["tokens_per_s"]["count"] == 2 and lane["tokens_per_s"]["min"] > 0 for lane in found["lanes"])
    assert {c["what"] for c in found["comparisons"]} == {
        "shm over one process, exact",
        "grpc over one process, exact",
    }
    assert found["exact_tokens_equal"] >= 4 * 12 * (2 + 2 * 2)  # ways but the first, sequences, warm and measured
    assert found["machine"]["cores"] >= 1


def test_transport_checks_what_it_carries_and_compares_with_memcpy() -> None:
    found = document(start("transport", "--kinds", "shm", "--rows", "3", "--round-trips", "20", "--json"))
    [crossing], [large] = found["crossings"], found["bandwidths"]
    assert crossing["shape"] == {"rows": 3, "hidden": 768, "dtype": "bfloat16"}
    assert 0 < crossing["round_trip_us"]["p50"] <= crossing["round_trip_us"]["p99"]
    assert large["of_memcpy"] == pytest.approx(large["one_way"]["p50"] / large["memcpy"]["p50"])


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_benchmark_that_was_ended(end: signal.Signals, tiny: Path) -> None:
    """Ctrl-C, and even a death that lets it do nothing."""
    few = "--topologies 1x1 --threads 1 --microbatches 1 --context 8 --rounds 800 --steps 1"
    child = start("decode", "--model", str(tiny), *few.split())
    assert child.stderr is not None
    while "round 1 " not in child.stderr.readline():
        assert child.poll() is None
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 3
    child.send_signal(end)
    child.communicate(timeout=20)
    assert child.returncode == (130 if end == signal.SIGINT else -end)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
