"""What stands between `<minimax:tool_call>` and its end: invokes with their parameters, as calls with arguments.

Incremental: text goes in as it comes, arguments come out as soon as they are certain, a string's characters one
by one; all that came out so far is a beginning of the arguments' JSON. Values are taken verbatim.

- A value ends at `</parameter>`. Where that is missing, the next `<parameter name=` ends it, or `</invoke>`, or
  the block's end, and the line break before those is layout.
- An invoke without `</invoke>` ends at the next one or with the block.
- Of two parameters of one name the first holds.
- An invoke of a tool that was not offered is no call, and neither is other text: they are content, as written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.parsers.arguments import STRING, as_json, string_as_json
from gateway.parsers.overlap import overlap

_HEADER_CHARS_MAX = 512  # of a tag with a name; longer ones are text
_HEADER = r"""<{0}\s+name\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)'|([^\s"'<>]+))\s*>"""
_INVOKE, _PARAMETER = re.compile(_HEADER.format("invoke")), re.compile(_HEADER.format("parameter"))
_STRIDE = 1024
_INVOKE_END, _VALUE_END = "</invoke>", "</parameter>"
_VALUE_ENDS = (_VALUE_END, "\n<parameter name=", "<parameter name=", "\n" + _INVOKE_END, _INVOKE_END)

Kinds = Mapping[str, frozenset[str]]
"""Kinds of JSON value by parameter."""


@dataclass
class CallDelta:
    """More of one call. `name` comes once, with the first."""

    index: int
    name: str | None
    arguments: str


@dataclass
class Said:
    """More text, of a thought or of the content."""

    is_thought: bool
    text: str


@dataclass
class Parsed:
    """What a piece of an answer says, in order."""

    parts: list[Said | CallDelta] = field(default_factory=list)

    def say(self, text: str, *, is_thought: bool = False) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Said) and last.is_thought == is_thought:
            last.text += text
        elif text:
            self.parts.append(Said(is_thought, text))

    def call(self, index: int, arguments: str, name: str | None = None) -> None:
        if self.calls and self.calls[-1].index == index:
            self.calls[-1].arguments += arguments
        else:
            self.parts.append(CallDelta(index, name, arguments))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Said) and part.is_thought)

    @property
    def content(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Said) and not part.is_thought)

    @property
    def calls(self) -> list[CallDelta]:
        return [part for part in self.parts if isinstance(part, CallDelta)]


def key_of(part: Said | CallDelta) -> str:
    """The same for parts that go on with what the one before said."""
    if isinstance(part, CallDelta):
        return f"call {part.index}"
    return "thought" if part.is_thought else "content"


class CallParser:
    """All blocks of one answer, in turn."""

    def __init__(self, tools: Mapping[str, Kinds], calls_max: int | None = None) -> None:
        """`calls_max`: further calls are read and dropped; None: as many as come."""
        self._tools = tools
        self._calls_max = calls_max
        self._text = ""  # not understood yet
        self._stray: list[str] = []  # content, if it turns out to be more than layout
        self._read: Callable[[Parsed], bool] = self._between
        self._kinds: Kinds = {}  # of the call being read
        self._value_kinds = STRING
        self._value: list[str] = []  # of a parameter that is not a string alone
        self._names: set[str] = set()  # of the call's parameters so far
        self._is_repeated = False
        self._begun = 0
        self.num_complete = 0

    def take(self, text: str, out: Parsed) -> None:
        for start in range(0, len(text), _STRIDE):  # so that what is cut off the front is cut off little
            self._text += text[start : start + _STRIDE]
            while self._read(out):
                pass

    def close(self, out: Parsed) -> None:
        """The block ends: so does all that is open in it."""
        if self._read == self._in_value:
            self._add_to_value("" if self._text == "\n" else self._text, out)
            self._end_value(out)
        elif self._read != self._in_call:
            self._stray.append(self._text)
        if self._read == self._in_call:
            self._end_call(out)
        self._text = ""
        self._read = self._between
        self._give_stray(out)

    def cut(self, out: Parsed) -> None:
        """The answer breaks off here: what is open stays open, half a tag is not shown."""
        self._give_stray(out)

    # --- states: each reads on from `_text`; False: it needs more ------------------------------

    def _between(self, out: Parsed) -> bool:
        """Invokes are looked for."""
        at = self._text.find("<invoke")
        if at < 0:
            self._stray.append(self._taken(len(self._text) - overlap(self._text, "<invoke")))
            return False
        self._stray.append(self._taken(at))
        name = self._header(_INVOKE)
        if name is None:
            return False
        if name == "":
            self._stray.append(self._taken(1))
        elif name not in self._tools:
            self._read = self._in_stranger
        else:
            self._give_stray(out)
            self._taken(self._text.index(">") + 1)
            self._begin_call(name, out)
        return True

    def _in_stranger(self, _out: Parsed) -> bool:
        """An invoke of an unknown tool, header included: content up to its end."""
        at = self._text.find(_INVOKE_END)
        if at < 0:
            self._stray.append(self._taken(len(self._text) - overlap(self._text, _INVOKE_END)))
            return False
        self._stray.append(self._taken(at + len(_INVOKE_END)))
        self._read = self._between
        return True

    def _in_call(self, out: Parsed) -> bool:
        """Parameters are looked for; other text has no place in a call."""
        at = self._text.find("<")
        self._taken(at if at >= 0 else len(self._text))
        for tag in (_INVOKE_END, "<invoke", "<parameter"):
            if self._text.startswith(tag):
                break
            if tag.startswith(self._text):
                return False
        else:
            self._taken(1)
            return True
        if tag == _INVOKE_END:
            self._taken(len(tag))
        if tag != "<parameter":
            self._end_call(out)
            return True
        name = self._header(_PARAMETER)
        if name is None:
            return False
        self._taken(1 if name == "" else self._text.index(">") + 1)
        if name:
            self._begin_value(name, out)
        return True

    def _in_value(self, out: Parsed) -> bool:
        found = [(at, end) for end in _VALUE_ENDS if (at := self._text.find(end)) >= 0]
        if not found:
            keep = max(overlap(self._text, end) for end in _VALUE_ENDS)
            self._add_to_value(self._taken(len(self._text) - keep), out)
            return False
        at, end = min(found)
        self._add_to_value(self._taken(at), out)
        if end == _VALUE_END:
            self._taken(len(end))
        self._end_value(out)
        return True

    # --- what they find ------------------------------------------------------------------------

    def _begin_call(self, name: str, out: Parsed) -> None:
        self._kinds, self._names = self._tools[name], set()
        self._begun += 1
        self._read = self._in_call
        self._give("", out, name)

    def _end_call(self, out: Parsed) -> None:
        self._give("}" if self._names else "{}", out)
        self.num_complete += 1
        self._read = self._between

    def _begin_value(self, name: str, out: Parsed) -> None:
        self._is_repeated = name in self._names
        self._value_kinds, self._value = self._kinds.get(name, STRING), []
        self._read = self._in_value
        if not self._is_repeated:
            opening = ", " if self._names else "{"
            quote = '"' if self._value_kinds == STRING else ""
            self._names.add(name)
            self._give(f'{opening}"{string_as_json(name)}": {quote}', out)

    def _add_to_value(self, text: str, out: Parsed) -> None:
        if self._is_repeated:
            return
        if self._value_kinds == STRING:
            self._give(string_as_json(text), out)
        else:
            self._value.append(text)

    def _end_value(self, out: Parsed) -> None:
        self._read = self._in_call
        if not self._is_repeated:
            value = "".join(self._value)
            self._give('"' if self._value_kinds == STRING else as_json(value, self._value_kinds), out)

    def _give(self, arguments: str, out: Parsed, name: str | None = None) -> None:
        if (arguments or name) and (self._calls_max is None or self._begun <= self._calls_max):
            out.call(self._begun - 1, arguments, name)

    def _give_stray(self, out: Parsed) -> None:
        stray = "".join(self._stray)
        self._stray.clear()
        out.say(stray if stray.strip() else "")

    def _taken(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _header(self, pattern: re.Pattern[str]) -> str | None:
        """The name in the tag that `_text` begins with; "": it is no such tag; None: more must come."""
        end = self._text.find(">", 0, _HEADER_CHARS_MAX)
        if end < 0:
            return "" if len(self._text) >= _HEADER_CHARS_MAX else None
        found = pattern.fullmatch(self._text[: end + 1])
        return next(filter(None, found.groups()), "") if found else ""
