"""Greetings of links <-> their messages in `expertmesh.v1`. What they say is judged in handshake.py."""

from __future__ import annotations

from expertmesh.v1 import exchange_pb2
from google.protobuf.message import DecodeError, Message

from router.errors import LinkRefused
from router.transport.handshake import Hello, Welcome
from router.wire import incarnation_to_pb, member_from_pb

HELLO_BYTES_MAX = 4096  # a hello or a welcome


def hello_to_bytes(hello: Hello) -> bytes:
    return exchange_pb2.LinkHello(
        version=hello.version, sender=incarnation_to_pb(hello.sender), to=incarnation_to_pb(hello.to),
        fingerprint=hello.fingerprint, token=hello.token, hidden=hello.hidden, dtype=hello.dtype,
        rows=hello.rows, replies=hello.replies, ring_bytes=hello.ring_bytes, lane_key=hello.lane_key,
    ).SerializeToString()  # fmt: skip


def hello_from_bytes(data: bytes) -> Hello:
    """Raises LinkRefused for bytes that are no LinkHello."""
    message = exchange_pb2.LinkHello()
    _parse(message, data, "hello")
    return Hello(
        message.version, member_from_pb(message.sender), member_from_pb(message.to), message.fingerprint,
        message.token, message.hidden, message.dtype, message.rows, message.replies,
        message.ring_bytes, message.lane_key,
    )  # fmt: skip


def welcome_to_bytes(welcome: Welcome) -> bytes:
    return exchange_pb2.LinkWelcome(
        sender=incarnation_to_pb(welcome.sender), refused=welcome.refused, lane_key=welcome.lane_key
    ).SerializeToString()


def welcome_from_bytes(data: bytes) -> Welcome:
    """Raises LinkRefused for bytes that are no LinkWelcome."""
    message = exchange_pb2.LinkWelcome()
    _parse(message, data, "welcome")
    return Welcome(member_from_pb(message.sender), message.refused, message.lane_key)


def _parse(message: Message, data: bytes, name: str) -> None:
    if len(data) > HELLO_BYTES_MAX:
        raise LinkRefused(f"{name}: {len(data)} bytes; at most {HELLO_BYTES_MAX}")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise LinkRefused(f"{name}: not a {message.DESCRIPTOR.name}") from error
