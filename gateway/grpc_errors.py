"""The gateway's refusals as gRPC statuses, and the one place where a call's failure becomes one.

A status has REST's message, and google.rpc details: ErrorInfo with REST's code as its reason, BadRequest with the
field at fault, RetryInfo where a time to come back is known.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from gateway import errors
from gateway.errors import BadRequest, ClientGone, Refusal

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_DOMAIN = "expertmesh"
_HEADERS_S_MAX = 5.0  # for what waits for no reader, only for the socket
_MESSAGE_CHARS_MAX = 300  # written twice, percent-encoded and in base64: what clients read of metadata is 8 KiB

CODES: dict[type[Refusal], grpc.StatusCode] = {
    errors.BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthorized: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.TooSlow: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.BodyTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ClientGone: grpc.StatusCode.CANCELLED,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Refusal: grpc.StatusCode.INTERNAL,
}
"""Of a class and those below it that have none of their own."""


def status_of(error: Refusal) -> status_pb2.Status:
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    text = error.message[:_MESSAGE_CHARS_MAX]
    details: list[message.Message] = [error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=_DOMAIN)]
    if isinstance(error, BadRequest) and error.param:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=code.value[0], message=text, details=[_packed(detail) for detail in details])


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


async def abort(context: Context, error: Refusal) -> NoReturn:
    status = rpc_status.to_status(status_of(error))
    ours = context.trailing_metadata() or ()  # the call's name: what comes with a status takes its place
    await context.abort(status.code, status.details, (*ours, *status.trailing_metadata))
    raise AssertionError("abort raises")


async def begin(context: Context) -> None:
    """A stream's headers, before its first message. Never cut off: until they are known to be sent the library
    would send them again with a status, which fails, and leave the client to wait for ever. Raises ClientGone."""
    sending = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.wait({sending})
    except asyncio.CancelledError:
        await asyncio.wait({sending}, timeout=_HEADERS_S_MAX)
        if sending.done():
            sending.exception()  # known to have been: there is nobody to tell any more
        raise
    try:
        sending.result()
    except grpc.aio.InternalError as error:
        raise ClientGone("the client hung up") from error


async def write(context: Context, message: Any, stall_s_max: float) -> None:
    """One message of a stream. Raises ClientGone where its client does not read."""
    try:
        async with asyncio.timeout(stall_s_max):
            await context.write(message)
    except TimeoutError:
        raise ClientGone("the client does not read") from None
    except grpc.aio.InternalError as error:
        raise ClientGone("the client hung up") from error


Behaviour = Callable[[Any, Context], Awaitable[Any]]


def told(behaviour: Behaviour) -> Behaviour:
    """`behaviour`, with whatever it raises told to the client as a status: a foreign exception as INTERNAL."""

    async def answered(request: Any, context: Context) -> Any:
        try:
            return await behaviour(request, context)
        except Refusal as error:
            refusal = error
        except Exception:
            # Whatever it is, the client must not read it; the log has it.
            _log.exception("a gRPC call failed")
            refusal = Refusal("internal error")
        return await abort(context, refusal)

    return answered
