"""The tools a client offers: what the template shows of them, and the kinds of their parameters for the parser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import BadRequest, invalid
from gateway.parsers.arguments import DEPTH_MAX, kinds_of_parameters
from gateway.parsers.calls import Kinds


@dataclass(frozen=True)
class Tool:
    """`function` is the client's own description of it, the template's to show."""

    name: str
    function: dict[str, Any]
    kinds: Kinds

    @property
    def is_strict(self) -> bool:
        return self.function.get("strict") is True


def read_tools(tools: Any, tools_max: int) -> tuple[Tool, ...]:
    """Raises BadRequest naming the tool and its field."""
    if not isinstance(tools, list) or not 1 <= len(tools) <= tools_max:
        raise invalid("tools", tools, f"a list of 1 to {tools_max} tools")
    read = tuple(_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools))
    names: set[str] = set()
    for number, tool in enumerate(read):
        if tool.name in names:
            raise invalid(f"tools[{number}].function.name", tool.name, "a name that no other tool has")
        names.add(tool.name)
    return read


def shown_to_template(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """As templates expect them; None where there are none."""
    return [{"type": "function", "function": tool.function} for tool in tools] or None


def forced_by(choice: Any, offered: Sequence[Tool]) -> tuple[Tool, ...]:
    """Those of which one must be called; none where none must. Raises BadRequest."""
    if choice in (None, "none", "auto"):
        return ()
    if choice == "required":
        return tuple(offered)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict):
        accepted = 'none, auto, required, or {"type": "function", "function": {"name": …}}'
        raise invalid("tool_choice", choice, accepted)
    found = tuple(tool for tool in offered if tool.name == function.get("name"))
    if not found:
        names = ", ".join(tool.name for tool in offered[:16])
        raise invalid("tool_choice.function.name", function.get("name"), f"a tool that is offered: {names}")
    return found


def _tool(tool: Any, at: str) -> Tool:
    if not isinstance(tool, dict):
        raise invalid(at, tool, "an object with type and function")
    if tool.get("type") != "function":
        raise invalid(f"{at}.type", tool.get("type"), '"function"')
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{at}.function", function, "an object with name, description and parameters")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not re.fullmatch(r"[^\s\"'<>]{1,128}", name):
        raise invalid(f"{at}.function.name", name, "1 to 128 characters, no quotes, angle brackets or white space")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{at}.function.parameters", parameters, "a JSON Schema of type object")
    try:
        return Tool(name, function, kinds_of_parameters(parameters or {}))
    except ValueError:
        raise BadRequest(
            f"{at}.function.parameters is nested too deep; accepted: at most {DEPTH_MAX} levels of schemas",
            param=f"{at}.function.parameters",
        ) from None
