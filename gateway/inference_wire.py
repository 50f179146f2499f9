"""Between the messages of InferenceService and the gateway's values.

Requests become the bodies that REST's clients send, so that one validator with one set of defaults and limits
judges both; the options have REST's names for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from expertmesh.v1 import inference_pb2
from google.protobuf.message import Message

from gateway.errors import BadRequest
from gateway.model_card import ModelCard
from gateway.openai_types import Usage
from gateway.request import FinishReason
from gateway.text import Piece
from gateway.validate import Call, Validator

AnyGenerate: TypeAlias = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest

_FINISH = {
    None: inference_pb2.CHOICE_FINISH_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.CHOICE_FINISH_STOP,
    FinishReason.LENGTH: inference_pb2.CHOICE_FINISH_LENGTH,
}


def call_of(request: AnyGenerate, validator: Validator) -> Call:
    """Raises BadRequest or NotFound."""
    body = _model(request.model) | _present(request.options)
    match request.WhichOneof("prompt"):
        case "text":
            return validator.completion({**body, "prompt": request.text})
        case "tokens":
            return validator.completion({**body, "prompt": list(request.tokens.ids)})
        case "chat":
            top = body.pop("logprobs", None)
            logprobs = {} if top is None else {"logprobs": True, "top_logprobs": top}
            return validator.chat({**body, **logprobs, "messages": _messages(request.chat)})
        case _:
            raise _no_prompt("text, tokens or chat")


def may_have_grammar(request: AnyGenerate) -> bool:
    """Whether an answer may be held to one, which takes time to compile."""
    options = request.options
    return bool(options.guided_json or options.guided_regex or options.guided_choice or options.guided_grammar)


def tokenize_body(request: inference_pb2.TokenizeRequest) -> dict[str, Any]:
    """Raises BadRequest."""
    match request.WhichOneof("prompt"):
        case "text":
            return {**_model(request.model), "prompt": request.text}
        case "chat":
            return {**_model(request.model), "messages": _messages(request.chat)}
        case _:
            raise _no_prompt("text or chat")


def detokenize_body(request: inference_pb2.DetokenizeRequest) -> dict[str, Any]:
    return {**_model(request.model), "tokens": list(request.tokens)}


def _model(name: str) -> dict[str, Any]:
    """Left out, it is the served one."""
    return {"model": name} if name else {}


def _no_prompt(accepted: str) -> BadRequest:
    return BadRequest(f"prompt is not set; accepted: {accepted}", param="prompt")


def _messages(chat: inference_pb2.Conversation) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content, **_present(message)} for message in chat.messages]


def _plain(value: Any, is_repeated: bool) -> Any:
    """As JSON has it: an object's keys are strings."""
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    return list(value) if is_repeated else value


def _present(message: Message) -> dict[str, Any]:
    """The fields that were set, by name; zero too where a field is optional."""
    return {field.name: _plain(value, field.is_repeated) for field, value in message.ListFields()}


def chunk(name: str, piece: Piece, position: int) -> inference_pb2.GenerateStreamResponse:
    return inference_pb2.GenerateStreamResponse(request_id=name, choice=choice(piece, position))


def prompt_chunk(name: str, call: Call, piece: Piece) -> inference_pb2.GenerateStreamResponse:
    return inference_pb2.GenerateStreamResponse(request_id=name, prompt_logprobs=prompt_logprobs(call, piece))


def last_chunk(name: str, counts: Usage) -> inference_pb2.GenerateStreamResponse:
    return inference_pb2.GenerateStreamResponse(request_id=name, usage=usage(counts))


def prompt_logprobs(call: Call, piece: Piece) -> list[inference_pb2.PromptTokenLogprobs]:
    """Of the prompt's second token on, where asked for."""
    return [
        inference_pb2.PromptTokenLogprobs(
            token_id=token, logprob=score.logprob, rank=score.rank, top=_top(score.top)
        )
        for token, score in zip(call.requests[0].prompt[1:], piece.prompt_logprobs, strict=False)
    ]


def choice(piece: Piece, position: int) -> inference_pb2.Choice:
    """`position`: of the piece's first token in its choice."""
    message = inference_pb2.Choice(
        index=piece.choice,
        position=position,
        text=piece.text,
        token_ids=piece.tokens,
        logprobs=_logprobs(piece),
        finish=_FINISH[piece.finish],
    )
    if isinstance(piece.stop_reason, str):
        message.stop_string = piece.stop_reason
    elif piece.stop_reason is not None:
        message.stop_token_id = piece.stop_reason
    return message


def _logprobs(piece: Piece) -> list[inference_pb2.TokenLogprobs]:
    tops: Sequence[tuple[tuple[int, float], ...]] = piece.top_logprobs or [()] * len(piece.logprobs)
    return [
        inference_pb2.TokenLogprobs(logprob=logprob, top=_top(top))
        for logprob, top in zip(piece.logprobs, tops, strict=True)
    ]


def _top(pairs: Sequence[tuple[int, float]]) -> list[inference_pb2.TokenLogprob]:
    return [inference_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in pairs]


def usage(counts: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        cached_tokens=counts.cached_tokens,
    )


def model(card: ModelCard, model_len_max: int) -> inference_pb2.Model:
    return inference_pb2.Model(
        name=card.name, created=card.created, max_model_len=model_len_max, fingerprint=card.fingerprint
    )
