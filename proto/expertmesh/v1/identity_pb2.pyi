from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ATTENTION: _ClassVar[Role]
    ROLE_EXPERT: _ClassVar[Role]
    ROLE_SCHEDULER: _ClassVar[Role]
    ROLE_GATEWAY: _ClassVar[Role]
    ROLE_CONTROLLER: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_ATTENTION: Role
ROLE_EXPERT: Role
ROLE_SCHEDULER: Role
ROLE_GATEWAY: Role
ROLE_CONTROLLER: Role

class Incarnation(_message.Message):
    __slots__ = ("id", "number")
    ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    id: str
    number: int
    def __init__(self, id: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("term", "number")
    TERM_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    term: int
    number: int
    def __init__(self, term: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("request_id", "index", "number")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    number: int
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...
