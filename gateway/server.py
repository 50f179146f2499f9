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

from gateway import elastic, loads, openai_types
from gateway.answer import answer, answer_at_once
from gateway.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gateway.chat import ChatDialect
from gateway.completions import CompletionDialect
from gateway.errors import BadRequest, Forbidden, NotFound, NotReady, Refusal, shown
from gateway.messages import body as messages_body
from gateway.messages.body import CountTokensBody, MessagesBody
from gateway.messages.dialect import MessagesDialect
from gateway.messages.errors import PATH as MESSAGES
from gateway.messages.errors import error_body
from gateway.openapi import OPEN_PATHS, describe, is_for_admins
from gateway.prompts import unknown_model
from gateway.rebalancing import is_dry_run
from gateway.responses import body as responses_body
from gateway.responses.body import ResponsesBody
from gateway.responses.dialect import ResponsesDialect
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
    _add_messages(app, state)
    _add_tokenising(app, state)
    _add_models(app, state)
    _add_probes(app, state)
    _add_operating(app, state)
    _add_elastic(app, state)
    describe(app)
    return app


def _add_generating(app: FastAPI, state: GatewayState) -> None:
    @app.post("/v1/completions", openapi_extra=_documented(CompletionBody))
    async def completions(request: Request) -> Response:
        return await answer(state, request, "completions", Validator.completion, CompletionDialect)

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await answer(state, request, "chat", Validator.chat, ChatDialect)

    @app.post("/v1/responses", openapi_extra=_documented(ResponsesBody))
    async def responses(request: Request) -> Response:
        return await answer(state, request, "responses", responses_body.call_of, ResponsesDialect)


def _add_messages(app: FastAPI, state: GatewayState) -> None:
    @app.post(MESSAGES, openapi_extra=_documented(MessagesBody))
    async def messages(request: Request) -> Response:
        messages_body.check_version(request.headers.get("anthropic-version"))
        return await answer(state, request, "messages", messages_body.call_of, MessagesDialect)

    @app.post(f"{MESSAGES}/count_tokens", openapi_extra=_documented(CountTokensBody))
    async def count_tokens(request: Request) -> Response:
        messages_body.check_version(request.headers.get("anthropic-version"))
        return await answer_at_once(state, request, "count_tokens", messages_body.count_of)


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


def _add_probes(app: FastAPI, state: GatewayState) -> None:
    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
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


def _add_operating(app: FastAPI, state: GatewayState) -> None:
    @app.get("/server_info")
    async def server_info() -> Response:
        limits = state.config.model_dump(mode="json")
        return JSONResponse(loads.server_info(await state.asked(state.status()), state.model_len_max, limits))

    @app.get("/load")
    async def load() -> Response:
        return JSONResponse({"server_load": state.ledger.num_open})

    @app.get("/v1/loads")
    async def cluster_loads(request: Request) -> Response:
        sections, kind = loads.sections_and_format(request.query_params)
        told = loads.loads(await state.asked(state.status()), sections, state.version)
        if kind == "prometheus":
            return Response(loads.exposition(told), headers={"content-type": CONTENT_TYPE_LATEST})
        return JSONResponse(told)

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

    @app.post("/v1/admin/rebalance")
    async def rebalance(request: Request) -> Response:
        return JSONResponse(await state.rebalanced(is_dry_run(request.query_params)))

    @app.post("/v1/admin/scale")
    async def scale(request: Request) -> Response:
        return JSONResponse(await resize_from_body(state, request, scale_request))

    @app.post("/v1/admin/drain")
    async def drain(request: Request) -> Response:
        return JSONResponse(await resize_from_body(state, request, drain_request))


def _add_elastic(app: FastAPI, state: GatewayState) -> None:
    @app.post("/scale_elastic_ep")
    async def scale_elastic_ep(request: Request) -> Response:
        pools = await resize_from_body(state, request, elastic.elastic_request)
        return JSONResponse({"message": "the pools are on their way to these sizes", **pools})

    @app.get("/is_scaling_elastic_ep")
    @app.post("/is_scaling_elastic_ep")
    async def is_scaling_elastic_ep() -> Response:
        return JSONResponse(elastic.elastic_state(await state.asked(state.status())))


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
            await _error_response(error, scope["path"])(scope, receive, named)
        except Exception:
            _log.exception("request %s failed", visit.name)
            if status:
                raise
            await _error_response(Refusal("internal error"), scope["path"])(scope, receive, named)
        finally:
            if scope["path"] not in OPEN_PATHS:
                what = f"{scope['method']} {_route(scope)}"
                visit.log(what, str(status or "hung_up"), time.monotonic() - began_s)

    def _admit(self, visit: Visit, scope: Scope, headers: Headers) -> None:
        """Raises Unauthorized or Forbidden. Browsers send what any page has them send, and say whose it is."""
        is_admin = is_for_admins(scope["path"])
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


def _error_response(error: Refusal, path: str, status: int | None = None) -> Response:
    """In the shape that callers of this path read. `status`: where it is another than the refusal's."""
    is_anthropics = path == MESSAGES or path.startswith(f"{MESSAGES}/")
    body = error_body(error) if is_anthropics else error.body()
    return JSONResponse(body, status_code=status or error.status, headers=error.headers())


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error_response(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _error_response(NotFound(f"there is no {path}"), path)
    refusal = BadRequest(f"{request.method} {path}: {error.detail}", code="method_not_allowed")
    response = _error_response(refusal, path, error.status_code)
    response.headers.update(error.headers or {})
    return response


def _documented(body: type[Body]) -> dict[str, Any]:
    """The body's schema for /openapi.json; validation is ours, so that errors are."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
