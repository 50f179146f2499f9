"""Explicit where Ray would otherwise decide by what it finds on the machine; and what tests have in common."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.synthetic import make_checkpoint
from tests.on_ray.served import Served


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # as `serve` has it on a Ray of its own
        patch.setenv("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:  # for Ray's sockets
            patch.setenv("RAY_TMPDIR", short)
            yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_ray") / "tiny"
    make_checkpoint("tiny", folder, seed=11)
    return folder


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One attention worker, two expert workers that both hold everything. Who shares it leaves it as it was, but
    `test_serve` kills its processes one after the other, and ends it."""
    with Served(tiny, "--replicas", "2", log=tmp_path_factory.mktemp("serve") / "log") as served:
        yield served


@pytest.fixture(scope="session")
def shared_ray(ray_environment: None) -> Iterator[list[str]]:
    """Flags by which a cluster joins one Ray of a single node: it is ready sooner than on a Ray of its own."""
    from ray.cluster_utils import Cluster

    ray = Cluster()
    ray.add_node(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
    yield ["--ray-address", ray.address]
    ray.shutdown()
