"""The one configuration of a cluster: a frozen tree, each branch owned by the folder that reads it.

A YAML file gives what differs from the defaults, flags override the file, and whatever is not known is refused
by name. Nothing here looks at the machine or the checkpoint: `cluster/preflight.py` does.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from attention_workers.config import AttentionConfig
from cluster.balancer.config import BalancerConfig
from cluster.scheduler.config import SchedulerConfig
from expert_workers.config import ExpertConfig
from gateway.config import GatewayConfig
from router.config import RouterConfig

_SECRETS = ("api_key", "admin_key", "key")  # settings whose values are in no message
_ENVELOPE_BYTES = 4096  # of a submission's message, beside the submission


class ConfigError(Exception):
    """One line per mistake: the field, the value, what is accepted."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolsConfig(_Section):
    attention_workers: int = Field(1, ge=1, le=256)
    """Each holds all attention weights and its own keys and values; more serve more sequences at once."""

    expert_workers: int = Field(2, ge=1, le=256)
    """Each holds its share of the experts of every layer."""

    replicas: int = Field(1, ge=1, le=16)
    """Expert workers that hold each expert. 2 or more: losing one worker is a routing change."""

    gateways: int = Field(1, ge=1, le=16)
    """Each listens on ports of its own: `port` and `grpc_port`, and those that follow. Its clients notice when one
    dies, nobody else's do."""

    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """With device cuda, what of one GPU each worker asks Ray for, and the most of its memory that it takes.
    0.5: two workers share one."""

    def gpu_shortage(self, found: int) -> str:
        """Why so many whole GPUs are too few for both pools, of which Ray would wait for more; empty: they do."""
        on_one = int(1 / self.gpus_per_worker + 1e-9)
        needed = -(-(self.attention_workers + self.expert_workers) // on_one)
        if needed <= found:
            return ""
        return (
            f"device (--device): 'cuda' with {found} GPU(s), {needed} needed for {self.attention_workers} "
            f"attention and {self.expert_workers} expert worker(s) at pools.gpus_per_worker "
            f"{self.gpus_per_worker:g}; accepted: fewer workers, a smaller pools.gpus_per_worker, or more GPUs"
        )

    @model_validator(mode="after")
    def _relations(self) -> PoolsConfig:
        if self.replicas > self.expert_workers:
            raise ValueError(
                f"replicas {self.replicas} must not exceed expert_workers {self.expert_workers}: "
                "the replicas of an expert are on distinct workers"
            )
        return self


class LifeConfig(_Section):
    """How the cluster is hosted, and how patient its controller is."""

    name: str = Field("expertmesh", pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    """Tells clusters on one Ray apart: lower-case letters, digits and hyphens."""

    ray_address: str | None = None
    """A Ray cluster to join (`auto` or host:port); null: start one for this cluster alone, and end it with it."""

    ray_auth: Literal["token", "disabled"] = "token"
    """Ray's authentication when we start Ray, unless RAY_AUTH_MODE is set; a Ray that is joined has its own."""

    span: Literal["auto", "host", "hosts"] = "auto"
    """host: all processes on this one, meeting at Unix sockets. hosts: at TCP ports of their nodes' addresses,
    which the cluster's token guards. auto: hosts if the Ray that is joined has several nodes at launch."""

    dashboard: bool = False
    """Ray's dashboard and job server on 127.0.0.1:8265, when we start Ray. Costs some 200 MB."""

    log_format: Literal["text", "json"] = "text"
    """What processes say on stderr, which Ray keeps: lines for people or of JSON; without prompts, either way."""

    startup_timeout_s: float = Field(120.0, gt=0)
    """Longest start of one process until it registers, and longest loading without a byte of progress."""

    drain_timeout_s: float = Field(30.0, ge=0)
    """Longest wait for running requests once the cluster is told to stop."""

    bind_wait_s: float = Field(5.0, ge=0)
    """How long a process that was restarted waits for its address while an earlier life still holds it; then it
    ends, and is restarted again."""

    heartbeat_s: float = Field(1.0, ge=0.05)
    """Between two signs of life of every process."""

    member_deadline_s: float = Field(5.0, gt=0)
    """A worker silent for so long is lost: killed and replaced. At least three heartbeats."""

    loop_stall_s: float = Field(5.0, gt=0)
    """An event loop that has not turned for so long is hung: its process says so, is killed and replaced."""

    compute_stall_s: float = Field(120.0, gt=0)
    """Likewise a worker's compute thread: it turns with every step, every wait for experts that ends, and every
    expert computed."""

    companion_deadline_s: float = Field(30.0, gt=0)
    """Scheduler and controller watch each other, the controller also gateways: one silent for so long is killed,
    and started again by Ray. Long: nothing that runs waits for them."""

    restarts_max: int = Field(3, ge=0)
    """Failed starts of one worker in a row after which it is given up, and `serve` ends with its reason. Once the
    cluster has served it is tried for ever, but its experts are given to the rest."""

    restart_backoff_s_min: float = Field(0.5, gt=0)
    restart_backoff_s_max: float = Field(30.0, gt=0)
    """Wait before a worker's second start in a row; it doubles with each further one, up to the larger."""

    @model_validator(mode="after")
    def _relations(self) -> LifeConfig:
        if self.restart_backoff_s_min > self.restart_backoff_s_max:
            raise ValueError(
                f"restart_backoff_s_min {self.restart_backoff_s_min:g} must not exceed restart_backoff_s_max "
                f"{self.restart_backoff_s_max:g}"
            )
        for name in ("member_deadline_s", "loop_stall_s", "compute_stall_s", "companion_deadline_s"):
            if getattr(self, name) < 3 * self.heartbeat_s:
                raise ValueError(
                    f"{name} {getattr(self, name):g} must be at least three heartbeats, {3 * self.heartbeat_s:g}"
                )
        return self


class Config(_Section):
    model: str
    """Folder of the checkpoint: config.json and safetensors."""

    served_name: str | None = Field(None, min_length=1, max_length=256)
    """The model's name in the API; null: the name of its folder."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    """Where REST is served. A wider host than loopback should come with keys and TLS (`gateway`)."""

    grpc_port: int | None = Field(9000, ge=0, le=65535)
    """Where gRPC is served, on the same host; 0 or null: nowhere."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where both pools compute. cuda: on GPUs, with torch's own kernels."""

    transport: Literal["auto", "shm", "grpc", "nccl", "cuda_ipc"] = "auto"
    """Between the pools. auto: each pair of workers by shm if they are on one host, else by grpc; on GPUs, if the
    extra `gpu` is installed, by cuda_ipc, else by nccl."""

    pools: PoolsConfig = PoolsConfig.model_validate({})
    cluster: LifeConfig = LifeConfig.model_validate({})
    attention: AttentionConfig = AttentionConfig.model_validate({})
    expert: ExpertConfig = ExpertConfig.model_validate({})
    router: RouterConfig = RouterConfig()
    """The exchange between the pools: the same for both ends."""
    balancer: BalancerConfig = BalancerConfig()
    """Which expert workers hold which experts."""
    scheduler: SchedulerConfig = SchedulerConfig.model_validate({})
    gateway: GatewayConfig = GatewayConfig.model_validate({})

    @field_validator("model")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("must be the folder of a checkpoint")
        return value

    @model_validator(mode="after")
    def _bounds_meet(self) -> Config:
        """A gateway must not accept what its link or the scheduler would break over."""
        gateway, scheduler = self.gateway, self.scheduler
        for name, value, bound, of in (
            ("gateway.n_max", gateway.n_max, scheduler.siblings_max, "scheduler.siblings_max"),
            ("gateway.in_flight_max", gateway.in_flight_max, gateway.link_queue_max, "gateway.link_queue_max"),
            ("gateway.in_flight_max", gateway.in_flight_max, gateway.grpc_rpcs_max, "gateway.grpc_rpcs_max"),
        ):
            if value > bound:
                raise ValueError(f"{name} {value} must not exceed {of} {bound}")
        if gateway.submit_bytes_max + _ENVELOPE_BYTES > scheduler.message_bytes_max:
            raise ValueError(
                f"gateway.submit_bytes_max {gateway.submit_bytes_max} must be at least {_ENVELOPE_BYTES} below "
                f"scheduler.message_bytes_max {scheduler.message_bytes_max}"
            )
        return self

    @model_validator(mode="after")
    def _a_wait_is_no_stall(self) -> Config:
        """A compute thread turns with every wait for experts that ends; the longest must not count as hanging."""
        total_s, stall_s = self.router.combine_total_s, self.cluster.compute_stall_s
        if stall_s < total_s:
            raise ValueError(
                f"cluster.compute_stall_s {stall_s:g} must be at least router.combine_total_s, {total_s:g}: the "
                "longest wait for experts is no hang"
            )
        return self

    @model_validator(mode="after")
    def _two_ports(self) -> Config:
        if self.grpc_port == self.port:
            raise ValueError(f"grpc_port {self.grpc_port} must not be port: REST and gRPC are served side by side")
        gateways, ports = self.pools.gateways, [port for port in (self.port, self.grpc_port) if port]
        if max(ports) + gateways - 1 > 65535 or (len(ports) == 2 and abs(ports[0] - ports[1]) < gateways):
            raise ValueError(
                f"pools.gateways {gateways}, port {self.port} and grpc_port {self.grpc_port}: accepted: ports "
                f"up to 65535, and {gateways} or more between the two"
            )
        return self

    def of_gateway(self, index: int) -> Config:
        """With the ports of this one."""
        grpc_port = self.grpc_port + index if self.grpc_port else self.grpc_port
        return self.model_copy(update={"port": self.port + index, "grpc_port": grpc_port})

    @model_validator(mode="after")
    def _reaches(self) -> Config:
        if self.transport in ("shm", "cuda_ipc") and self.cluster.span == "hosts":
            raise ValueError(
                f"transport {self.transport!r} reaches one host only, accepted with cluster.span 'hosts': auto, "
                "grpc, nccl"
            )
        if self.transport in ("nccl", "cuda_ipc") and self.device != "cuda":
            raise ValueError(
                f"transport {self.transport!r} carries rows between GPUs, accepted with device {self.device!r}: "
                "auto, shm, grpc"
            )
        return self

    @model_validator(mode="after")
    def _encodes_exactly(self) -> Config:
        self.router.rows_sent(self.attention.numerics)
        self.router.answers(self.attention.numerics)
        return self

    @model_validator(mode="after")
    def _one_arithmetic(self) -> Config:
        for name in ("numerics", "dtype"):
            ours, theirs = getattr(self.attention, name), getattr(self.expert, name)
            if ours != theirs:
                raise ValueError(f"attention.{name} {ours!r} and expert.{name} {theirs!r} must be the same")
        return self

    @property
    def model_path(self) -> Path:
        return Path(self.model).resolve()

    @property
    def model_name(self) -> str:
        return self.served_name or self.model_path.name

    @property
    def url(self) -> str:
        """Where REST is served."""
        return f"{'https' if self.gateway.tls_cert else 'http'}://{self.host}:{self.port}"

    def to_yaml(self) -> str:
        """Everything, defaults included; of keys only their hashes are known."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text

    def to_json(self) -> str:
        """For the cluster's own processes. `Config.model_validate_json` reads it."""
        return self.model_dump_json()


def load_config(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The file's tree with `flags` (dotted name to value) over it. Raises ConfigError."""
    tree = _read(file) if file else {}
    for name, value in flags.items():
        *path, last = name.split(".")
        branch = tree
        for part in path:
            below = branch.setdefault(part, {})
            if not isinstance(below, dict):
                raise ConfigError(f"{part}: {below!r}; accepted: a mapping")
            branch = below
        branch[last] = value
    unknown = list(_unknown(tree, Config, ""))
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(mistake) for mistake in error.errors())) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: unreadable ({error}); accepted: a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: holds a {type(tree).__name__}; accepted: a mapping of settings")
    return tree


def _fields(branch: type) -> dict[str, Any]:
    """name -> type of each setting."""
    if dataclasses.is_dataclass(branch):
        return {field.name: None for field in dataclasses.fields(branch)}
    assert issubclass(branch, BaseModel)
    return {name: field.annotation for name, field in branch.model_fields.items()}


def _unknown(tree: Mapping[Any, Any], branch: type, where: str) -> Iterator[str]:
    fields = _fields(branch)
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"the nearest known is {near[0]!r}" if near else f"accepted: {', '.join(fields)}"
            yield f"{where}{key}: unknown setting; {hint}"
        elif isinstance(value, dict) and isinstance(fields[key], type):
            yield from _unknown(value, fields[key], f"{where}{key}.")
        elif isinstance(value, list):
            kind = get_args(fields[key])[0] if get_args(fields[key]) else None
            for number, item in enumerate(value):
                if isinstance(item, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from _unknown(item, kind, f"{where}{key}.{number}.")


def _line(mistake: Any) -> str:
    where = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "missing":
        return f"{where}: none given; accepted: a value" + ("" if "." in where else f" (--{where})")
    message = mistake["msg"].removeprefix("Value error, ").replace("Input should be", "accepted:")
    message = message.split(", unable to parse")[0]
    value = mistake["input"]
    if isinstance(value, dict | BaseModel) or where.split(".")[-1] in _SECRETS:
        return f"{where}: {message}" if where else message
    return f"{where}: {value!r}; {message}"
