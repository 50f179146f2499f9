"""A call that was admitted, on its way to its client through either face: text and tokens as they come, counted.

However it ends, `close` cancels what it still has open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from gateway.errors import ClientGone, Refusal
from gateway.ledger import Generation
from gateway.metrics import Meter
from gateway.openai_types import Usage
from gateway.state import GatewayState
from gateway.text import ChoiceText, Piece, joined
from gateway.validate import Call

_IN_LOOP_BYTES_MAX = 32_768  # larger messages are rendered and tokenised in a thread: 100 KB take some 30 ms

Result = TypeVar("Result")


async def beside(size_bytes: int, work: Callable[[], Result]) -> Result:
    """The result of `work` on a message of this size: in a thread where it would hold up everyone's streams."""
    return work() if size_bytes <= _IN_LOOP_BYTES_MAX else await asyncio.to_thread(work)


class Running:
    def __init__(
        self,
        state: GatewayState,
        call: Call,
        generation: Generation,
        meter: Meter,
        marked: frozenset[int] = frozenset(),
    ) -> None:
        """`marked`: tokens whose places in the text are wanted."""
        self.usage = Usage(call.num_prompt_tokens)
        self._card = state.card
        self._call = call
        self._generation = generation
        self._meter = meter
        self._marked = marked
        self._cached: dict[str, int] = {}  # by request: the fewest of its choices' tokens

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text and tokens as they come; a stop string ends its choice at the worker, too."""
        card, texts = self._card, dict[int, ChoiceText]()
        async for choice, delta in self._generation:
            if choice not in texts:
                request = self._call.request_of(choice)
                texts[choice] = ChoiceText(choice, request, card.tokens, card.eos, self._marked)
                self._count_cached(request.request_id, delta.num_cached)
            piece = texts[choice].take(delta)
            if piece.finish is not None and delta.finish is None:
                self._generation.finish(choice, delta.position + len(piece.tokens) - 1)
            self.usage.completion_tokens += len(piece.tokens)
            if piece.tokens:
                self._meter.tokens(choice, len(piece.tokens))
            yield piece

    async def choices(self) -> list[Piece]:
        """Every choice, whole, in order."""
        choices: dict[int, list[Piece]] = {}
        async for piece in self.pieces():
            choices.setdefault(piece.choice, []).append(piece)
        return [joined(choices[choice]) for choice in sorted(choices)]

    def _count_cached(self, request_id: str, num_cached: int) -> None:
        """A choice's first tokens are here. Its siblings have the same prompt, which is billed once."""
        self._cached[request_id] = min(num_cached, self._cached.get(request_id, num_cached))
        self.usage.cached_tokens = sum(self._cached.values())

    def close(self) -> None:
        """Idempotent."""
        self._generation.close()


def outcome(error: BaseException) -> str:
    """What a call that ended so is counted as."""
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return "hung_up"
    return str(error.status) if isinstance(error, Refusal) else "500"
