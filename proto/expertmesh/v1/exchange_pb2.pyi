from expertmesh.v1 import identity_pb2 as _identity_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LinkHello(_message.Message):
    __slots__ = ("version", "sender", "to", "fingerprint", "token", "hidden", "dtype", "rows", "replies", "ring_bytes", "lane_key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    sender: _identity_pb2.Incarnation
    to: _identity_pb2.Incarnation
    fingerprint: str
    token: str
    hidden: int
    dtype: str
    rows: str
    replies: str
    ring_bytes: int
    lane_key: bytes
    def __init__(self, version: _Optional[int] = ..., sender: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., to: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., fingerprint: _Optional[str] = ..., token: _Optional[str] = ..., hidden: _Optional[int] = ..., dtype: _Optional[str] = ..., rows: _Optional[str] = ..., replies: _Optional[str] = ..., ring_bytes: _Optional[int] = ..., lane_key: _Optional[bytes] = ...) -> None: ...

class LinkWelcome(_message.Message):
    __slots__ = ("sender", "refused", "lane_key")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LANE_KEY_FIELD_NUMBER: _ClassVar[int]
    sender: _identity_pb2.Incarnation
    refused: str
    lane_key: bytes
    def __init__(self, sender: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., refused: _Optional[str] = ..., lane_key: _Optional[bytes] = ...) -> None: ...
