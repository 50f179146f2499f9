"""The gateway's error tree. What a client may see is a `Refusal`; nothing else leaves the folder.

GatewayError
├── CannotListen ── PortInUse            before anything is served
├── TlsUnusable                          certificate, key or the CA of clients
├── CheckpointUnreadable                 tokenizer, template or generation defaults
├── MalformedMessage                     a peer inside the cluster sent what cannot be
├── OrderRefused                         a scheduler's order of an older term or for another checkpoint
└── Refusal                              an HTTP status and OpenAI's error body; gRPC's: `grpc_errors`
    ├── BadRequest                       400  what the client did: names field, value, accepted
    │   ├── TooLarge                     400  can never fit
    │   ├── Unauthorized                 401
    │   ├── Forbidden                    403  a key that opens other doors, a page of another origin
    │   ├── NotFound                     404
    │   ├── TooSlow                      408
    │   ├── AlreadyExists                409
    │   ├── BodyTooLarge                 413
    │   ├── NotJson                      415
    │   └── HeadTooLarge                 431
    ├── Overloaded                       429  refused for load
    ├── ClientGone                       499  nobody is listening
    ├── GenerationFailed                 500  the cluster gave a sequence up
    ├── NotReady                         503  no scheduler, no worker, or too long silent
    └── DeadlinePassed                   504  the client's own
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar


class GatewayError(Exception):
    """Root of everything this folder raises on purpose."""


class CannotListen(GatewayError):
    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"cannot listen on {address}: {why}")


class PortInUse(CannotListen):
    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port}", "the port is in use; stop what uses it or choose another")


class TlsUnusable(GatewayError):
    def __init__(self, field: str, file: str, why: str) -> None:
        super().__init__(f"gateway.{field}: {file!r} cannot be used: {why}; accepted: a file in PEM format")


class CheckpointUnreadable(GatewayError):
    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file}: {why}")


class MalformedMessage(GatewayError):
    pass


class OrderRefused(GatewayError):
    pass


class Refusal(GatewayError):
    """Message, the request's field at fault, and when to come back. `status` is HTTP's."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's shape; `code` is a string, as openai-python types it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds; openai-python retries every 5xx unless it is told not to."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


class BadRequest(Refusal):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class TooLarge(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(BadRequest):
    status = 401
    code = "invalid_api_key"


class Forbidden(BadRequest):
    status = 403
    code = "permission_denied"


class NotFound(BadRequest):
    status = 404
    code = "not_found"


class TooSlow(BadRequest):
    status = 408
    code = "request_timeout"


class AlreadyExists(BadRequest):
    status = 409
    code = "already_exists"


class BodyTooLarge(BadRequest):
    status = 413
    code = "request_too_large"


class NotJson(BadRequest):
    status = 415
    code = "unsupported_media_type"


class HeadTooLarge(BadRequest):
    status = 431
    code = "request_headers_too_large"


class Overloaded(Refusal):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class ClientGone(Refusal):
    status = 499
    code = "client_closed_request"


class GenerationFailed(Refusal):
    code = "generation_failed"


class NotReady(Refusal):
    status = 503
    type = "service_unavailable_error"
    code = "not_ready"


class DeadlinePassed(Refusal):
    status = 504
    code = "deadline_exceeded"


def invalid(param: str, value: object, accepted: str) -> BadRequest:
    """The one sentence for a wrong value: the field, what it was, what is accepted."""
    return BadRequest(f"{param} is {shown(value)}; accepted: {accepted}", param=param)


def renamed(error: BadRequest, names: Sequence[tuple[str, str]]) -> BadRequest:
    """The same refusal in the words of another API. `names`: pairs of a field here and there, tried in order."""
    for here, there in names:
        field = re.compile((r"(?<![\w.])" if here[0] != "." else "") + re.escape(here) + r"(?!\w)")
        if error.param is not None and field.search(error.param):
            param = field.sub(there, error.param, count=1)
            error.message = error.message.replace(error.param, param, 1)
            error.param = param
    return error


def shown(value: object) -> str:
    """A value as a short piece of JSON, however large it is."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value):,} items"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > 80:
        return f"{json.dumps(value[:60], ensure_ascii=False)}… ({len(value):,} characters)"
    return json.dumps(value, ensure_ascii=False)


def presentable(text: str) -> str:
    """What of an inner message a client may read: one line, no paths, no addresses, 300 characters."""
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    line = re.sub(r"(?:unix(?:-abstract)?:\S+|(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*)", "<path>", line)
    line = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b", "<address>", line)
    return line[:300]
