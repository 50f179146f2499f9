"""A real cluster for tests: `expertmesh serve` as a user starts it, on a free port, ended by SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from cluster.address import quiet_ports
from cluster.guardian import MARK

READY_WITHIN_S = 300.0
END_WITHIN_S = 120.0
ANNOUNCED = "Ctrl-C ends it."  # the last line that serve prints when it is ready


def ours_left(cluster_id: str) -> list[str]:
    """Abstract sockets named after a cluster."""
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if f"expertmesh-{cluster_id}" in line]


def folders() -> list[str]:
    """Ray's sockets and logs, of clusters that `serve` hosts in this test run."""
    return [name for name in os.listdir(os.environ["RAY_TMPDIR"]) if name.startswith("em-")]


@contextlib.contextmanager
def soaking() -> Iterator[Path]:
    """A folder for a soak and its Rays, which are told by the environment."""
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:  # short: Ray's sockets lie there
        os.environ |= {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder,
        }  # fmt: skip
        yield Path(folder)


class Served:
    """`with Served(checkpoint, "--expert-workers", "3") as cluster: cluster.post("/v1/completions", {...})`"""

    def __init__(self, model: Path, *flags: str | Path, log: Path) -> None:
        self.port, self.grpc_port = quiet_ports("127.0.0.1", 2)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        command = [
            sys.executable,
            "-m",
            "cluster.cli",
            "serve",
            "--model",
            str(model),
            "--port",
            str(self.port),
            "--grpc-port",
            str(self.grpc_port),
            *map(str, flags),
        ]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self.client = httpx.Client(base_url=self.url, timeout=300)

    def __enter__(self) -> Served:
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self) -> None:
        """As a user does: until serve has said so, and /ready does (again, after a gateway was lost)."""
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            try:
                self.process.wait(0.2)
                raise AssertionError(f"serve ended with {self.process.returncode}:\n{self._log.read_text()}")
            except subprocess.TimeoutExpired:
                if ANNOUNCED in self.log and self._is_ready():
                    return
        raise AssertionError(f"not ready within {READY_WITHIN_S} s:\n{self.log}")

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    @property
    def log(self) -> str:
        return self._log.read_text()

    def status(self) -> dict:
        return self.client.get("/v1/admin/status").raise_for_status().json()

    def post(self, path: str, body: dict) -> dict:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, prompt, **options) -> dict:
        """The one choice of a completion of token ids, with its ids."""
        body = {"prompt": list(prompt), "return_token_ids": True, **options}
        return self.post("/v1/completions", body)["choices"][0]

    def wait_for_status(self, is_wanted, within_s: float = 60.0) -> dict:
        """Poll until the status document is as wanted; heartbeats carry its gauges."""
        deadline = time.monotonic() + within_s
        while not is_wanted(status := self.status()):
            assert time.monotonic() < deadline, status
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        return status

    def folder(self) -> Path:
        """Ray's sockets and logs, if the cluster has a Ray of its own."""
        [gcs] = [p for p in psutil.Process(self.process.pid).children() if p.name() == "gcs_server"]
        return Path(gcs.environ()[MARK])

    def cluster_id(self) -> str:
        return re.search(r"expertmesh-([0-9a-f]+)-", self.status()["scheduler"]["address"]).group(1)
