"""Explicit where Ray would otherwise decide by what it finds on the machine; and a tiny checkpoint."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.synthetic import make_checkpoint


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:  # for Ray's sockets
            patch.setenv("RAY_TMPDIR", short)
            yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_ray") / "tiny"
    make_checkpoint("tiny", folder, seed=11)
    return folder
