"""The way of a step trace: from the attention worker over controller and gateway to `expertmesh trace`."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from attention_workers.microbatch_choice import StepKind
from attention_workers.step_trace import StepTrace
from attention_workers.trace_records import BYTES_MAX
from cluster.cli import main
from cluster.events import Role, SendTrace
from cluster.member_link import ControllerUnreachable, fetch_trace
from cluster.traces import BYTES_MAX as ALL_BYTES_MAX
from gateway.model_card import ModelCard
from router.dispatcher import Heard
from router.membership import Traced
from router.placement import Member
from router.transport.base import Spent
from tests.unit.gateway_world import card_of, serving, write_checkpoint
from tests.unit.served_controller import WAIT_S, Cluster
from tests.unit.test_member_link import Process

# --- controller ----------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[Process]:
    cluster.driver.started.get(timeout=WAIT_S)
    process = Process(cluster, Role.ATTENTION, Member("attention-0", 1))
    yield process
    process.link.close(WAIT_S)


def asked(cluster: Cluster, seconds: float = 2.0, timeout_s: float = WAIT_S) -> object:
    return cluster.thread.call(fetch_trace(cluster.address, "token", timeout_s, seconds), WAIT_S)


def test_a_worker_is_asked_over_its_stream_and_answers_over_it(cluster: Cluster, worker: Process) -> None:
    """While it answers, its heartbeats go on, and the question names how much is wanted."""

    def answer() -> None:
        order = worker.ordered(SendTrace)
        assert (order.seconds, order.bytes_max) == (2.0, ALL_BYTES_MAX)
        worker.link.report(Traced(order.number - 1, b"late: of an earlier question"))
        worker.link.report(Traced(order.number, b"trace"))

    while not cluster.server.status()["workers"][0]["pid"]:
        threading.Event().wait(0.005)
    answering = threading.Thread(target=answer)
    answering.start()
    reply = asked(cluster)
    answering.join()
    assert (list(reply.traces), list(reply.silent)) == ([b"trace"], [])


def test_who_does_not_answer_in_time_is_named(cluster: Cluster, worker: Process) -> None:
    while not cluster.server.status()["workers"][0]["pid"]:
        threading.Event().wait(0.005)
    reply = asked(cluster, timeout_s=0.4)
    assert (list(reply.traces), list(reply.silent)) == ([], ["attention-0"])
    assert worker.ordered(SendTrace).number == 1


def test_without_workers_there_is_nothing_to_wait_for(cluster: Cluster) -> None:
    assert not asked(cluster).traces


@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, float("nan")])
def test_the_controller_refuses_what_is_out_of_bounds(cluster: Cluster, seconds: float) -> None:
    with pytest.raises(ControllerUnreachable) as refused:
        asked(cluster, seconds)
    cause = refused.value.__cause__
    assert isinstance(cause, grpc.RpcError)
    assert cause.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "seconds: " in cause.details()


# --- gateway -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


async def test_the_gateway_passes_traces_on_and_refuses_by_field(card: ModelCard) -> None:
    async with serving(card) as (_, _, url), httpx.AsyncClient(base_url=url) as client:
        document = (await client.get("/v1/admin/trace?seconds=2.5")).json()
        assert base64.b64decode(document["traces"][0]) == b"2.5 s"
        assert document["silent"] == ["attention-1"]
        for query, name in (
            ("seconds=x", "seconds"),
            ("seconds=0", "seconds"),
            ("seconds=61", "seconds"),
            ("seconds=nan", "seconds"),
            ("second=5", "second"),
        ):
            refused = await client.get(f"/v1/admin/trace?{query}")
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name
            assert "accepted" in refused.json()["error"]["message"]


# --- command -------------------------------------------------------------------------------------


class Said:
    waited_ns = 2_000_000
    heard = (Heard(Member("expert-0", 1), 0, 10_000_000, Spent(1_000_000, 3_000_000)),)


def encoded_trace() -> bytes:
    trace = StepTrace(Said())
    trace.begin(StepKind("decode", 8), 8, 8)
    trace.dispatched(0, time.perf_counter_ns(), time.perf_counter_ns())
    trace.combined(0, 0, time.perf_counter_ns() - 3_000_000)
    trace.end(1)
    choice = {
        "kind": "decode", "rows_max": 8, "microbatches": 1, "steps": 9, "step_ms": 1.5, "trials": 1, "switches": 0,
        "predicted": {"1": 1.0, "2": 0.9}, "measured": {"2": 1.25}, "costs_us": {},
    }  # fmt: skip
    return trace.snapshot("attention-0", (choice,)).since(0, BYTES_MAX).encode()


@pytest.fixture
def url() -> Iterator[str]:
    document = json.dumps({"traces": [base64.b64encode(encoded_trace()).decode()], "silent": ["attention-7"]})

    class Gateway(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path.startswith("/v1/admin/trace?seconds=")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(document.encode())

        def log_message(self, *_: object) -> None:
            """Tests are quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_command_summarises_and_writes_what_perfetto_reads(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.json"
    assert main(["trace", "--url", url, "--seconds", "0.01", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    (summary,) = document["workers"]
    assert document["silent"] == ["attention-7"]
    assert summary["stragglers"]["expert-0#1"]["last"] == 1
    assert summary["phases_us"]["experts"]["p50"] == 3000
    assert summary["microbatches"][0]["microbatches"] == 1
    events = json.loads(out.read_text())["traceEvents"]
    assert {"step", "attention", "dispatch", "wait", "merge", "exchange", "experts"} <= {
        e.get("cat") for e in events
    }
    assert f"{len(events)} events in {out}" in printed.err


def test_the_command_tells_people_where_time_went(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["trace", "--url", url, "--seconds", "0.01"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "attention-0: 1 steps", "waiting", "expert-0#1", "attention-7: did not answer",
        "decode steps of up to 8 rows: 1 microbatch(es), 1.50 ms; others to it 2: 1.25 measured; 1 trials",
    ):  # fmt: skip
        assert words in shown


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--seconds", "0"], "--seconds: '0'; accepted: a number above 0, at most 60"),
        (["--seconds", "61"], "--seconds: '61'"),
        (["--seconds", "nan"], "--seconds: 'nan'"),
        (["--seconds", "soon"], "--seconds: 'soon'"),
        (["--out", "/nowhere/at/all.json"], "--out: '/nowhere/at/all.json'; accepted: a file in a folder"),
        (["--out", "/"], "--out: '/'"),
    ],
)
def test_the_command_refuses_by_field(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it waits for anything."""
    assert main(["trace", "--url", "http://127.0.0.1:9", *flags]) == 2
    assert complaint in capsys.readouterr().err
