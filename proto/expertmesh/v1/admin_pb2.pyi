from expertmesh.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClusterPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLUSTER_PHASE_UNSPECIFIED: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_STARTING: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_READY: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_DEGRADED: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_FAILED: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_DRAINING: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_STOPPING: _ClassVar[ClusterPhase]
    CLUSTER_PHASE_STOPPED: _ClassVar[ClusterPhase]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_WAITING: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_FAILED: _ClassVar[WorkerState]
    WORKER_STATE_STOPPED: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_LEAVING: _ClassVar[WorkerState]
CLUSTER_PHASE_UNSPECIFIED: ClusterPhase
CLUSTER_PHASE_STARTING: ClusterPhase
CLUSTER_PHASE_READY: ClusterPhase
CLUSTER_PHASE_DEGRADED: ClusterPhase
CLUSTER_PHASE_FAILED: ClusterPhase
CLUSTER_PHASE_DRAINING: ClusterPhase
CLUSTER_PHASE_STOPPING: ClusterPhase
CLUSTER_PHASE_STOPPED: ClusterPhase
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_WAITING: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_FAILED: WorkerState
WORKER_STATE_STOPPED: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_LEAVING: WorkerState

class Worker(_message.Message):
    __slots__ = ("id", "role", "pid", "node", "state", "device", "incarnation", "bytes_loaded", "bytes_total", "slots", "detail", "epoch", "bytes_kept", "kept_as")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BYTES_KEPT_FIELD_NUMBER: _ClassVar[int]
    KEPT_AS_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: _identity_pb2.Role
    pid: int
    node: str
    state: WorkerState
    device: str
    incarnation: int
    bytes_loaded: int
    bytes_total: int
    slots: int
    detail: str
    epoch: _identity_pb2.Epoch
    bytes_kept: int
    kept_as: str
    def __init__(self, id: _Optional[str] = ..., role: _Optional[_Union[_identity_pb2.Role, str]] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., device: _Optional[str] = ..., incarnation: _Optional[int] = ..., bytes_loaded: _Optional[int] = ..., bytes_total: _Optional[int] = ..., slots: _Optional[int] = ..., detail: _Optional[str] = ..., epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., bytes_kept: _Optional[int] = ..., kept_as: _Optional[str] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("role", "workers_wanted", "workers_ready", "slots", "bytes_loaded", "workers_leaving")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_WANTED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_READY_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_LEAVING_FIELD_NUMBER: _ClassVar[int]
    role: _identity_pb2.Role
    workers_wanted: int
    workers_ready: int
    slots: int
    bytes_loaded: int
    workers_leaving: int
    def __init__(self, role: _Optional[_Union[_identity_pb2.Role, str]] = ..., workers_wanted: _Optional[int] = ..., workers_ready: _Optional[int] = ..., slots: _Optional[int] = ..., bytes_loaded: _Optional[int] = ..., workers_leaving: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("model", "fingerprint", "phase", "term", "epoch", "uptime_s", "workers", "pools", "scaling_failed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    SCALING_FAILED_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    phase: ClusterPhase
    term: int
    epoch: _identity_pb2.Epoch
    uptime_s: float
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    scaling_failed: str
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., phase: _Optional[_Union[ClusterPhase, str]] = ..., term: _Optional[int] = ..., epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., uptime_s: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ..., scaling_failed: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("attention", "experts")
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    attention: int
    experts: int
    def __init__(self, attention: _Optional[int] = ..., experts: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    def __init__(self, worker: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class ListPoolsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoolsResponse(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class LayerHolding(_message.Message):
    __slots__ = ("worker", "experts")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class LayerPlacement(_message.Message):
    __slots__ = ("layer", "holdings")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    holdings: _containers.RepeatedCompositeFieldContainer[LayerHolding]
    def __init__(self, layer: _Optional[int] = ..., holdings: _Optional[_Iterable[_Union[LayerHolding, _Mapping]]] = ...) -> None: ...

class GetPlacementResponse(_message.Message):
    __slots__ = ("epoch", "num_layers", "num_experts", "workers", "layers", "next_page_token")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    epoch: _identity_pb2.Epoch
    num_layers: int
    num_experts: int
    workers: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Incarnation]
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlacement]
    next_page_token: str
    def __init__(self, epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[_identity_pb2.Incarnation, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerPlacement, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("traces", "silent")
    TRACES_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    traces: _containers.RepeatedScalarFieldContainer[bytes]
    silent: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, traces: _Optional[_Iterable[bytes]] = ..., silent: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerFailure(_message.Message):
    __slots__ = ("number", "worker", "incarnation", "reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    worker: str
    incarnation: int
    reason: str
    def __init__(self, number: _Optional[int] = ..., worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class WatchEventsResponse(_message.Message):
    __slots__ = ("status", "phase", "epoch", "worker", "worker_left", "pool", "failure", "scaling_failed", "unreachable")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    WORKER_LEFT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    SCALING_FAILED_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    status: GetStatusResponse
    phase: ClusterPhase
    epoch: _identity_pb2.Epoch
    worker: Worker
    worker_left: str
    pool: Pool
    failure: WorkerFailure
    scaling_failed: str
    unreachable: str
    def __init__(self, status: _Optional[_Union[GetStatusResponse, _Mapping]] = ..., phase: _Optional[_Union[ClusterPhase, str]] = ..., epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., worker: _Optional[_Union[Worker, _Mapping]] = ..., worker_left: _Optional[str] = ..., pool: _Optional[_Union[Pool, _Mapping]] = ..., failure: _Optional[_Union[WorkerFailure, _Mapping]] = ..., scaling_failed: _Optional[str] = ..., unreachable: _Optional[str] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class ExpertMove(_message.Message):
    __slots__ = ("layer", "expert", "to")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    to: str
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., to: _Optional[str] = ..., **kwargs) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("epoch", "moves", "dropped", "bytes", "imbalance_before", "imbalance_after")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    epoch: _identity_pb2.Epoch
    moves: _containers.RepeatedCompositeFieldContainer[ExpertMove]
    dropped: int
    bytes: int
    imbalance_before: float
    imbalance_after: float
    def __init__(self, epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., moves: _Optional[_Iterable[_Union[ExpertMove, _Mapping]]] = ..., dropped: _Optional[int] = ..., bytes: _Optional[int] = ..., imbalance_before: _Optional[float] = ..., imbalance_after: _Optional[float] = ...) -> None: ...
