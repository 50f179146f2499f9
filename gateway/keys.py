"""Who may enter: one API key for both faces, compared in constant time."""

from __future__ import annotations

import hmac

from pydantic import SecretStr

from gateway.errors import Unauthorized


class Keeper:
    """`key` None: nobody is asked."""

    def __init__(self, key: SecretStr | None) -> None:
        self._key = key.get_secret_value().encode() if key is not None else None

    def check(self, authorization: str, x_api_key: str) -> None:
        """Raises Unauthorized. The arguments are the headers, or the metadata, of those names; empty if absent."""
        if self._key is None:
            return
        kind, _, bearer = authorization.partition(" ")
        given = (bearer if kind.lower() == "bearer" else x_api_key).strip().encode()
        if not hmac.compare_digest(given, self._key):
            raise Unauthorized(
                "the API key is missing or wrong; accepted: Authorization: Bearer <key>, or x-api-key: <key>"
            )
