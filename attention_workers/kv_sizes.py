"""How many blocks each layer type's space gets of the memory for keys and values. Pure arithmetic.

A model of full layers spends it all on one space. In a hybrid a long sequence needs many blocks of the full
layers and a few, always as many, of the sliding ones; a short one as many of both. The spaces are sized so that
both run dry together under sequences of `sequence_tokens`; neither gets more than it could ever use. With a prefix
cache the sliding one can use as many blocks as the other: windows of sequences that have ended.
"""

from __future__ import annotations

from collections.abc import Mapping

from attention_workers.kv_blocks import blocks_overlapped
from model.errors import NotEnoughMemory
from model.layer_types import FULL, SLIDING, LayerType

CHUNK_TOKENS = 256
"""Prompt tokens of one step that the sliding space has room for beyond the sequences' windows, for a quarter of
the memory at most. Longer chunks are cut to what the space holds, which in exact mode changes no bit."""


def size_spaces(
    kv_bytes: int,
    block_bytes: Mapping[LayerType, int],
    *,
    window: int | None,
    block_tokens: int,
    sequences_max: int,
    sequence_tokens: int,
    model_len_max: int,
    prefix_cache: bool,
) -> dict[LayerType, int]:
    """Blocks of each space. `block_bytes`: of one block in all layers of its type, 0 where there is none.

    Raises NotEnoughMemory.
    """
    per_sequence = -(-min(sequence_tokens, model_len_max) // block_tokens)
    enough = sequences_max * -(-model_len_max // block_tokens)
    full_bytes = block_bytes[FULL]
    if window is None:
        _require(kv_bytes, full_bytes, block_tokens)
        return {FULL: min(enough, kv_bytes // full_bytes)}
    sliding_bytes = block_bytes[SLIDING]
    least = blocks_overlapped(window, block_tokens)  # one sequence, token by token
    _require(kv_bytes, full_bytes + least * sliding_bytes, block_tokens)
    chunk = min(-(-CHUNK_TOKENS // block_tokens), kv_bytes // 4 // sliding_bytes)
    for_sequences = kv_bytes - chunk * sliding_bytes
    per_sliding = min(per_sequence, least)
    full = max(1, per_sequence * for_sequences // (per_sequence * full_bytes + per_sliding * sliding_bytes))
    sliding = (kv_bytes - min(enough, full) * full_bytes) // sliding_bytes
    most = enough if prefix_cache else sequences_max * least + chunk
    sliding = max(least, min(sliding, most))
    full = (kv_bytes - sliding * sliding_bytes) // full_bytes if full_bytes else enough
    return {FULL: min(enough, full), SLIDING: sliding}


def _require(kv_bytes: int, needed: int, block_tokens: int) -> None:
    if kv_bytes < needed:
        raise NotEnoughMemory(
            f"attention.kv_bytes (--kv-memory): {kv_bytes}; accepted: at least {needed}, which one sequence of"
            f" {block_tokens} tokens takes, with its window where layers slide"
        )
