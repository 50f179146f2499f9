"""API keys: how they are written in the configuration, and who a call is from. Only hashes are kept.

A key is drawn at random, so that SHA-256 is enough to hide it. A call's key is compared by its hash, with every
known one and in constant time, so that the time taken does not tell which of them it resembles.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gateway.accounts import Account
from gateway.errors import Forbidden, Unauthorized

if TYPE_CHECKING:
    from gateway.config import GatewayConfig

_PREFIX = "sha256:"
_ACCEPTED = "accepted: 1 to 512 printable ASCII characters without spaces, or sha256: and 64 hexadecimal digits"


def hashed(key: object) -> object:
    """`sha256:` and the digest of a key; what is one already stays. Raises ValueError, which does not show it."""
    if key is None:
        return None
    if not isinstance(key, str) or not re.fullmatch(r"[\x21-\x7e]{1,512}", key):
        raise ValueError(_ACCEPTED)
    if not key.startswith(_PREFIX):
        return _PREFIX + hashlib.sha256(key.encode()).hexdigest()
    if not re.fullmatch(r"[0-9a-fA-F]{64}", key.removeprefix(_PREFIX)):
        raise ValueError(_ACCEPTED)
    return key.lower()


KeyHash = Annotated[str, BeforeValidator(hashed)]


class NamedKey(BaseModel):
    """One of several keys. Its name is the tenant whose share of the cluster serves its calls. Limits are of each
    gateway; beyond them 429, with the time after which to come back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """1 to 64 letters, digits, dots, hyphens and underscores. Logs and the scheduler know it."""

    key: KeyHash
    """The key, or `sha256:` and its hash in hexadecimal digits."""

    in_flight_max: int | None = Field(default=None, ge=1, le=2**20)
    """Calls being answered at once; null: as many as the gateway takes."""

    requests_per_minute: float | None = Field(default=None, gt=0, le=1e9)
    """Calls begun, a minute's worth of them at once."""

    tokens_per_minute: float | None = Field(default=None, gt=0, le=1e12)
    """Tokens of prompts and answers, a minute's worth of them at once. Counted as they come: a call is refused
    while nothing is left, not for what it may come to use."""


class Guest:
    """Who a call is from. `name` is empty where its key, or the lack of any, names nobody."""

    def __init__(self, name: str, may_administer: bool, account: Account) -> None:
        self.name = name
        self.may_administer = may_administer
        self.account = account


class Keeper:
    """Knows the keys of a gateway, for both its doors: the accounts behind them are of both together.

    Without any key nobody is asked. `api_key` opens everything but, where there is an `admin_key`, the admin
    doors; named keys never open those, and the admin key opens all.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self._guests: list[tuple[bytes, Guest]] = []
        if config.api_key is not None:
            self._know(config.api_key, Guest("", config.admin_key is None, Account()))
        for named in config.keys:
            account = Account(
                named.name, named.in_flight_max, named.requests_per_minute, named.tokens_per_minute,
                retry_after_s=config.retry_after_s,
            )  # fmt: skip
            self._know(named.key, Guest(named.name, False, account))
        asks_clients = bool(self._guests)
        if config.admin_key is not None:
            self._know(config.admin_key, Guest("", True, Account()))
        self._stranger = None if asks_clients else Guest("", config.admin_key is None, Account())

    def _know(self, key: str, guest: Guest) -> None:
        self._guests.append((key.removeprefix(_PREFIX).encode(), guest))

    def admit(self, authorization: str, x_api_key: str, *, is_admin: bool) -> Guest:
        """Who it is. The arguments are the headers, or the metadata, of those names; empty if absent. Raises
        Unauthorized and, for the admin doors, Forbidden."""
        kind, _, bearer = authorization.partition(" ")
        given = (bearer if kind.lower() == "bearer" else x_api_key).strip()
        guest = self._stranger
        presented = hashlib.sha256(given.encode()).hexdigest().encode()
        for known, holder in self._guests:
            if hmac.compare_digest(presented, known):
                guest = holder
        if guest is None or (is_admin and guest is self._stranger and not guest.may_administer):
            what = "admin key" if is_admin else "API key"
            raise Unauthorized(
                f"the {what} is missing or wrong; accepted: Authorization: Bearer <key>, or x-api-key: <key>"
            )
        if is_admin and not guest.may_administer:
            raise Forbidden("this key may not administer the cluster; accepted: the admin key")
        return guest
