"""LiteLLM against a gateway, as its users write it: python client_litellm.py URL. Prints what it saw, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

URL = sys.argv[1]
MESSAGES = [{"role": "user", "content": "Weather in Cologne?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Köln"]}, "is_dry": {"type": "boolean"}},
    "required": ["city", "is_dry"],
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


def by(provider: str) -> dict[str, Any]:
    base = f"{URL}/v1" if provider == "openai" else URL
    return {"model": f"{provider}/tiny", "api_base": base, "api_key": "none", "messages": MESSAGES}


def main() -> None:
    seen: dict[str, Any] = {}
    for provider in ("openai", "anthropic"):
        called = litellm.completion(
            **by(provider), max_tokens=400, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
        )
        (call,) = called.choices[0].message.tool_calls
        seen[provider] = {
            "tool": [call.function.name, json.loads(call.function.arguments)],
            "finish_reason": called.choices[0].finish_reason,
            "thought": bool(called.choices[0].message.reasoning_content),
        }
        chunks = list(litellm.completion(**by(provider), max_tokens=30, stream=True))
        whole = litellm.stream_chunk_builder(chunks)
        seen[provider]["streamed"] = len(chunks)
        seen[provider]["stream_end"] = whole.choices[0].finish_reason
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
