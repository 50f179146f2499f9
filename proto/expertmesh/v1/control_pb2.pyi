from expertmesh.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MemberState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMBER_STATE_UNSPECIFIED: _ClassVar[MemberState]
    MEMBER_STATE_STARTING: _ClassVar[MemberState]
    MEMBER_STATE_LOADING: _ClassVar[MemberState]
    MEMBER_STATE_READY: _ClassVar[MemberState]
    MEMBER_STATE_DRAINING: _ClassVar[MemberState]
    MEMBER_STATE_FAILED: _ClassVar[MemberState]
MEMBER_STATE_UNSPECIFIED: MemberState
MEMBER_STATE_STARTING: MemberState
MEMBER_STATE_LOADING: MemberState
MEMBER_STATE_READY: MemberState
MEMBER_STATE_DRAINING: MemberState
MEMBER_STATE_FAILED: MemberState

class Register(_message.Message):
    __slots__ = ("role", "pid", "node", "device", "address", "epoch")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    role: _identity_pb2.Role
    pid: int
    node: str
    device: str
    address: str
    epoch: _identity_pb2.Epoch
    def __init__(self, role: _Optional[_Union[_identity_pb2.Role, str]] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("slots", "reads", "rows")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    reads: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., reads: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("state", "bytes_loaded", "bytes_total", "detail", "gauges", "bytes_kept", "kept_as", "links", "load")
    class GaugesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class LinksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    GAUGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_KEPT_FIELD_NUMBER: _ClassVar[int]
    KEPT_AS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    state: MemberState
    bytes_loaded: int
    bytes_total: int
    detail: str
    gauges: _containers.ScalarMap[str, float]
    bytes_kept: int
    kept_as: str
    links: _containers.ScalarMap[str, str]
    load: ExpertLoad
    def __init__(self, state: _Optional[_Union[MemberState, str]] = ..., bytes_loaded: _Optional[int] = ..., bytes_total: _Optional[int] = ..., detail: _Optional[str] = ..., gauges: _Optional[_Mapping[str, float]] = ..., bytes_kept: _Optional[int] = ..., kept_as: _Optional[str] = ..., links: _Optional[_Mapping[str, str]] = ..., load: _Optional[_Union[ExpertLoad, _Mapping]] = ...) -> None: ...

class EpochReport(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: _identity_pb2.Epoch
    def __init__(self, epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ...) -> None: ...

class Unprepared(_message.Message):
    __slots__ = ("epoch", "why")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    epoch: _identity_pb2.Epoch
    why: str
    def __init__(self, epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., why: _Optional[str] = ...) -> None: ...

class TraceReport(_message.Message):
    __slots__ = ("number", "trace")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    number: int
    trace: bytes
    def __init__(self, number: _Optional[int] = ..., trace: _Optional[bytes] = ...) -> None: ...

class MemberReport(_message.Message):
    __slots__ = ("sender", "fingerprint", "term", "register", "heartbeat", "prepared", "adopted", "peer_lost", "unprepared", "trace")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    PEER_LOST_FIELD_NUMBER: _ClassVar[int]
    UNPREPARED_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    sender: _identity_pb2.Incarnation
    fingerprint: str
    term: int
    register: Register
    heartbeat: Heartbeat
    prepared: EpochReport
    adopted: EpochReport
    peer_lost: _identity_pb2.Incarnation
    unprepared: Unprepared
    trace: TraceReport
    def __init__(self, sender: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., fingerprint: _Optional[str] = ..., term: _Optional[int] = ..., register: _Optional[_Union[Register, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., prepared: _Optional[_Union[EpochReport, _Mapping]] = ..., adopted: _Optional[_Union[EpochReport, _Mapping]] = ..., peer_lost: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., unprepared: _Optional[_Union[Unprepared, _Mapping]] = ..., trace: _Optional[_Union[TraceReport, _Mapping]] = ...) -> None: ...

class PlacedWorker(_message.Message):
    __slots__ = ("worker", "address", "experts")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    worker: _identity_pb2.Incarnation
    address: str
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., address: _Optional[str] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class PlacementTable(_message.Message):
    __slots__ = ("epoch", "fingerprint", "num_layers", "num_experts", "workers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    epoch: _identity_pb2.Epoch
    fingerprint: str
    num_layers: int
    num_experts: int
    workers: _containers.RepeatedCompositeFieldContainer[PlacedWorker]
    def __init__(self, epoch: _Optional[_Union[_identity_pb2.Epoch, _Mapping]] = ..., fingerprint: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[PlacedWorker, _Mapping]]] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("attention", "pid", "node", "draining")
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    attention: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Incarnation]
    pid: int
    node: str
    draining: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Incarnation]
    def __init__(self, attention: _Optional[_Iterable[_Union[_identity_pb2.Incarnation, _Mapping]]] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., draining: _Optional[_Iterable[_Union[_identity_pb2.Incarnation, _Mapping]]] = ...) -> None: ...

class SendTrace(_message.Message):
    __slots__ = ("number", "seconds", "bytes_max")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    number: int
    seconds: float
    bytes_max: int
    def __init__(self, number: _Optional[int] = ..., seconds: _Optional[float] = ..., bytes_max: _Optional[int] = ...) -> None: ...

class Exit(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class MemberOrder(_message.Message):
    __slots__ = ("term", "fingerprint", "prepare", "publish", "retire", "members", "exit", "send_trace", "unhurried")
    TERM_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    RETIRE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    SEND_TRACE_FIELD_NUMBER: _ClassVar[int]
    UNHURRIED_FIELD_NUMBER: _ClassVar[int]
    term: int
    fingerprint: str
    prepare: PlacementTable
    publish: PlacementTable
    retire: EpochReport
    members: Members
    exit: Exit
    send_trace: SendTrace
    unhurried: bool
    def __init__(self, term: _Optional[int] = ..., fingerprint: _Optional[str] = ..., prepare: _Optional[_Union[PlacementTable, _Mapping]] = ..., publish: _Optional[_Union[PlacementTable, _Mapping]] = ..., retire: _Optional[_Union[EpochReport, _Mapping]] = ..., members: _Optional[_Union[Members, _Mapping]] = ..., exit: _Optional[_Union[Exit, _Mapping]] = ..., send_trace: _Optional[_Union[SendTrace, _Mapping]] = ..., unhurried: _Optional[bool] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class PlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PlacementReply(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: PlacementTable
    def __init__(self, table: _Optional[_Union[PlacementTable, _Mapping]] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class TraceReply(_message.Message):
    __slots__ = ("traces", "silent")
    TRACES_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    traces: _containers.RepeatedScalarFieldContainer[bytes]
    silent: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, traces: _Optional[_Iterable[bytes]] = ..., silent: _Optional[_Iterable[str]] = ...) -> None: ...

class BalanceRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class BalanceReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class ResizeRequest(_message.Message):
    __slots__ = ("attention", "experts", "drain")
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    attention: int
    experts: int
    drain: str
    def __init__(self, attention: _Optional[int] = ..., experts: _Optional[int] = ..., drain: _Optional[str] = ...) -> None: ...

class ResizeRefused(_message.Message):
    __slots__ = ("field", "value", "accepted")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    field: str
    value: str
    accepted: str
    def __init__(self, field: _Optional[str] = ..., value: _Optional[str] = ..., accepted: _Optional[str] = ...) -> None: ...

class ResizeReply(_message.Message):
    __slots__ = ("refused", "json", "not_kept")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    NOT_KEPT_FIELD_NUMBER: _ClassVar[int]
    refused: ResizeRefused
    json: str
    not_kept: str
    def __init__(self, refused: _Optional[_Union[ResizeRefused, _Mapping]] = ..., json: _Optional[str] = ..., not_kept: _Optional[str] = ...) -> None: ...
