"""The HTTP application: routes, keys, request ids, and errors in OpenAI's shape. Holds no request state."""

from __future__ import annotations

import logging
import time
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import openai_types
from gateway.answer import answer, answer_at_once
from gateway.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.chat import ChatDialect
from gateway.completions import CompletionDialect
from gateway.errors import BadRequest, Forbidden, NotFound, NotReady, Refusal, shown
from gateway.openapi import OPEN_PATHS, describe
from gateway.prompts import unknown_model
from gateway.scaling import drain_request, resize_from_body, scale_request
from gateway.state import GatewayState
from gateway.stream import EventStream, told
from gateway.traces import trace_document, trace_seconds
from gateway.validate import Validator
from gateway.visit import VISIT, Visit

_log = logging.getLogger(__name__)


def create_app(state: GatewayState) -> FastAPI:
    """The application for one gateway. Works with any ASGI server; `gateway.http_server` runs it."""
    app = FastAPI(title="ExpertMesh", version=state.version, docs_url=None, redoc_url=None)
    app.add_middleware(FrontDoor, state=state)
    if state.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-expertmesh-ignored-fields"],
        )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    _add_generating(app, state)
    _add_tokenising(app, state)
    _add_models(app, state)
    _add_operating(app, state)
    describe(app)
    return app


def _add_generating(app: FastAPI, state: GatewayState) -> None:
    @app.post("/v1/completions", openapi_extra=_documented(CompletionBody))
    async def completions(request: Request) -> Response:
        return await answer(state, request, "completions", Validator.completion, CompletionDialect)

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await answer(state, request, "chat", Validator.chat, ChatDialect)


def _add_tokenising(app: FastAPI, state: GatewayState) -> None:
    @app.post("/tokenize", openapi_extra=_documented(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        return await answer_at_once(state, request, "tokenize", Validator.tokenised)

    @app.post("/detokenize", openapi_extra=_documented(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        return await answer_at_once(state, request, "detokenize", Validator.detokenised)


def _add_models(app: FastAPI, state: GatewayState) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [openai_types.model(state.card, state.model_len_max)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != state.card.name:
            raise unknown_model(name, state.card)
        return JSONResponse(openai_types.model(state.card, state.model_len_max))


def _add_operating(app: FastAPI, state: GatewayState) -> None:
    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/ready")
    async def ready() -> Response:
        if state.not_ready:
            raise NotReady(state.not_ready, retry_after_s=state.config.retry_after_s)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": state.version})

    @app.get("/v1/admin/status")
    async def status() -> Response:
        return JSONResponse(await state.asked(state.status()))

    @app.get("/v1/admin/events")
    async def events() -> Response:
        changes = state.watch.events()
        return EventStream(told(changes), {}, state.config.client_stall_s_max, lambda _stayed: None)

    @app.get("/v1/admin/trace")
    async def trace(request: Request) -> Response:
        seconds = trace_seconds(request.query_params)
        return JSONResponse(trace_document(await state.asked(state.trace(seconds))))

    @app.post("/v1/admin/scale")
    async def scale(request: Request) -> Response:
        return JSONResponse(await resize_from_body(state, request, scale_request))

    @app.post("/v1/admin/drain")
    async def drain(request: Request) -> Response:
        return JSONResponse(await resize_from_body(state, request, drain_request))


class FrontDoor:
    """Around the application: who may enter and how often, the call's name in every answer, a line in the log, and
    no foreign exception out."""

    def __init__(self, app: ASGIApp, state: GatewayState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began_s, status = Headers(scope=scope), time.monotonic(), 0
        visit = Visit.of(headers)
        VISIT.set(visit)

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(visit.headers())
            await send(message)

        try:
            if scope["path"] in OPEN_PATHS:
                await self._app(scope, receive, named)
                return
            self._admit(visit, scope, headers)
            with visit.open():
                await self._app(scope, receive, named)
        except Refusal as error:
            await _error_response(error)(scope, receive, named)
        except Exception:
            _log.exception("request %s failed", visit.name)
            if status:
                raise
            await _error_response(Refusal("internal error"))(scope, receive, named)
        finally:
            if scope["path"] not in OPEN_PATHS:
                what = f"{scope['method']} {_route(scope)}"
                visit.log(what, str(status or "hung_up"), time.monotonic() - began_s)

    def _admit(self, visit: Visit, scope: Scope, headers: Headers) -> None:
        """Raises Unauthorized or Forbidden. Browsers send what any page has them send, and say whose it is."""
        is_admin = scope["path"].startswith("/v1/admin")
        keys = headers.get("authorization", ""), headers.get("x-api-key", "")
        visit.guest = self._state.keeper.admit(*keys, is_admin=is_admin)
        origin, accepted = headers.get("origin"), self._state.config.cors_origins
        own = f"{scope['scheme']}://{headers.get('host', '')}"
        if origin not in (None, own, *accepted) and "*" not in accepted:
            raise Forbidden(
                f"Origin is {shown(origin)}; accepted: {', '.join(accepted) or 'none'} (gateway.cors_origins)",
                code="origin_not_allowed",
            )


def _route(scope: Scope) -> str:
    """The path where it is one of ours; what else a client wrote has no place in a log."""
    route = scope.get("route")
    return str(route.path) if route is not None else "(no route)"


def _error_response(error: Refusal) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error_response(NotFound(f"there is no {request.url.path}"))
    refusal = BadRequest(f"{request.method} {request.url.path}: {error.detail}", code="method_not_allowed")
    return JSONResponse(refusal.body(), status_code=error.status_code, headers=error.headers)


def _documented(body: type[Body]) -> dict[str, Any]:
    """The body's schema for /openapi.json; validation is ours, so that errors are."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
