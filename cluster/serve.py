"""`expertmesh serve`, from configuration to exit code: check, launch, show, wait, drain, leave nothing behind.

Exit codes: 0 ended in order · 1 it could not start, or has failed · 2 something to correct before starting ·
130 ended at once: told to before it was ready, or told twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cluster.config import Config
from cluster.guardian import Guardian
from cluster.member_link import ControllerUnreachable, fetch_status
from cluster.preflight import PreflightError, check
from cluster.progress import LoadingDisplay, loading_display
from cluster.spec import ClusterSpec

if TYPE_CHECKING:
    from cluster.ray_driver import RayHost

_LOOK_S = 0.25
_WATCH_S = 1.0
_STATUS_TIMEOUT_S = 5.0
_STOP_MARGIN_S = 20.0
_REJOIN_S = 5.0
"""After so long a controller that has begun anew has heard from every gateway that lives."""


class StartFailed(Exception):
    """Why the cluster did not become ready, in the words of what failed."""


class Stop:
    """Ctrl-C and SIGTERM: the first asks for an orderly end, the second hurries it."""

    def __init__(self) -> None:
        self.is_asked = False
        self._asking, self._ask = os.pipe()

    def install(self) -> None:
        """Again after Ray has installed its own."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._asked)

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        os.write(self._ask, b".")

    def wait(self, most_s: float) -> None:
        """Until asked to stop, or for so long."""
        select.select([self._asking], [], [], most_s)


def serve(config: Config) -> int:
    """Blocks until the cluster has ended, and then ends this process. Returns 2: something is to be corrected."""
    console, stop, began_s = Console(), Stop(), time.monotonic()
    stop.install()
    try:
        fitted, facts = check(config)
    except PreflightError as error:
        print(f"expertmesh serve: {error}", file=sys.stderr)
        return 2
    spec = ClusterSpec(secrets.token_hex(4), secrets.token_urlsafe(24), fitted, facts)
    code = 0
    try:
        with _ray(spec, stop, console) as (spec, host, launching), asyncio.Runner() as runner:
            cluster = _Cluster(spec, host, stop, console, runner)
            if not cluster.come_up(launching, began_s):
                raise KeyboardInterrupt  # nothing runs yet that could be finished
            cluster.watch()
            cluster.drain()
    except StartFailed as error:
        code = 1
        print(f"expertmesh serve: {error}", file=sys.stderr)
    except (KeyboardInterrupt, SystemExit):
        code = 130
        print("expertmesh serve: ended at once", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without Ray's own exit, which would wait for processes that have been killed


@contextmanager
def _ray(spec: ClusterSpec, stop: Stop, console: Console) -> Iterator[tuple[ClusterSpec, RayHost, Future[None]]]:
    """Ray, with the cluster being launched on it as the spec then says; whatever happens, nothing of it is left
    afterwards."""
    _prepare_environment(spec.config)
    # After the environment: Ray reads it when it is imported.
    from cluster import actors
    from cluster.ray_driver import ClusterExists, LaunchFailed, RayHost, TooFewGpus, end_children

    # Short, and not TMPDIR, which may be long: Unix socket paths may have 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="em-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    guardian = Guardian(temp_dir)
    joined = spec.config.cluster.ray_address
    host: RayHost | None = None
    try:
        console.print(f"joining Ray at {joined}" if joined else "starting Ray", highlight=False)
        host = RayHost(spec.config, temp_dir)
        stop.install()
        console.print("starting controller, scheduler, workers, gateway", highlight=False)
        spec = host.placed(spec)
        yield spec, host, host.launch(spec, actors.ControllerActor, actors.SchedulerActor, actors.GatewayReplica)
    except (ClusterExists, TooFewGpus, LaunchFailed, ConnectionError) as error:
        raise StartFailed(str(error)) from error
    finally:
        try:
            if host is not None:
                host.close()
        finally:
            end_children()
            guardian.close()  # removes the folder


def _prepare_environment(config: Config) -> None:
    """RAY_AUTH_MODE is always explicit when we start Ray: its silent default breaks job submission."""
    if config.cluster.ray_address is None:
        os.environ.setdefault("RAY_AUTH_MODE", config.cluster.ray_auth)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 is for batch jobs: anything else would go before us
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")  # `watch` says it in a line
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which actors find imported


@dataclass(frozen=True)
class Told:
    """Failures that have been shown: up to this number of this controller's term."""

    term: int
    number: int

    @classmethod
    def by(cls, document: dict[str, Any] | None) -> Told:
        if document is None:
            return cls(0, 0)
        return cls(document["term"], max((failure["number"] for failure in document["failures"]), default=0))

    def news(self, document: dict[str, Any]) -> list[str]:
        """A line for each failure since then. Another term counts anew."""
        shown = self.number if document["term"] == self.term else 0
        failures = [failure for failure in document["failures"] if failure["number"] > shown]
        missed = failures[0]["number"] - shown - 1 if failures else 0
        lines = [f"{missed} more were lost meanwhile"] if missed else []
        return lines + [f"{f['id']}#{f['incarnation']} is lost: {f['reason']}" for f in failures]


@dataclass
class _Cluster:
    _spec: ClusterSpec
    _host: RayHost
    _stop: Stop
    _console: Console
    _runner: asyncio.Runner

    def come_up(self, launching: Future[None], began_s: float) -> bool:
        """Show loading until ready (True) or asked to stop. Raises StartFailed with the worker's own reason."""
        display = loading_display(self._console)
        try:
            while not self._is_up(display) or not launching.done():
                if launching.done():
                    launching.result()
                if self._stop.is_asked:
                    return False
                self._stop.wait(_LOOK_S)
        finally:
            display.close()
        self._announce(time.monotonic() - began_s)
        return True

    def _is_up(self, display: LoadingDisplay) -> bool:
        document = self._status()
        if document is None:
            return False
        display.update(document)
        _raise_if_failed(document)
        ready = [gateway for gateway in document["gateways"] if gateway["state"] == "ready"]
        return bool(document["phase"] == "ready") and len(ready) >= self._spec.config.pools.gateways

    def watch(self) -> None:
        """Until asked to stop: say what is lost and what phase follows. Raises StartFailed if all is lost."""
        told, phase, heard_s = Told.by(self._status()), "ready", time.monotonic()
        while not self._stop.is_asked:
            self._stop.wait(_WATCH_S)
            if ended := self._host.ended():
                raise StartFailed(f"Ray's {' and '.join(ended)} ended, and the cluster with it")
            document = self._status()
            if document is None:
                if time.monotonic() - heard_s > self._spec.config.cluster.startup_timeout_s:
                    raise StartFailed("the controller has not answered for too long")
                continue
            heard_s = time.monotonic()
            for line in told.news(document):
                self._say(line)
            told = Told.by(document)
            if document["phase"] != phase:
                phase = document["phase"]
                self._say(f"the cluster is {phase}")

    def drain(self) -> None:
        """Running requests are finished, then everything exits by itself; what does not is ended by Ray."""
        running = (self._status() or {}).get("gateways")
        open_now = sum(int(gateway["gauges"].get("sequences_open", 0)) for gateway in running) if running else "?"
        self._say(f"draining, {open_now} sequences open; Ctrl-C again ends at once")
        deadline_s = time.monotonic() + self._spec.config.cluster.drain_timeout_s + _STOP_MARGIN_S
        while time.monotonic() < deadline_s:
            document = self._status()
            if document is not None and document["phase"] == "stopped":
                break
            if document is not None and must_tell_to_drain(document):
                with contextlib.suppress(ControllerUnreachable):  # it is told again, or its next life is
                    self._host.drain()
            time.sleep(_LOOK_S)
        self._say("ended")

    def _status(self) -> dict[str, Any] | None:
        spec = self._spec
        try:
            return self._runner.run(fetch_status(spec.controller_address, spec.token, _STATUS_TIMEOUT_S))
        except ControllerUnreachable:
            return None  # it is being restarted; what runs goes on without it

    def _announce(self, took_s: float) -> None:
        config, url = self._spec.config, self._spec.config.url
        attention, experts = config.pools.attention_workers, config.pools.expert_workers
        needs_key = config.gateway.api_key or config.gateway.keys
        key = " -H 'Authorization: Bearer '$EXPERTMESH_API_KEY" if needs_key else ""
        has_text = (config.model_path / "tokenizer.json").is_file()
        prompt = '"Hello"' if has_text else "[1, 2, 3]"
        grpc_url = f" and gRPC on {config.host}:{config.grpc_port}" if config.grpc_port else ""
        gateways = config.pools.gateways
        others = f"\n  {gateways} gateways, each on the next ports" if gateways > 1 else ""
        self._say(
            f"ready after {took_s:.1f} s: {config.model_name} on {url}{grpc_url}, "
            f"{attention} attention and {experts} expert workers, transport {config.transport}{others}\n"
            f"  curl {url}/v1/completions -H 'Content-Type: application/json'{key} \\\n"
            f'    -d \'{{"model": "{config.model_name}", "prompt": {prompt}, "max_tokens": 16}}\'\n'
            f"  expertmesh status --url {url}"
        )
        if self._host.dashboard_url:
            mode = os.environ.get("RAY_AUTH_MODE", "its own choice")
            self._say(f"  Ray's dashboard and jobs: http://{self._host.dashboard_url} (RAY_AUTH_MODE={mode})")
        self._say("Ctrl-C ends it.")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def must_tell_to_drain(document: dict[str, Any]) -> bool:
    """A controller that does not drain has not heard it: its elder may have. One that has just begun is given time
    to hear from its gateways: it would take none for drained, and end what they have open."""
    has_heard = document["phase"] in ("draining", "stopping", "stopped")
    return not has_heard and (bool(document["gateways"]) or document["uptime_s"] >= _REJOIN_S)


def _raise_if_failed(document: dict[str, Any]) -> None:
    if document["phase"] == "failed":
        failed = [worker for worker in document["workers"] if worker["state"] == "failed"]
        raise StartFailed("\n".join(f"{worker['id']} failed: {worker['detail']}" for worker in failed))
