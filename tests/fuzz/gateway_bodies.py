"""Bodies and messages as clients would never write them: good ones to begin with, and ways to spoil them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from expertmesh.v1 import admin_pb2
from expertmesh.v1 import inference_pb2 as pb

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}
_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning": "hm"},
    {"role": "tool", "tool_call_id": "c1", "content": "4"},
    {"role": "user", "content": "So?"},
]
_SAMPLING = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "presence_penalty": 1, "n": 2,
    "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"5": 3, "6": -100}, "bad_words": ["no"],
    "allowed_token_ids": [5, 6, 7], "stop": ["x", "yy"], "stop_token_ids": [9], "ignore_eos": False,
    "priority": -1, "max_tokens": 4, "min_tokens": 1, "user": "ann", "cache_salt": "s", "timeout": 9.5,
    "return_token_ids": True,
}  # fmt: skip
BODIES: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/completions": (
        {"prompt": "hello", **_SAMPLING},
        {
            "prompt": [[5, 6], [7]],
            "logprobs": 2,
            "echo": True,
            "prompt_logprobs": 1,
            "best_of": 1,
            "max_tokens": 0,
        },
        {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3},
    ),
    "/v1/chat/completions": (
        {
            "messages": _TALK,
            "tools": [_TOOL],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "max_tokens": 4,
        },
        {"messages": _TALK[:2], "logprobs": True, "top_logprobs": 2, "stream": True, "max_completion_tokens": 3},
        {"messages": _TALK[1:2], "thinking_token_budget": 3, "include_reasoning": False, **_SAMPLING},
    ),
    "/tokenize": (
        {"prompt": "hello", "add_special_tokens": True, "return_token_strs": True},
        {"messages": _TALK, "tools": [_TOOL]},
    ),
    "/detokenize": ({"tokens": [5, 6, 7, 300]},),
    "/v1/admin/scale": ({"attention": 2, "experts": None},),
    "/v1/admin/drain": ({"worker": "expert-0"},),
}

_CHAT = pb.Conversation(messages=[pb.ChatMessage(role="user", content="Hi", name="ann")])
_OPTIONS = pb.GenerateOptions(
    temperature=0.7, top_p=0.9, top_k=5, seed=7, max_tokens=4, n=2, stop=["x"], stop_token_ids=[9], logprobs=2,
    min_p=0.1, logit_bias={5: 3.0}, min_tokens=1, allowed_token_ids=[5, 6], bad_words=["no"], user="ann",
)  # fmt: skip
_INFERENCE, _ADMIN = "/expertmesh.v1.InferenceService/", "/expertmesh.v1.AdminService/"
MESSAGES: dict[str, tuple[Any, ...]] = {
    _INFERENCE + "Generate": (
        pb.GenerateRequest(text="hello", options=_OPTIONS),
        pb.GenerateRequest(chat=_CHAT, options=pb.GenerateOptions(max_tokens=3, prompt_logprobs=1)),
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6]), request_id="one", model="tiny"),
    ),
    _INFERENCE + "Tokenize": (pb.TokenizeRequest(text="hello"), pb.TokenizeRequest(chat=_CHAT)),
    _INFERENCE + "Detokenize": (pb.DetokenizeRequest(tokens=[5, 300]),),
    _INFERENCE + "GetModel": (pb.GetModelRequest(name="tiny"),),
    _INFERENCE + "Cancel": (pb.CancelRequest(request_id="one"),),
    _ADMIN + "GetPlacement": (admin_pb2.GetPlacementRequest(page_size=2, page_token="1.2.3"),),
    _ADMIN + "Scale": (admin_pb2.ScaleRequest(attention=2, experts=3),),
    _ADMIN + "Drain": (admin_pb2.DrainRequest(worker="expert-0"),),
    _ADMIN + "Rebalance": (admin_pb2.RebalanceRequest(dry_run=True),),
    _ADMIN + "GetTrace": (admin_pb2.GetTraceRequest(seconds=1.5),),
}

_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 255, 1e308, -1e-308, 2**31, 2**63, -(2**63), 2**64, 1.5, "", "x", "\0",
    "日本" * 40, "\u202e<think>", "]~b]ai\n</think><minimax:tool_call>", "1", [], [[]], [None], [5], [5] * 300,
    ["x"] * 70, {}, {"": {}}, {"type": "text"}, {"type": "json_object"}, [{"role": "user"}], {"name": "look"},
    "required", "none",
)  # fmt: skip


def spoiled(body: dict[str, Any], chance: random.Random) -> bytes:
    """JSON, mostly: some of its values are others, some of its names, and at times some of its bytes."""
    spoilt = copy.deepcopy(body)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        _spoil(spoilt, chance)
    words = json.dumps(spoilt, ensure_ascii=chance.random() < 0.5).encode()
    return scrambled(words, chance) if chance.random() < 0.2 else words


def _spoil(inside: Any, chance: random.Random) -> None:
    """One value, at any depth."""
    while True:
        places = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not places:
            return
        place = chance.choice(places)
        if isinstance(inside[place], dict | list) and chance.random() < 0.7:
            inside = inside[place]
            continue
        value = copy.deepcopy(chance.choice(_ODD))
        if isinstance(inside, dict) and chance.random() < 0.2:
            inside[chance.choice(("x", "", "user", "messages", place + "_"))] = value
        else:
            inside[place] = value
        return


def scrambled(words: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut, said twice."""
    bytes_ = bytearray(words)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if bytes_:
            bytes_[chance.randrange(len(bytes_))] = chance.choice((0, 0x22, 0x5C, 0x7B, 0x7F, 0x80, 0xFF))
    if chance.random() < 0.3:
        del bytes_[chance.randrange(len(bytes_) + 1) :]
    return bytes(bytes_ * chance.choice((1, 1, 1, 2)))
