"""How much of a trace's prompts is cached, by how much memory there is, against a cache that forgets nothing.

    python -m benchmarks.prefix_cache mooncake_conversation.jsonl --svg docs/prefix-cache.svg

The attention worker's own book takes the requests one after the other, in their order, each with an answer of one
token; only the tensors are missing. The trace (Mooncake, FAST'25, Apache-2.0) names the blocks of 512 tokens that
its prompts are made of: a block's name stands here for all of its tokens, which are named again in our own blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_workers.book import Book
from attention_workers.kv_blocks import KvBlocks
from attention_workers.kv_sizes import size_spaces
from attention_workers.step import AttemptId, Plan, Sampling, Start, StepResult, TokenDelta
from benchmarks.curves import Curve, svg
from model.layer_types import FULL, SLIDING

TRACE_TOKENS = 512  # of a block of the trace
BLOCK_TOKENS = 32  # of one of ours
ROWS_MAX = 1 << 20
WINDOW = 512
SEQUENCE_TOKENS = 8192  # for which a hybrid's memory is divided
MILLIONS = (0.25, 1, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Request:
    num_tokens: int
    blocks: tuple[int, ...]  # names of its blocks of TRACE_TOKENS, the last perhaps cut

    @property
    def prompt(self) -> tuple[int, ...]:
        tokens = [block for block in self.blocks for _ in range(TRACE_TOKENS)]
        return tuple(tokens[: self.num_tokens])


def read(path: Path, requests_max: int | None = None) -> list[Request]:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:requests_max]]
    return [Request(row["input_length"], tuple(row["hash_ids"])) for row in rows]


def ideal(requests: Iterable[Request], block_tokens: int = BLOCK_TOKENS, trace_tokens: int = TRACE_TOKENS) -> int:
    """Prompt tokens that a cache without bounds has: in whole blocks, and never the last of a prompt.

    `trace_tokens`: of a block of the trace.
    """
    seen: set[int] = set()
    total = 0
    for request in requests:
        num_known = 0
        while num_known < len(request.blocks) and request.blocks[num_known] in seen:
            num_known += 1
        known = min(num_known * trace_tokens, request.num_tokens - 1)
        total += known // block_tokens * block_tokens
        seen.update(request.blocks)
    return total


def book_of(num_tokens: int, window: int | None, block_tokens: int = BLOCK_TOKENS) -> Book:
    """With the memory that so many tokens take where no layer slides. `window`: every other layer does."""
    units = 2 * (num_tokens // block_tokens)  # a block of either half of the layers costs one
    blocks = size_spaces(
        units,
        {FULL: 2 if window is None else 1, SLIDING: 0 if window is None else 1},
        window=window,
        block_tokens=block_tokens,
        sequences_max=1024,
        sequence_tokens=SEQUENCE_TOKENS,
        model_len_max=ROWS_MAX,
        prefix_cache=True,
    )
    sliding = None if window is None else KvBlocks(blocks[SLIDING], window)
    return Book("trace", 1, KvBlocks(blocks[FULL]), block_tokens, 16, ROWS_MAX, ROWS_MAX, sliding)


def cached(book: Book, requests: Sequence[Request]) -> int:
    """Prompt tokens that the book finds cached, as it tells a client."""
    total = 0
    for number, request in enumerate(requests, 1):
        start = Start(
            AttemptId(str(number), 0, 1), "", request.prompt, (), Sampling(), frozenset(), 1, None, arrival=number
        )
        result = StepResult()
        book.apply(Plan(1, number, "trace", 1, (start,), (), ROWS_MAX, ROWS_MAX), result)
        while book.sequences:
            spans = book.compose(result)
            book.computed(spans, result)
            for sequence in [span.sequence for span in spans if span.samples]:
                book.sampled(sequence, 0, TokenDelta(start.attempt, 0, (0,)), result)
        [delta] = result.deltas[""]
        assert delta.tokens, delta.detail
        total += delta.num_cached
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="JSON lines with input_length and hash_ids")
    parser.add_argument("--requests", type=int, help="only so many from its beginning")
    parser.add_argument("--millions", type=float, nargs="+", default=MILLIONS, help="of tokens that fit, in turn")
    parser.add_argument(
        "--block-tokens", type=int, default=BLOCK_TOKENS, help="larger is faster; default %(default)s"
    )
    parser.add_argument("--svg", type=Path, help="where to draw the curve")
    arguments = parser.parse_args()
    requests = read(arguments.trace, arguments.requests)
    num_tokens = sum(request.num_tokens for request in requests)
    block_tokens = arguments.block_tokens
    best = ideal(requests, block_tokens) / num_tokens
    print(f"{len(requests)} requests, {num_tokens} prompt tokens; a cache without bounds has {best:.4f} of them")
    forms = {"full layers": None, f"every other layer with a window of {WINDOW}": WINDOW}
    curves = [Curve(name, []) for name in forms]
    for millions in arguments.millions:
        for curve, window in zip(curves, forms.values(), strict=True):
            share = cached(book_of(int(millions * 1e6), window, block_tokens), requests) / num_tokens
            curve.points.append((millions, share))
            print(
                f"{millions:8g} M tokens of memory, {curve.name}: {share:.4f}, {share / best:.3f} of that",
                flush=True,
            )
    if arguments.svg:
        drawn = svg(curves, "memory, in millions of tokens of full layers", "prompt tokens cached", best)
        arguments.svg.write_text(drawn)


if __name__ == "__main__":
    main()
