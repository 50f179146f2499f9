"""LangChain's ChatOpenAI against a gateway: python client_langchain.py URL. Prints what it saw, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

URL = sys.argv[1]


class Weather(BaseModel):
    """The weather somewhere."""

    city: Literal["Bonn", "Köln"]
    is_dry: bool


@tool
def look_up(city: Literal["Bonn", "Köln"]) -> str:
    """Looks up the weather."""
    return f"sun in {city}"


def main() -> None:
    seen: dict[str, Any] = {}
    question = HumanMessage("Weather in Cologne?")
    for name, uses_responses in (("chat", False), ("responses", True)):
        model = ChatOpenAI(
            model="tiny", base_url=f"{URL}/v1", api_key="none", max_retries=0, max_tokens=400,
            use_responses_api=uses_responses,
        )  # fmt: skip
        called = model.bind_tools([look_up], tool_choice="required", parallel_tool_calls=False).invoke([question])
        (call,) = called.tool_calls
        result = ToolMessage(look_up.invoke(call["args"]), tool_call_id=call["id"])
        short = model.model_copy(update={"max_tokens": 8})
        final = short.bind_tools([look_up]).invoke([question, called, result])
        parsed = model.with_structured_output(Weather, method="json_schema").invoke([question])
        pieces = list(short.stream([question]))
        seen[name] = {
            "tool": [call["name"], call["args"]],
            "final_tokens": final.usage_metadata["output_tokens"],
            "parsed": parsed.model_dump(),
            "pieces": len(pieces),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
