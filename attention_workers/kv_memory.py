"""From memory to blocks, tokens and sequences: how a pool came to its size, as `status` shows it. Pure.

What is free is told, a share of it or a size is wanted, and each layer type gets its blocks (`kv_sizes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_workers.config import AttentionConfig
from attention_workers.kv_blocks import blocks_overlapped
from attention_workers.kv_sizes import size_spaces
from model.attention import TILE
from model.config import ModelConfig
from model.errors import NotEnoughMemory
from model.layer_types import FULL, SLIDING, LayerType

_HOST_SHARE, _HOST_BYTES_MAX = 0.25, 4 << 30  # where nothing is said: others live on the host
_GPU_SHARE = 0.8  # the rest is for what a step computes


@dataclass(frozen=True)
class KvMemory:
    free_bytes: int
    """What was found free for this worker's keys and values, before they took any of it."""

    blocks: dict[LayerType, int]
    block_bytes: dict[LayerType, int]
    """Of one block, TILE tokens in all layers of a type; 0 where there is none."""

    window: int | None
    model_len: int
    """Tokens of the longest sequence."""

    @property
    def bytes_taken(self) -> int:
        """What the blocks take once all of them are used."""
        return sum(number * self.block_bytes[kind] for kind, number in self.blocks.items())

    @property
    def num_tokens(self) -> int:
        """Of all running sequences together, at most."""
        return self.blocks[FULL] * TILE

    @property
    def num_sequences(self) -> float:
        """How many of `model_len` tokens run at once; below 1: no sequence can become so long."""
        fit = self.blocks[FULL] / -(-self.model_len // TILE)
        if self.window is None:
            return fit
        return min(fit, self.blocks[SLIDING] / blocks_overlapped(self.window, TILE))

    def gauges(self) -> dict[str, float]:
        sizes = {"kv_block_bytes": self.block_bytes[FULL]}
        if self.window is not None:
            sizes |= {"kv_sliding_block_bytes": self.block_bytes[SLIDING], "kv_sliding_window": self.window}
        return {
            "kv_free_bytes": self.free_bytes,
            "kv_bytes": self.bytes_taken,
            "kv_share": round(self.bytes_taken / self.free_bytes, 4) if self.free_bytes else 0.0,
            "kv_block_tokens": TILE,
            **sizes,
            "kv_tokens": self.num_tokens,
            "kv_model_len": self.model_len,
            "kv_model_len_sequences": round(self.num_sequences, 2),
        }


def model_len(config: AttentionConfig, model: ModelConfig) -> int:
    """Tokens of the longest sequence."""
    return min(config.model_len_max or model.max_position_embeddings, model.max_position_embeddings)


def block_bytes(model: ModelConfig, kind: LayerType, dtype: torch.dtype) -> int:
    """Keys and values of TILE tokens in all layers of this type; 0 where there is none."""
    return 2 * len(model.layers_of(kind)) * model.num_kv_heads * TILE * model.head_dim * dtype.itemsize


def kv_memory(
    config: AttentionConfig, model: ModelConfig, dtype: torch.dtype, free_bytes: int, on_gpu: bool
) -> KvMemory:
    """The pool of a worker that finds `free_bytes` free.

    Raises NotEnoughMemory where one sequence finds no room, of `model_len_max` tokens if that was asked for.
    """
    taken = config.kv_bytes or _taken(config, free_bytes, on_gpu)
    try:
        found = _sized(config, model, dtype, free_bytes, taken)
    except NotEnoughMemory as error:
        if config.kv_bytes:
            raise
        raise NotEnoughMemory(f"{error}; {taken} is the share of {free_bytes} bytes that are free") from None
    if config.model_len_max and found.num_sequences < 1:
        longest = found.num_tokens  # of the full layers' space, for the other has room for a window
        raise NotEnoughMemory(
            f"attention.model_len_max (--max-model-len): {config.model_len_max}; accepted: at most {longest}, for "
            f"which the {found.bytes_taken} bytes for keys and values have room, or attention.kv_bytes "
            f"(--kv-memory) of at least {_least(config, model, dtype)}"
        )
    return found


def _sized(
    config: AttentionConfig, model: ModelConfig, dtype: torch.dtype, free_bytes: int, kv_bytes: int
) -> KvMemory:
    longest, window = model_len(config, model), model.sliding_window
    if window is not None:
        window = min(window, longest)  # a longer one sees no more
    sizes = {kind: block_bytes(model, kind, dtype) for kind in (FULL, SLIDING)}
    blocks = size_spaces(
        kv_bytes, sizes, window=window, block_tokens=TILE, sequences_max=config.sequences_max,
        sequence_tokens=config.kv_sequence_tokens, model_len_max=longest, prefix_cache=config.prefix_cache,
    )  # fmt: skip
    return KvMemory(free_bytes, blocks, sizes, window, longest)


def _taken(config: AttentionConfig, free_bytes: int, on_gpu: bool) -> int:
    if config.kv_share:
        return int(free_bytes * config.kv_share)
    if on_gpu:
        return int(free_bytes * _GPU_SHARE)
    return min(int(free_bytes * _HOST_SHARE), _HOST_BYTES_MAX)


def _least(config: AttentionConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """The least bytes that hold one sequence of `model_len` tokens: doubled until they do, then narrowed."""

    def holds(kv_bytes: int) -> bool:
        try:
            return _sized(config, model, dtype, 0, kv_bytes).num_sequences >= 1
        except NotEnoughMemory:
            return False

    most = 1
    while not holds(most):
        most *= 2
    least = most // 2  # does not
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if holds(middle) else (middle, most)
    return most
