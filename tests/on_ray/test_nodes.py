"""Pools that span nodes: a second raylet, the exchange forced to gRPC, and not one bit of an answer changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

PROMPT = [5 * i % 380 + 20 for i in range(60)]


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """Address of a Ray of two nodes, each with room for one worker of either pool."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(
            num_cpus=1, object_store_memory=80 << 20, include_dashboard=False,
            resources={"expertmesh_attention": 1, "expertmesh_expert": 1},
        )  # fmt: skip
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def answers(cluster: Served) -> list[Any]:
    """Of several requests, so that every attention worker has some: ids and logprobs."""
    options = {"max_tokens": 24, "temperature": 1.0, "top_k": 50, "logprobs": 3, "ignore_eos": True}
    choices = [cluster.complete(PROMPT[: 20 + 5 * seed], seed=seed, **options) for seed in range(4)]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def links(status: dict[str, Any]) -> list[dict[str, str]]:
    """Of each attention worker: which transport serves which expert worker."""
    return [worker["links"] for worker in status["workers"] if worker["role"] == "attention"]


def test_pools_span_two_nodes_and_nobody_can_tell(
    tiny: Path, server: Served, two_nodes: str, tmp_path: Path
) -> None:
    """Workers of both pools on both nodes, deciders and gateway met over TCP, links over gRPC alone."""
    expected = answers(server)
    server.wait_for_status(lambda status: links(status) == [{"expert-0": "shm", "expert-1": "shm"}])
    flags = ["--attention-workers", "2", "--expert-workers", "2", "--ray-address", two_nodes]
    with Served(tiny, *flags, "--transport", "grpc", log=tmp_path / "log") as cluster:
        assert answers(cluster) == expected
        over_grpc = [{"expert-0": "grpc", "expert-1": "grpc"}] * 2
        status = cluster.wait_for_status(lambda status: links(status) == over_grpc)
        for role in ("attention", "expert"):
            workers = [worker for worker in status["workers"] if worker["role"] == role]
            raylets = {psutil.Process(worker["pid"]).ppid() for worker in workers}
            assert len(raylets) == 2, role
        assert "unix" not in status["controller"]["address"] + status["scheduler"]["address"]
