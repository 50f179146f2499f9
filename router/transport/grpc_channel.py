"""Channels and servers of the exchange between hosts: their options and credentials, in one place.

Nothing is encrypted yet: the credentials of TLS belong into `dial` and `listen`, and nowhere else.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import grpc

from router.config import RouterConfig
from router.errors import TransportError
from router.transport.lane import Lanes
from router.transport.link import occupied_bytes_max

METHOD = "/expertmesh.v1.Exchange/Link"
HELLO_KEY = "link-hello-bin"
SCHEME = "grpc:"

Handler: TypeAlias = "grpc.GenericRpcHandler[bytes, bytes]"
Options = list[tuple[str, int]]
CONNECTIONS_PER_PEER = 8  # of `peers_max`: a link has one, the others are of strangers
_WINDOW_BYTES_MAX = (1 << 31) - 1


def scheme(lanes: Lanes | None) -> str:
    """What addresses begin with where rows travel by such lanes; None: in the messages."""
    return f"{lanes.kind}+{SCHEME}" if lanes else SCHEME


def dial(target: str, config: RouterConfig) -> grpc.Channel:
    """A connection of its own, shared with no other link. Does not wait for it."""
    own = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),  # what the environment says of proxies is for the world outside
        ("grpc.enable_retries", 0),
    ]
    return grpc.insecure_channel(target, options=_options(config) + own)


def listen(
    host: str, handler: Handler, executor: ThreadPoolExecutor, config: RouterConfig
) -> tuple[grpc.Server, str]:
    """A started server on a port that nobody else has, and its host:port. Raises TransportError."""
    own = [
        ("grpc.so_reuseport", 0),  # an occupied port is an error
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(config.keepalive_s / 2)),
        # A stranger who connects and then says nothing, or nothing that asks for us, does not stay.
        ("grpc.server_handshake_timeout_ms", _milliseconds(config.connect_timeout_s)),
        ("grpc.max_connection_idle_ms", _milliseconds(config.connect_timeout_s)),
        ("grpc.max_allowed_incoming_connections", CONNECTIONS_PER_PEER * config.peers_max),
    ]
    server = grpc.server(
        executor, [handler], options=_options(config) + own, maximum_concurrent_rpcs=2 * config.peers_max
    )  # linked, and as many greeting
    bracketed = f"[{host}]" if ":" in host else host
    try:
        port = server.add_insecure_port(f"{bracketed}:0")
    except RuntimeError as error:
        raise TransportError(f"host: {host!r} cannot be listened on: {error}") from error
    server.start()
    return server, f"{bracketed}:{port}"


def _options(config: RouterConfig) -> Options:
    """A message is a frame; one that is larger than a link may carry is refused by its length alone.

    The keepalive's own timeout is not enough: a ping that is under way has another, of a minute.
    """
    return [
        ("grpc.max_receive_message_length", occupied_bytes_max(config)),
        ("grpc.max_send_message_length", occupied_bytes_max(config)),
        ("grpc.keepalive_time_ms", _milliseconds(config.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _milliseconds(config.keepalive_s)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(config.keepalive_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
        ("grpc.http2.bdp_probe", 0),  # else data is answered with pings, to find how wide the window should be
        ("grpc.http2.lookahead_bytes", min(_WINDOW_BYTES_MAX, occupied_bytes_max(config))),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))
