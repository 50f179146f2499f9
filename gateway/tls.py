"""TLS and mutual TLS for both doors of a gateway, from the same three files."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

import grpc

from gateway.config import GatewayConfig
from gateway.errors import TlsUnusable


def server_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """For HTTP; None: without TLS. Raises TlsUnusable, naming the setting and the file."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for field, file in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        _read(field, file)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password=_ask_nobody)
    except (ssl.SSLError, _Encrypted) as error:
        # One error for what cannot be read as a certificate, as a key, or does not go together.
        why = f"with tls_cert {config.tls_cert!r}: {_why(error)}"
        raise TlsUnusable("tls_key", config.tls_key, why) from error
    if config.tls_client_ca is not None:
        _read("tls_client_ca", config.tls_client_ca)
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise TlsUnusable("tls_client_ca", config.tls_client_ca, _why(error)) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def grpc_credentials(config: GatewayConfig) -> grpc.ServerCredentials | None:
    """The same for gRPC, which would tell of bad files only when clients fail. Raises TlsUnusable."""
    if server_context(config) is None:
        return None
    assert config.tls_cert is not None
    assert config.tls_key is not None
    pair = (_read("tls_key", config.tls_key), _read("tls_cert", config.tls_cert))
    if config.tls_client_ca is None:
        return grpc.ssl_server_credentials([pair])
    clients = _read("tls_client_ca", config.tls_client_ca)
    return grpc.ssl_server_credentials([pair], root_certificates=clients, require_client_auth=True)


class _Encrypted(Exception):
    pass


def _ask_nobody() -> NoReturn:
    """Else OpenSSL would ask at the terminal, and wait."""
    raise _Encrypted("it is encrypted")


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)


def _read(field: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise TlsUnusable(field, file, error.strerror or str(error)) from error
