"""Clients' bodies and messages through all that judges them: a call comes out, or a refusal in words."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from expertmesh.v1 import inference_pb2 as pb
from google.protobuf.message import DecodeError

from gateway import bodies, inference_wire, scaling
from gateway.config import GatewayConfig
from gateway.errors import BadRequest
from gateway.grpc_errors import status_of
from gateway.validate import Call, Validator
from tests.fuzz.gateway_bodies import BODIES, MESSAGES
from tests.unit.gateway_world import card_of, write_checkpoint

_CONFIG = GatewayConfig(n_max=8, prompts_max=8)
_CONTEXT = 256


@functools.cache
def _validator() -> Validator:
    folder = tempfile.mkdtemp(prefix="expertmesh-fuzz-")
    atexit.register(shutil.rmtree, folder)
    return Validator(card_of(write_checkpoint(Path(folder)), _CONTEXT), _CONFIG, _CONTEXT)


def _judged(read: Callable[[], Any]) -> Any:
    """What `read` made of it; None if it refused. Raises whatever is no refusal, or cannot be told to a client."""
    try:
        return read()
    except BadRequest as error:
        refusal = error
    assert 400 <= refusal.status < 500
    assert len(orjson.dumps(refusal.body())) < 4096, "an answer larger than most questions"
    assert "accepted" in refusal.message or refusal.code == "invalid_json", refusal.message
    assert status_of(refusal).code
    return None


def _check(call: Call | None) -> None:
    """An admitted call lies within all bounds, and can be said to the scheduler."""
    for request in call.requests if call is not None else ():
        assert 1 <= len(request.prompt) < _CONTEXT
        assert 1 <= request.max_tokens <= _CONTEXT - len(request.prompt)
        assert 1 <= request.n <= _CONFIG.n_max
        assert request.min_tokens <= request.max_tokens
        assert 0 <= request.sampling.seed < 2**64
        assert 0 < request.time_s <= _CONFIG.request_s_max


def read_completion(data: bytes) -> None:
    _check(_judged(lambda: _validator().completion(bodies.parse(data, "application/json"))))


def read_chat(data: bytes) -> None:
    _check(_judged(lambda: _validator().chat(bodies.parse(data, "application/json"))))


def read_tokens(data: bytes) -> None:
    for read in (Validator.tokenised, Validator.detokenised):
        answer = _judged(lambda read=read: read(_validator(), bodies.parse(data, "application/json")))
        assert answer is None or orjson.dumps(answer)


def read_order(data: bytes) -> None:
    """To the cluster."""
    for read in (scaling.scale_request, scaling.drain_request):
        asked = _judged(lambda read=read: read(bodies.parse(data, "application/json")))
        assert asked is None or asked.SerializeToString() is not None


def read_message(data: bytes) -> None:
    """Over gRPC: undecodable, or judged as REST's bodies are."""
    try:
        request = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return
    _check(_judged(lambda: inference_wire.call_of(request, _validator())))


def _seeds(*paths: str) -> tuple[bytes, ...]:
    return tuple(json.dumps(body).encode() for path in paths for body in BODIES[path])


READERS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "completion": (read_completion, _seeds("/v1/completions")),
    "chat": (read_chat, _seeds("/v1/chat/completions")),
    "tokens": (read_tokens, _seeds("/tokenize", "/detokenize")),
    "order": (read_order, _seeds("/v1/admin/scale", "/v1/admin/drain")),
    "message": (
        read_message,
        tuple(m.SerializeToString() for m in MESSAGES["/expertmesh.v1.InferenceService/Generate"]),
    ),
}
