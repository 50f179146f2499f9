from expertmesh.v1 import identity_pb2 as _identity_pb2
from expertmesh.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RejectCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_CODE_UNSPECIFIED: _ClassVar[RejectCode]
    REJECT_CODE_OVERLOADED: _ClassVar[RejectCode]
    REJECT_CODE_NOT_READY: _ClassVar[RejectCode]
    REJECT_CODE_TOO_LARGE: _ClassVar[RejectCode]
    REJECT_CODE_WRONG_MODEL: _ClassVar[RejectCode]

class CloseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLOSE_REASON_UNSPECIFIED: _ClassVar[CloseReason]
    CLOSE_REASON_WORKER_LOST: _ClassVar[CloseReason]
    CLOSE_REASON_PREEMPTED: _ClassVar[CloseReason]
    CLOSE_REASON_FAILED: _ClassVar[CloseReason]
    CLOSE_REASON_DEADLINE: _ClassVar[CloseReason]
REJECT_CODE_UNSPECIFIED: RejectCode
REJECT_CODE_OVERLOADED: RejectCode
REJECT_CODE_NOT_READY: RejectCode
REJECT_CODE_TOO_LARGE: RejectCode
REJECT_CODE_WRONG_MODEL: RejectCode
CLOSE_REASON_UNSPECIFIED: CloseReason
CLOSE_REASON_WORKER_LOST: CloseReason
CLOSE_REASON_PREEMPTED: CloseReason
CLOSE_REASON_FAILED: CloseReason
CLOSE_REASON_DEADLINE: CloseReason

class GatewayHello(_message.Message):
    __slots__ = ("token_address",)
    TOKEN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    token_address: str
    def __init__(self, token_address: _Optional[str] = ...) -> None: ...

class Sibling(_message.Message):
    __slots__ = ("index", "attempt", "seed", "accepted", "score_from")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    SCORE_FROM_FIELD_NUMBER: _ClassVar[int]
    index: int
    attempt: int
    seed: int
    accepted: _containers.RepeatedScalarFieldContainer[int]
    score_from: int
    def __init__(self, index: _Optional[int] = ..., attempt: _Optional[int] = ..., seed: _Optional[int] = ..., accepted: _Optional[_Iterable[int]] = ..., score_from: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "prompt", "spec", "siblings", "priority", "resume", "tenant", "time_left_s", "waited_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SIBLINGS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    spec: _step_pb2.SequenceSpec
    siblings: _containers.RepeatedCompositeFieldContainer[Sibling]
    priority: int
    resume: bool
    tenant: str
    time_left_s: float
    waited_s: float
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., spec: _Optional[_Union[_step_pb2.SequenceSpec, _Mapping]] = ..., siblings: _Optional[_Iterable[_Union[Sibling, _Mapping]]] = ..., priority: _Optional[int] = ..., resume: _Optional[bool] = ..., tenant: _Optional[str] = ..., time_left_s: _Optional[float] = ..., waited_s: _Optional[float] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("attempt", "position")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    attempt: _identity_pb2.Attempt
    position: int
    def __init__(self, attempt: _Optional[_Union[_identity_pb2.Attempt, _Mapping]] = ..., position: _Optional[int] = ...) -> None: ...

class GatewayMessage(_message.Message):
    __slots__ = ("sender", "fingerprint", "term", "hello", "submit", "cancel", "finish")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    sender: _identity_pb2.Incarnation
    fingerprint: str
    term: int
    hello: GatewayHello
    submit: Submit
    cancel: Cancel
    finish: Finish
    def __init__(self, sender: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., fingerprint: _Optional[str] = ..., term: _Optional[int] = ..., hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_id", "queued_before")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    queued_before: int
    def __init__(self, request_id: _Optional[str] = ..., queued_before: _Optional[int] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("request_id", "code", "message", "retry_after_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    code: RejectCode
    message: str
    retry_after_s: float
    def __init__(self, request_id: _Optional[str] = ..., code: _Optional[_Union[RejectCode, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class AttemptClosed(_message.Message):
    __slots__ = ("attempt", "reason", "detail")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    attempt: _identity_pb2.Attempt
    reason: CloseReason
    detail: str
    def __init__(self, attempt: _Optional[_Union[_identity_pb2.Attempt, _Mapping]] = ..., reason: _Optional[_Union[CloseReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("model_len_max",)
    MODEL_LEN_MAX_FIELD_NUMBER: _ClassVar[int]
    model_len_max: int
    def __init__(self, model_len_max: _Optional[int] = ...) -> None: ...

class GatewayOrder(_message.Message):
    __slots__ = ("term", "fingerprint", "welcome", "accepted", "rejected", "closed")
    TERM_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    term: int
    fingerprint: str
    welcome: Welcome
    accepted: Accepted
    rejected: Rejected
    closed: AttemptClosed
    def __init__(self, term: _Optional[int] = ..., fingerprint: _Optional[str] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., closed: _Optional[_Union[AttemptClosed, _Mapping]] = ...) -> None: ...
