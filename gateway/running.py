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
from gateway.prompt_scores import PromptScores, is_wanted
from gateway.request import FinishReason, TokenDelta
from gateway.state import GatewayState
from gateway.text import ChoiceText, Piece, joined
from gateway.validate import Call
from gateway.visit import current

_IN_LOOP_BYTES_MAX = 32_768  # larger messages are rendered and tokenised in a thread: 100 KB take some 30 ms

Result = TypeVar("Result")


async def beside(size_bytes: int, work: Callable[[], Result], *, may_wait: bool = False) -> Result:
    """The result of `work` on a message of this size: in a thread where it would hold up everyone's streams."""
    return await asyncio.to_thread(work) if may_wait or size_bytes > _IN_LOOP_BYTES_MAX else work()


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
        self._visit = current()
        self._marked = marked
        self._cached: dict[str, int] = {}  # by request: the fewest of its choices' tokens
        self._texts: dict[int, ChoiceText] = {}
        self._scores = {r.request_id: PromptScores(r) for r in call.requests if is_wanted(r)}  # not all there yet

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text and tokens as they come; a stop string ends its choice at the worker, too."""
        async for choice, delta in self._generation:
            scores = self._scores.get(self._call.request_of(choice).request_id)
            if scores is None:
                yield self._piece(choice, delta)
                continue
            scores.take(choice, delta)
            if scores.is_complete:
                del self._scores[self._call.request_of(choice).request_id]
                for sibling in self._call.siblings_of(choice):
                    yield Piece(sibling, "", prompt_logprobs=scores.all())
                for waited in scores.waited():
                    yield self._piece(*waited)

    async def choices(self) -> list[Piece]:
        """Every choice, whole, in order."""
        choices: dict[int, list[Piece]] = {}
        async for piece in self.pieces():
            choices.setdefault(piece.choice, []).append(piece)
        return [joined(choices[choice]) for choice in sorted(choices)]

    def _piece(self, choice: int, delta: TokenDelta) -> Piece:
        if choice not in self._texts:
            card, request = self._card, self._call.request_of(choice)
            self._texts[choice] = ChoiceText(choice, request, card.tokens, card.eos, self._marked)
            self._count_cached(request.request_id, delta.num_cached)
        piece = self._texts[choice].take(delta)
        if piece.finish is not None and delta.finish is None:
            self._generation.finish(choice, delta.position + len(piece.tokens) - 1)
        if not self._call.wants_answer:
            return Piece(choice, "", finish=FinishReason.LENGTH)
        self.usage.completion_tokens += len(piece.tokens)
        if piece.tokens:
            self._meter.tokens(choice, len(piece.tokens))
            self._visit.answered(len(piece.tokens))
        return piece

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
