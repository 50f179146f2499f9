"""One answer of the family, token by token: what is thought, what is said, and which tools are called.

    reasoning </think> content <minimax:tool_call> calls </minimax:tool_call>

An answer begins inside a thought where its prompt ends in one. `<minimax:tool_call>` ends a thought too; where no
tools were offered it is then text. `<think>` opens a thought before anything else is said. A tag anywhere else is
text, and nothing is lost.

The line breaks that the chat template writes around the tags are layout, not text: one before `</think>` and after
`<think>`, two after `</think>`, one before `<minimax:tool_call>`; after calls, all white space. So an answer that
is sent back becomes the very prompt that it was generated as.

Pure: pieces cut anywhere say the same together as the whole.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

from gateway.parsers.calls import CallParser, Kinds, Parsed
from gateway.parsers.tags import Mark, Tags

_ANY = -1  # leading line breaks to drop: all white space


class _Part(enum.Enum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALLS = "calls"


class AnswerParser:
    def __init__(
        self, tags: Tags, tools: Mapping[str, Kinds], *, in_thought: bool, calls_max: int | None = None
    ) -> None:
        """`tools`: those offered, by name; without any, calls are text. `in_thought`: how the prompt ends."""
        self._tags = tags
        self._calls = CallParser(tools, calls_max) if tools else None
        self._part = _Part.REASONING if in_thought else _Part.CONTENT
        self._drop = 0  # line breaks that may still be dropped before text
        self._line_break = ""  # held back: layout if a tag follows
        self._has_said = False  # anything but white space in this part
        self._thought_from = 0  # place of this thought's first token
        self._num_thought = 0  # tokens of thoughts that have ended

    @property
    def num_calls(self) -> int:
        """Those that are complete."""
        return self._calls.num_complete if self._calls is not None else 0

    def num_reasoning_tokens(self, num_tokens: int) -> int:
        """Of the first `num_tokens` of the answer, tags not counted."""
        open_ones = max(0, num_tokens - self._thought_from) if self._part is _Part.REASONING else 0
        return self._num_thought + open_ones

    def take(self, text: str, marks: Sequence[Mark], out: Parsed) -> None:
        """Read on; `marks` are the tags that lie in `text`, in order."""
        done = 0
        for mark in marks:
            self._say(text[done : mark.start], out)
            if not self._turn(mark, out):
                self._say(text[mark.start : mark.end], out)
            done = mark.end
        self._say(text[done:], out)

    def end(self, out: Parsed, *, is_cut: bool) -> None:
        """Nothing more comes. `is_cut`: by a limit or a stop string; otherwise the model ended it."""
        if self._part is _Part.CALLS and self._calls is not None:
            (self._calls.cut if is_cut else self._calls.close)(out)
        else:
            self._give(self._line_break, out)
        self._line_break = ""

    def _turn(self, mark: Mark, out: Parsed) -> bool:
        """What a tag means here; False: nothing, it is text."""
        tags, part, token = self._tags, self._part, mark.token
        if part is _Part.CALLS:
            if token != tags.calls_end or self._calls is None:
                return False
            self._calls.close(out)
            self._enter(_Part.CONTENT, _ANY)
        elif token == tags.think and not self._has_said:
            self._give(self._line_break if part is _Part.CONTENT else "", out)
            self._leave_thought(mark)
            self._thought_from = mark.position + 1
            self._enter(_Part.REASONING, 1)
        elif token == tags.think_end and part is _Part.REASONING:
            self._leave_thought(mark)
            self._enter(_Part.CONTENT, 2)
        elif token == tags.calls and self._calls is not None:
            self._leave_thought(mark)
            self._enter(_Part.CALLS, 0)
        elif token == tags.calls and part is _Part.REASONING:
            self._leave_thought(mark)
            self._enter(_Part.CONTENT, 0)
            return False
        else:
            return False
        return True

    def _leave_thought(self, mark: Mark) -> None:
        if self._part is _Part.REASONING:
            self._num_thought += max(0, mark.position - self._thought_from)

    def _enter(self, part: _Part, drop: int) -> None:
        self._part, self._drop = part, drop
        self._line_break, self._has_said = "", False

    def _say(self, text: str, out: Parsed) -> None:
        if self._part is _Part.CALLS and self._calls is not None:
            self._calls.take(text, out)
            return
        text = self._without_layout(text)
        if not text:
            return
        self._has_said = self._has_said or not text.isspace()
        text = self._line_break + text
        self._line_break = "\n" if text.endswith("\n") else ""
        self._give(text[: len(text) - len(self._line_break)], out)

    def _without_layout(self, text: str) -> str:
        if self._drop == _ANY:
            text = text.lstrip()
        while self._drop > 0 and text.startswith("\n"):
            text, self._drop = text[1:], self._drop - 1
        if text:
            self._drop = 0
        return text

    def _give(self, text: str, out: Parsed) -> None:
        out.say(text, is_thought=self._part is _Part.REASONING)
