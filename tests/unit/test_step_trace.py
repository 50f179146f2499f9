"""Promises of the step trace: what it says adds up, it is bounded, names who was waited for, Perfetto reads it."""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_workers.microbatch_choice import StepKind
from attention_workers.step_trace import EXCHANGES_MAX, PEERS_MAX, StepTrace
from attention_workers.trace_events import write_events
from attention_workers.trace_records import BYTES_MAX, Snapshot, TraceMalformed, decode
from attention_workers.trace_summary import summarise
from model.checkpoint import Checkpoint
from model.synthetic import make_checkpoint
from router.dispatcher import Heard
from router.placement import Member
from router.transport.base import Spent
from tests.equivalence.local_cluster import LocalCluster, request

FAST, SLOW = Member("expert-0", 1), Member("expert-1", 1)


@dataclass
class Combined:
    """A combine as a dispatcher tells of it."""

    waited_ns: int = 0
    heard: list[Heard] = field(default_factory=list)


def step(trace: StepTrace, said: Combined, layers: int = 2) -> None:
    trace.begin(StepKind("decode", 8), 5, 5)
    for layer in range(layers):
        began_ns = time.perf_counter_ns()
        trace.dispatched(0, began_ns, time.perf_counter_ns())
        trace.combined(layer, 0, time.perf_counter_ns())
    trace.end(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, int]:
    """Of a real worker with two expert workers and two microbatches; and the number of its layers."""
    path: Path = tmp_path_factory.mktemp("trace") / "tiny"
    make_checkpoint("tiny", path, seed=1)
    checkpoint = Checkpoint.open(path)
    with LocalCluster(checkpoint, experts=2, microbatches=2, transport="auto") as cluster:
        cluster.run([request(f"r{i}", range(1, 4 + i), max_tokens=6, arrival=i) for i in range(3)])
        return cluster.workers[0].snapshot("attention-0"), checkpoint.config.num_layers


def test_every_layer_of_every_microbatch_is_there_once(run: tuple[Snapshot, int]) -> None:
    snapshot, layers = run
    wanted = [
        (step["number"], layer, mb)
        for step in snapshot.steps
        for mb in range(step["microbatches"])
        for layer in range(layers)
    ]
    found = [(e["step"], e["layer"], e["microbatch"]) for e in snapshot.exchanges]
    assert sorted(found) == sorted(wanted)
    assert len(snapshot.steps) >= 6
    assert set(snapshot.peers) == {"e0#1", "e1#1"}
    assert {s["is_prefill"] for s in snapshot.steps} == {0, 1}


def test_phases_add_up_to_the_step(run: tuple[Snapshot, int]) -> None:
    """Nothing is counted twice, and what is not in a phase is small change."""
    snapshot, _ = run
    for each in snapshot.steps:
        own = snapshot.exchanges[snapshot.exchanges["step"] == each["number"]]
        parts = sum(int(own[name].sum()) for name in ("attend_ns", "dispatch_ns", "wait_ns", "merge_ns"))
        assert parts <= each["ended_ns"] - each["began_ns"]
        assert (own["experts_ns"] <= own["wait_ns"]).all()
        assert (own["experts_ns"] >= 0).all()
    summary = summarise(snapshot)
    assert sum(summary["phases_us"][name]["share"] for name in ("attention", "dispatch", "waiting", "merge")) > 0.5
    assert 0 <= summary["exchange_share"] <= summary["exposed_wait_share"] < 1


def test_expert_workers_say_what_they_spent(run: tuple[Snapshot, int]) -> None:
    snapshot, _ = run
    replies = snapshot.replies
    assert (replies["computed_ns"] > 0).all()
    assert (replies["queued_ns"] + replies["computed_ns"] <= replies["heard_ns"] - replies["sent_ns"]).all()


def test_perfetto_reads_it(run: tuple[Snapshot, int]) -> None:
    """Structure of Chrome trace events: complete slices, that nest on every thread, of named threads."""
    snapshot, _ = run
    out = io.StringIO()
    count = write_events([snapshot, replace(snapshot, worker="attention-1")], out)
    events = json.loads(out.getvalue())["traceEvents"]
    assert len(events) == count
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "XM"
        assert isinstance(event["name"], str)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert named == threads.keys()
    for slices in threads.values():
        open_until: list[float] = []
        for began, ended in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= began + 1e-3:
                open_until.pop()
            assert not open_until or ended <= open_until[-1] + 1e-3, "slices of one thread cross"
            open_until.append(ended)
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["attention-0", "attention-1"]
    assert sum(e.get("cat") == "merge" and e["pid"] == 1 for e in events) == len(snapshot.exchanges)


def test_who_was_last_is_named_with_how_long_it_alone_was_waited_for() -> None:
    said = Combined()
    trace = StepTrace(said)
    trace.begin(StepKind("decode", 8), 5, 5)
    trace.dispatched(0, time.perf_counter_ns(), time.perf_counter_ns())
    from_ns = time.perf_counter_ns()
    said.waited_ns = 0
    said.heard = [
        Heard(SLOW, from_ns - 9_000_000, from_ns + 900_000, Spent(1_000_000, 5_000_000)),
        Heard(FAST, from_ns - 9_000_000, from_ns + 200_000, Spent(0, 1_000_000)),
    ]
    trace.combined(0, 0, from_ns)
    trace.end(1)
    told = summarise(trace.snapshot("attention-0"))["stragglers"]
    assert (told["expert-1#1"]["last"], told["expert-0#1"]["last"]) == (1, 0)
    assert told["expert-1#1"]["alone_us"]["p50"] == pytest.approx(700)
    assert told["expert-1#1"]["experts_us"]["p50"] == pytest.approx(5000)


@pytest.mark.parametrize(
    ("wait_us", "experts_us"), [(100, 0), (1500, 500), (6000, 5000), (7000, 6000), (8000, 6000)]
)
def test_a_wait_is_the_tail_of_the_last_flight(wait_us: int, experts_us: int) -> None:
    """8 ms in flight, 6 of them at the worker: the last one it came back, the six before were the worker's."""
    said = Combined()
    trace = StepTrace(said)
    trace.begin(StepKind("decode", 8), 5, 5)
    trace.dispatched(0, time.perf_counter_ns(), time.perf_counter_ns())
    from_ns = time.perf_counter_ns() - wait_us * 1000
    heard_ns = from_ns + wait_us * 1000
    said.waited_ns = wait_us * 1000
    said.heard = [Heard(SLOW, heard_ns - 8_000_000, heard_ns, Spent(2_000_000, 4_000_000))]
    trace.combined(0, 0, from_ns)
    trace.end(1)
    assert trace.snapshot("a").exchanges["experts_ns"].tolist() == [experts_us * 1000]


def test_it_is_bounded_and_holds_whole_steps_only() -> None:
    said = Combined(0, [Heard(FAST, 0, 1, Spent(0, 1))] * 3)
    trace = StepTrace(said)
    layers = 100
    for _ in range(EXCHANGES_MAX // layers + 50):
        step(trace, said, layers)
    snapshot = trace.snapshot("a")
    assert snapshot.has_forgotten
    assert len(snapshot.exchanges) == layers * len(snapshot.steps) <= EXCHANGES_MAX
    assert len(snapshot.replies) == 3 * len(snapshot.exchanges)
    assert snapshot.steps["number"].tolist() == sorted(snapshot.steps["number"])
    whole = sum(part.nbytes for part in (snapshot.steps, snapshot.exchanges, snapshot.replies))
    assert whole <= BYTES_MAX
    newest = snapshot.since(0, whole // 10)
    assert newest.has_forgotten
    assert 0 < len(newest.steps) <= len(snapshot.steps) // 10
    assert newest.steps["number"][-1] == snapshot.steps["number"][-1]
    assert len(newest.exchanges) == layers * len(newest.steps)


def test_a_step_that_was_given_up_leaves_nothing() -> None:
    said = Combined()
    trace = StepTrace(said)
    step(trace, said)
    trace.begin(StepKind("decode", 8), 5, 5)
    trace.dispatched(0, 1, 2)
    trace.combined(0, 0, time.perf_counter_ns())
    trace.begin(StepKind("decode", 8), 5, 5)
    assert len(trace.snapshot("a").exchanges) == 2
    assert summarise(StepTrace(said).snapshot("a"))["exposed_wait_share"] is None


def test_lives_of_expert_workers_are_bounded_too() -> None:
    said = Combined()
    trace = StepTrace(said)
    for life in range(PEERS_MAX + 100):
        said.heard = [Heard(Member("e", life), 0, 1, Spent())]
        step(trace, said, 1)
    assert len(trace.snapshot("a").peers) == PEERS_MAX


def test_it_survives_the_wire(run: tuple[Snapshot, int]) -> None:
    snapshot, _ = run
    snapshot = snapshot.since(int(snapshot.steps["began_ns"][2]))
    assert not snapshot.has_forgotten
    again = decode(snapshot.encode())
    for name in ("steps", "exchanges", "replies"):
        assert np.array_equal(getattr(again, name), getattr(snapshot, name))
    assert replace(again, steps=snapshot.steps, exchanges=snapshot.exchanges, replies=snapshot.replies) == snapshot


def test_what_is_no_trace_is_refused() -> None:
    good = StepTrace(Combined()).snapshot("a").encode()
    for bad in (b"", b"x" * 40, good[:-5], good + b"", good[: len(good) // 2]):
        if bad == good:
            continue
        with pytest.raises(TraceMalformed, match="trace: "):
            decode(bad)


def test_reading_while_it_is_written_finds_whole_records() -> None:
    """The copy is one call: a reader never sees half a record."""
    said: Any = Combined(0, [Heard(FAST, 7, 7, Spent(7, 7))])
    trace = StepTrace(said)
    for _ in range(50):
        step(trace, said, 3)
        replies = trace.snapshot("a").replies
        assert (replies["sent_ns"] == 7).all()
        assert (replies["computed_ns"] == 7).all()
