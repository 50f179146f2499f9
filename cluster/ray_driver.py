"""Ray, as the rest of the cluster needs it: run workers as actors, and host a cluster from `serve`.

Ray starts and ends processes, keeps the store, and says when a process has died. Nothing on a token's path,
and no heartbeat, is a Ray call. `RAY_AUTH_MODE` must be set before this module is imported (Ray reads it then).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.address import quiet_ports
from cluster.config import Config
from cluster.events import ActorDied, KillWorker, Remember, Role, StartWorker, WatchWorker
from cluster.member_link import ControllerUnreachable
from cluster.processes import end_process, has_ended
from cluster.ray_store import RayStore
from cluster.spec import ClusterSpec, MeetingPoint
from cluster.store import POOLS
from router.placement import Member

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; we put nothing into it
_ACTOR_ANSWER_S = 10.0
_CLOSE_S = 5.0
_LAUNCH_WAIT_S = 60.0
_REPLICA_LOOK_S = 0.01
"""How often Serve looks whether calls are open, before it ends a replica. There are none: a gateway that is to end
has drained. Serve's own 2 s every stop had to wait for."""
_SERVE_NAMESPACE = "serve"
_RAY_PROCESSES = ("gcs_server", "raylet")  # without either nothing that dies is replaced


def namespace(cluster_name: str) -> str:
    """Actors of clusters with different names never meet."""
    return f"expertmesh-{cluster_name}"


_GPU_ENVIRONMENT = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Both before the process asks for its GPU: no TF32 whatever the host says, and a workspace of one size, on which
cuBLAS's choice of kernel depends."""

_NCCL_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
"""Where rows may travel by nccl: a hardware queue for each stream of a link, and no kernel whose first use waits
for kernels that wait for a peer (decision 11)."""


def node_ip() -> str:
    """This node's address, as Ray tells it to other nodes."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class RayWorkers:
    """A WorkerDriver: each life of a worker is a detached actor that is never restarted.

    Ray is asked from one thread of its own, in order; at most a start and a kill per worker wait there.
    """

    def __init__(self, spec: ClusterSpec, store: RayStore, actors: Mapping[Role, Any]) -> None:
        """`actors`: the actor class of each role, built from (spec as JSON, id, incarnation)."""
        self._spec, self._store, self._actors = spec, store, actors
        self._namespace = namespace(spec.config.cluster.name)
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="ray-workers")
        self._on_died: Callable[[ActorDied], None] = log.info

    def bind(self, on_died: Callable[[ActorDied], None]) -> None:
        self._on_died = on_died

    def start(self, command: StartWorker) -> None:
        self._asking.submit(self._guarded, command.member, lambda: self._start(command))

    def watch(self, command: WatchWorker) -> None:
        self._asking.submit(self._guarded, command.member, lambda: self._watch(command.member))

    def remember(self, command: Remember) -> Future[None]:
        return self._asking.submit(self._store.write, POOLS, command.version, command.pools.to_json())

    def kill(self, command: KillWorker) -> None:
        if command.node in ("", platform.node()) and command.pid:
            end_process(command.pid)  # at once, and also when it is stopped and would not hear Ray
        self._asking.submit(self._guarded, command.member, lambda: self._kill(command.member))

    def close(self) -> None:
        self._asking.shutdown(wait=True)

    def _guarded(self, member: Member, ask: Callable[[], None]) -> None:
        try:
            ask()
        except (RayError, ValueError, TimeoutError) as error:
            self._on_died(ActorDied(member, f"Ray: {_cause(error)}"))

    def _start(self, command: StartWorker) -> None:
        member = command.member
        if not self._store.claim(member.id, member.incarnation):
            self._on_died(ActorDied(member, "this incarnation was taken by another controller"))
            return
        options = self._actors[command.role].options(
            name=_actor_name(member), namespace=self._namespace, lifetime="detached", max_restarts=0, num_cpus=0,
            resources=_pool_resources(command.role), **_gpu_options(self._spec.config),
            scheduling_strategy="SPREAD" if self._spec.meeting else "DEFAULT",
        )  # fmt: skip
        self._follow(member, options.remote(self._spec.to_json(), member.id, member.incarnation))

    def _watch(self, member: Member) -> None:
        try:
            actor = ray.get_actor(_actor_name(member), namespace=self._namespace)
        except ValueError:  # Ray knows no such actor (any more)
            self._on_died(ActorDied(member, "its process ended while no controller watched"))
            return
        self._follow(member, actor)

    def _follow(self, member: Member, actor: Any) -> None:
        """Its `watch` ends with the worker, one way or the other."""

        def ended(future: Any) -> None:
            error = future.exception()
            if error is None:
                self._asking.submit(ray.kill, actor, no_restart=True)  # stopped as told: its process may go
            detail = f"exited: {future.result()}" if error is None else _cause(error)
            self._on_died(ActorDied(member, detail))

        actor.watch.remote().future().add_done_callback(ended)

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(ValueError):  # there is no such actor (any more)
            ray.kill(ray.get_actor(_actor_name(member), namespace=self._namespace), no_restart=True)


class RayHost:
    """What `serve` does with Ray: start or join it, launch a cluster on it, and leave nothing behind."""

    def __init__(self, config: Config, temp_dir: str) -> None:
        """`temp_dir`: for Ray's sockets and logs when we start it. Raises ClusterExists or TooFewGpus."""
        life = config.cluster
        self._config = config
        self._owns_ray = life.ray_address is None
        self._spec: ClusterSpec | None = None
        self._launching: Future[None] | None = None
        self._owns_serve = False
        own: dict[str, Any] = {
            "_temp_dir": temp_dir, "_node_ip_address": "127.0.0.1", "include_dashboard": life.dashboard,
            "dashboard_host": "127.0.0.1", "num_cpus": max(1, os.cpu_count() or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }  # fmt: skip
        context = ray.init(
            address="local" if self._owns_ray else life.ray_address, namespace=namespace(life.name),
            log_to_driver=False, logging_level=logging.ERROR, **(own if self._owns_ray else {}),
        )  # fmt: skip
        children = psutil.Process().children() if self._owns_ray else []
        self._ray_processes = {child.name(): child for child in children if child.name() in _RAY_PROCESSES}
        self.dashboard_url: str = context.dashboard_url or ""
        """host:port of Ray's dashboard and job server; empty: not asked for."""
        if names := list(self._names()):
            ray.shutdown()
            raise ClusterExists(
                f"cluster.name: {life.name!r} is taken on this Ray by actors {', '.join(sorted(names))}; "
                "accepted: another name, or end that cluster first"
            )
        if config.device == "cuda":
            self._check_gpus()

    def _check_gpus(self) -> None:
        """Raises TooFewGpus: Ray would have workers wait for what it does not have, without a word."""
        resources = ray.cluster_resources() if self._owns_ray else ray.available_resources()  # type: ignore[no-untyped-call]
        if shortage := self._config.pools.gpu_shortage(int(resources.get("GPU", 0))):
            ray.shutdown()
            raise TooFewGpus(f"Ray: {shortage}")

    def placed(self, spec: ClusterSpec) -> ClusterSpec:
        """With a meeting point, if the cluster is to span hosts: this node, and two ports free on it."""
        span = self._config.cluster.span
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if span == "host" or (span == "auto" and len(alive) == 1):
            return spec
        host = node_ip()
        ports = quiet_ports(host, 2)
        node_id = ray.get_runtime_context().get_node_id()
        return dataclasses.replace(spec, meeting=MeetingPoint(host, node_id, *ports))

    def launch(self, spec: ClusterSpec, controller: Any, scheduler: Any, gateway: Any) -> Future[None]:
        """Start the deciders, which start the workers, and the gateway. Fails with LaunchFailed and the reason."""
        self._spec = spec
        self._launching = _in_background(lambda: self._launch(controller, scheduler, gateway))
        return self._launching

    def _launch(self, controller: Any, scheduler: Any, gateway: Any) -> None:
        try:
            self._controller = self._decider("controller", controller)
            answers = [self._controller.ready.remote(), self._decider("scheduler", scheduler).ready.remote()]
            self._run_gateways(gateway)  # meanwhile they start
            ray.get(answers, timeout=self._config.cluster.startup_timeout_s)
        except (RayError, TimeoutError) as error:
            raise LaunchFailed(_cause(error)) from error

    def _run_gateways(self, gateway: Any) -> None:
        """Serve owns a gateway's life, each an application of its own; bytes take its own HTTP server, so that
        Serve's proxy is off and its bound on calls, which none passes, lies above every bound of ours."""
        from ray import serve  # only here: it costs a worker's process a second and 50 MB

        assert self._spec is not None
        self._owns_serve = _SERVE_NAMESPACE not in {actor["namespace"] for actor in _named_actors()}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        options: dict[str, Any] = {"num_cpus": 0}
        if self._spec.meeting:
            options["resources"] = {f"node:{self._spec.meeting.host}": 0.001}  # where serve was told to listen
        deploy = serve.deployment(
            name="gateway", num_replicas=1, max_ongoing_requests=1 << 20, ray_actor_options=options,
            health_check_period_s=self._config.cluster.heartbeat_s,  # how soon Serve misses one that has died
            graceful_shutdown_wait_loop_s=_REPLICA_LOOK_S,
        )  # fmt: skip
        for index, name in enumerate(self._applications):
            try:
                serve.run(deploy(gateway).bind(self._spec.to_json(), index), name=name, route_prefix=None)
            except RuntimeError as error:  # says that it failed; the application's status says why
                deployments = serve.status().applications[name].deployments
                raise LaunchFailed(f"gateway: {_cause(deployments['gateway'].message or error)}") from error

    def _decider(self, name: str, actor_class: Any) -> Any:
        """Restarted by Ray for ever, each life with a new term."""
        assert self._spec is not None
        meeting = self._spec.meeting
        strategy = NodeAffinitySchedulingStrategy(meeting.node_id, soft=False) if meeting else "DEFAULT"
        return actor_class.options(
            name=name, lifetime="detached", max_restarts=-1, num_cpus=0, scheduling_strategy=strategy
        ).remote(self._spec.to_json())

    def ended(self) -> list[str]:
        """Which of Ray's own processes have ended, where we started them."""
        return [name for name, process in self._ray_processes.items() if has_ended(process)]

    def drain(self) -> None:
        """Begin to end the cluster in order. Raises ControllerUnreachable: it may be starting anew."""
        try:
            ray.get(self._controller.drain.remote(), timeout=_ACTOR_ANSWER_S)
        except RayError as error:
            raise ControllerUnreachable(f"the controller cannot be told ({_cause(error)})") from error

    @property
    def _applications(self) -> list[str]:
        return [f"{namespace(self._config.cluster.name)}-{i}" for i in range(self._config.pools.gateways)]

    def close(self) -> None:
        """End everything of this cluster that is left, and Ray if we started it.

        Our own is killed: nobody else is on it, and what the cluster wanted to finish it has. (Ray would give each
        of its processes a second to end by itself, one after another.) One that was joined has to wait until a
        launch has ended that still calls it.
        """
        if self._owns_ray:
            end_children()
            return
        if self._launching is not None:
            wait([self._launching], _LAUNCH_WAIT_S)
        if self._spec is not None:
            self._remove(self._spec.cluster_id)
            ray.shutdown()

    def _remove(self, cluster_id: str) -> None:
        """From a Ray that others go on using."""
        from ray import serve

        if self._owns_serve:
            serve.shutdown()  # type: ignore[no-untyped-call]
        else:
            for name in self._applications:
                serve.delete(name)
        for name in list(self._names()):
            with contextlib.suppress(ValueError):  # it has ended by itself
                ray.kill(ray.get_actor(name), no_restart=True)
        RayStore(cluster_id).clear()

    def _names(self) -> Iterator[str]:
        own = namespace(self._config.cluster.name)
        return (actor["name"] for actor in _named_actors() if actor["namespace"] == own)


def _named_actors() -> list[dict[str, str]]:
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return actors


def end_children() -> None:
    """Kill every process that this one has started, and theirs."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, _CLOSE_S)


def _in_background(work: Callable[[], None]) -> Future[None]:
    """On a thread that ends with the process: Ray's calls cannot be interrupted."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except Exception as error:  # the waiter's to handle, as in any executor
            future.set_exception(error)

    threading.Thread(target=run, name="launch", daemon=True).start()
    return future


class ClusterExists(Exception):
    """A cluster of this name runs on the Ray that was to be joined."""


class TooFewGpus(Exception):
    """Ray has fewer GPUs than the workers ask it for."""


class LaunchFailed(Exception):
    """A decider or the gateway could not be started, and why."""


def _actor_name(member: Member) -> str:
    return f"{member.id}#{member.incarnation}"


def _gpu_options(config: Config) -> dict[str, Any]:
    """What a worker asks of Ray beside its pool's resources. On the CPU nothing: Ray keeps processes at hand for
    who asks for no environment of its own."""
    if config.device == "cpu":
        return {}
    may_use_nccl = config.transport == "nccl" or (config.transport == "auto" and config.cluster.span == "hosts")
    environment = _GPU_ENVIRONMENT | (_NCCL_ENVIRONMENT if may_use_nccl else {})
    return {"num_gpus": config.pools.gpus_per_worker, "runtime_env": {"env_vars": environment}}


def _pool_resources(role: Role) -> dict[str, float]:
    """Where the Ray that was joined declares pools, workers go where their pool is."""
    name = f"expertmesh_{role.value}"
    return {name: 1.0} if name in ray.cluster_resources() else {}  # type: ignore[no-untyped-call]


def _cause(error: BaseException | str) -> str:
    """Ray wraps reasons in pages: of a traceback the last line is what happened, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    is_traceback = any(line.startswith("File ") for line in lines)
    return lines[-1] if is_traceback else lines[0]
