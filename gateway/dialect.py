"""How one API writes a call's answer: what every dialect can say, and how its events are framed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

from gateway.errors import Refusal
from gateway.openai_types import Usage
from gateway.stream import UNNAMED, Framing
from gateway.text import Piece


class Dialect(Protocol):
    """Streamed: opening, chunks of each piece, then closing, or failed where the answer has begun already.

    `marked`: tokens whose places in the text it wants to know.
    """

    marked: frozenset[int]
    framing: ClassVar[Framing] = UNNAMED

    def opening(self) -> Iterable[dict[str, Any]]: ...

    def chunks(self, piece: Piece) -> Iterable[dict[str, Any]]: ...

    def closing(self, usage: Usage) -> Iterable[dict[str, Any]]: ...

    def failed(self, error: Refusal) -> Iterable[dict[str, Any]]:
        yield error.body()

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]: ...
