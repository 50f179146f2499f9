"""One call, at whichever door it came in: its name, whose it is, which trace it belongs to, how it ended.

It goes with the call through tasks and threads as a context variable: what lies between the door and the log, or
the ledger, need not hand it on.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from gateway.accounts import Account
from gateway.keys import Guest
from gateway.request import GenerateRequest

_calls = logging.getLogger("gateway.calls")

_TRACEPARENT = r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"


@dataclass(frozen=True)
class Trace:
    """A place in a distributed trace, as W3C's Trace Context has it: 32 and 16 hexadecimal digits, and flags."""

    trace_id: str
    span_id: str
    flags: str = "00"

    @classmethod
    def below(cls, traceparent: str) -> Trace:
        """A new span of the trace that a client names; of a new one where it names none that can be read."""
        found = re.fullmatch(_TRACEPARENT, traceparent.strip())
        span_id = secrets.token_hex(8)
        if found is not None:
            version, trace_id, parent, flags, more = found.groups()
            is_known = version != "ff" and not (version == "00" and more)
            if is_known and trace_id.strip("0") and parent.strip("0"):
                return cls(trace_id, span_id, flags)
        return cls(secrets.token_hex(16), span_id)

    @property
    def parent(self) -> str:
        """The header for who is called next, and for the client: this span."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


@dataclass
class Visit:
    name: str
    trace: Trace
    guest: Guest = field(default_factory=lambda: Guest("", False, Account()))
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # of answers

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Visit:
        """The client's own name for the call where it can be a header again, else a new one."""
        given = headers.get("x-request-id", "")
        name = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
        return cls(name, Trace.below(headers.get("traceparent", "")))

    def headers(self) -> dict[str, str]:
        """What every answer carries: the name under both headers that clients look for."""
        return {"x-request-id": self.name, "request-id": self.name, "traceparent": self.trace.parent}

    @contextmanager
    def open(self) -> Iterator[None]:
        """For as long as it is answered. Raises Overloaded where its key's limits are reached."""
        self.guest.account.enter(time.monotonic())
        try:
            yield
        finally:
            self.guest.account.leave()

    def admit(self, requests: tuple[GenerateRequest, ...], cache_shared_by: str) -> tuple[GenerateRequest, ...]:
        """The same, of the key's tenant, whose prompts are charged. Named keys are tenants; what clients of other
        keys say of themselves stays."""
        prompt_tokens = sum(len(request.prompt) for request in requests)
        self.num_prompt_tokens += prompt_tokens
        self.guest.account.charge(prompt_tokens)
        if self.guest.name:
            requests = tuple(replace(request, tenant=self.guest.name) for request in requests)
        if cache_shared_by != "all":  # no name of a key has a slash
            own = f"{self.guest.name}/"
            requests = tuple(replace(request, cache_salt=own + request.cache_salt) for request in requests)
        return requests

    def answered(self, num_tokens: int) -> None:
        """So many more are on their way to the client."""
        self.num_tokens += num_tokens
        self.guest.account.charge(num_tokens)

    def log(self, what: str, outcome: str, took_s: float) -> None:
        """One line for each call, of what was asked nothing but its size."""
        _calls.info(
            "%s: %s after %.1f ms", what, outcome, 1000 * took_s,
            extra={
                "call": what, "outcome": outcome, "took_ms": round(1000 * took_s, 1), "key": self.guest.name,
                "prompt_tokens": self.num_prompt_tokens, "generated_tokens": self.num_tokens,
            },
        )  # fmt: skip


VISIT: ContextVar[Visit] = ContextVar("visit")
"""The call that runs in this context, if any."""


def current() -> Visit:
    """The call that runs; outside of one, a call of nobody's."""
    return VISIT.get(None) or Visit.of({})
