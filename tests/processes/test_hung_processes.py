"""A process whose heart beats but whose loop or compute thread hangs is found out, killed and replaced."""

from __future__ import annotations

import multiprocessing
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from cluster.config import Config
from cluster.epochs import ModelShape
from cluster.member_link import fetch_status
from cluster.spec import CheckpointFacts, ClusterSpec
from model.checkpoint import Checkpoint
from model.synthetic import make_checkpoint
from router.placement import Member
from tests.processes import hung_process
from tests.unit.served_controller import WAIT_S, Cluster

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", hung_process.__name__])  # torch once, and not in each

QUICK = {
    "cluster": {"heartbeat_s": 0.1, "loop_stall_s": 0.5, "compute_stall_s": 0.5},
    "router": {"combine_timeout_s": 0.05, "combine_total_s": 0.4, "connect_timeout_s": 0.2, "replans_max": 1},
    "attention": {"kv_bytes": 1 << 20},
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ClusterSpec:
    path = tmp_path_factory.mktemp("hung") / "tiny"
    make_checkpoint("tiny", path, seed=1)
    checkpoint = Checkpoint.open(path)
    shape = checkpoint.config
    facts = CheckpointFacts(checkpoint.fingerprint, shape.num_layers, shape.num_experts, shape.vocab_size, 64)
    return ClusterSpec(secrets.token_hex(4), "token", Config.model_validate({"model": str(path), **QUICK}), facts)


@pytest.fixture
def cluster(spec: ClusterSpec) -> Iterator[Cluster]:
    shape = ModelShape(spec.facts.fingerprint, spec.facts.num_layers, spec.facts.num_experts)
    cluster = Cluster(spec.controller_address, shape)
    yield cluster
    cluster.close()


@contextmanager
def forked(target: Callable[..., None], *arguments: str) -> Iterator[Connection]:
    """A process of its own, and the pipe by which it is told to hang."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
        theirs.close()


def wait_until(cluster: Cluster, is_wanted: Callable[[dict], bool]) -> None:
    """Each answer takes a round trip; the test's own time limit bounds them all."""
    while not is_wanted(cluster.thread.call(fetch_status(cluster.address, "token", WAIT_S), WAIT_S)):
        continue


def test_a_scheduler_whose_loop_hangs_is_killed_with_the_reason(cluster: Cluster, spec: ClusterSpec) -> None:
    with forked(hung_process.scheduler, spec.to_json()) as pipe:
        wait_until(cluster, lambda status: status["scheduler"] and status["scheduler"]["state"] == "ready")
        pipe.send_bytes(b"hang")
        assert cluster.driver.killed.get(timeout=WAIT_S) == Member("scheduler", 1)
    assert cluster.driver.reasons[Member("scheduler", 1)].startswith("loop has not turned for ")


def test_an_attention_worker_whose_compute_thread_hangs_is_replaced(cluster: Cluster, spec: ClusterSpec) -> None:
    """Its heartbeats go on; the reason says which thread."""

    def are_ready(status: dict) -> bool:
        return {worker["state"] for worker in status["workers"]} == {"ready"}

    text = spec.to_json()
    with forked(hung_process.worker, text, "expert"), forked(hung_process.worker, text, "attention") as pipe:
        wait_until(cluster, are_ready)
        pipe.send_bytes(b"hang")
        assert cluster.driver.killed.get(timeout=WAIT_S) == Member("attention-0", 1)
        started = {cluster.driver.started.get(timeout=WAIT_S) for _ in range(3)}
    assert cluster.driver.reasons[Member("attention-0", 1)].startswith("compute has not turned for ")
    assert Member("attention-0", 2) in started
