"""Strangers at a door, by hand: raw sockets, half a handshake, words of HTTP/2, and no descriptor left."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.contracts.exchange_parties import PATIENCE_S, ExpertThread

HEADERS, SETTINGS = 1, 4  # HTTP/2 frames, RFC 9113
END_STREAM, END_HEADERS = 1, 4


def address_of(expert: ExpertThread) -> tuple[str, int]:
    host, port = expert.end.address.removeprefix("grpc:").rsplit(":", 1)
    return host, int(port)


def call_without_window(method: str) -> bytes:
    """How a client begins a call on stream 1, for whose answer it leaves no room."""
    fields = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": method, "te": "trailers",
              "content-type": "application/grpc"}  # fmt: skip
    literals = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )  # RFC 7541, without indexing

    def framed(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    no_window = (4).to_bytes(2, "big") + bytes(4)  # SETTINGS_INITIAL_WINDOW_SIZE: 0
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + framed(SETTINGS, 0, 0, no_window)
    return hello + framed(HEADERS, END_HEADERS, 1, literals)


def http2_frames(sock: socket.socket) -> Iterator[tuple[int, int]]:
    """Kind and flags of each, until the peer closes."""
    with sock.makefile("rb") as stream:
        while len(head := stream.read(9)) == 9:
            stream.read(int.from_bytes(head[:3], "big"))
            yield head[3], head[4]


@contextmanager
def knocking(expert: ExpertThread) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(PATIENCE_S)
        stranger.connect("\0" + expert.end.address.removeprefix("unix-abstract:"))
        yield stranger


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """All that this process may have are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)
