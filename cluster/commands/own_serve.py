"""A server of one's own for a benchmark: `expertmesh serve` on free ports, gone when it is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.errors import BenchmarkError
from cluster.address import quiet_ports

_READY_S = 300.0
_END_S = 60.0
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def own_serve(settings: Mapping[str, object], flags: Sequence[str], tell: Callable[[str], None]) -> Iterator[str]:
    """Its URL once it is ready; `settings` go over the defaults, `flags` over those.

    Raises BenchmarkError with its last words where it does not become ready.
    """
    port, grpc_port = quiet_ports("127.0.0.1", 2)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as folder:
        config, log = Path(folder, "config.yaml"), Path(folder, "log")
        config.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
        command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(config), *flags]
        ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
        libc = ctypes.CDLL(None)  # found here: nothing is looked up between fork and exec
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, *ports], stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip
        try:
            tell("starting a server")
            _wait_until_ready(process, url, log)
            yield url
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _READY_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_LOOK_S)
            raise BenchmarkError(f"serve ended with {code}: {_last_words(log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=_LOOK_S * 10):
            return
    raise BenchmarkError(f"serve was not ready within {_READY_S:g} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").splitlines()[-5:])


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
