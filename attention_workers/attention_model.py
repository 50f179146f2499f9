"""The attention side of the model on one device: embedding, attention layers, gates, head, and the KV pool.

Loads only the tensors the attention role owns. Legend: T tokens of a microbatch · H hidden · B KV blocks ·
N kv heads · D head width · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention_workers.sequence import Span
from model import exact
from model.attention import TILE, PagedAttention, QueryTiles, Stretch, query_tiles
from model.checkpoint import Checkpoint, attention_tensor_names, scale_name
from model.config import ModelConfig
from model.device import HOST
from model.fp8 import Fp8Weight, Weight
from model.gate import Gate, Routes
from model.layer_types import SLIDING, LayerType
from model.layers import HeadNorm, RmsNorm, Rotary
from model.linear import Keep, linear


@dataclass
class KvRows:
    """Where the microbatch's keys and values go in one block space, and what is read there."""

    write_block: Tensor  # [T] int64
    fresh_blocks: Tensor  # blocks whose first token is written here
    tiles: list[QueryTiles]  # laid out


@dataclass
class Microbatch:
    """Tensors of one slice of a step."""

    spans: list[Span]
    positions: Tensor  # [T] int64, of each token in its sequence
    write_offset: Tensor  # [T] int64: where in its block a token's key and value go
    kv: dict[LayerType, KvRows]
    sampled_rows: Tensor  # rows whose logits are wanted, in span order
    scored: list[
        tuple[Span, int]
    ]  # spans whose rows' logits are wanted for the prompt, and where their rows begin
    hidden: Tensor  # [T, H]


class _Layer:
    def __init__(
        self,
        config: ModelConfig,
        take: Callable[[str], Tensor],
        take_weight: Callable[[str], Weight],
        index: int,
        dtype: torch.dtype,
        numerics: exact.Numerics,
        keep: Keep,
    ) -> None:
        at = f"model.layers.{index}."
        q, k, v, o = (take_weight(at + f"self_attn.{name}_proj.weight") for name in "qkvo")
        self.qkv = linear((q, k, v), dtype, numerics, keep)
        self.out = linear((o,), dtype, numerics, keep)
        eps = config.rms_norm_eps
        self.norm_in = RmsNorm(take(at + "input_layernorm.weight"), eps)
        self.norm_out = RmsNorm(take(at + "post_attention_layernorm.weight"), eps)
        self.norm_q = self.norm_k = None
        if config.qk_norm != "none":
            self.norm_q, self.norm_k = (
                RmsNorm(weight, eps) if config.qk_norm == "per_layer" else HeadNorm(weight, config.head_dim, eps)
                for weight in (take(at + f"self_attn.{name}_norm.weight") for name in "qk")
            )
        self.sinks = take(at + "self_attn.sinks").float() if config.has_sinks else None
        self.kind: LayerType = config.layer_types[index]
        self.kv_index = config.layers_of(self.kind).index(index)
        moe = at + "block_sparse_moe."
        bias = take(moe + "e_score_correction_bias") if config.use_routing_bias else None
        self.gate = Gate(take(moe + "gate.weight"), bias, config.experts_per_token, numerics)


class AttentionModel:
    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        numerics: exact.Numerics,
        positions_max: int,
        progress: Callable[[int, int], None],
        keep: Keep = "dequantised",
    ) -> None:
        """Load the attention role's tensors; `progress(bytes_done, bytes_total)` after each.

        `keep`: how to hold those that are stored in FP8.
        """
        config = checkpoint.config
        self.config, self.device, self.dtype = config, device, dtype
        names = attention_tensor_names(config)
        self.bytes_total = checkpoint.nbytes(names)
        self.bytes_loaded = 0
        taken: set[str] = set()

        def take_weight(name: str) -> Weight:
            weight = checkpoint.weight(name, device)
            taken.update((name, scale_name(name)) if isinstance(weight, Fp8Weight) else (name,))
            self.bytes_loaded += weight.nbytes
            progress(self.bytes_loaded, self.bytes_total)
            return weight

        def take(name: str) -> Tensor:
            weight = take_weight(name)
            assert isinstance(weight, Tensor), f"{name} has no scales"
            return weight

        self.embedding = take("model.embed_tokens.weight").to(dtype).clone()
        self.layers = [
            _Layer(config, take, take_weight, i, dtype, numerics, keep) for i in range(config.num_layers)
        ]
        self.norm = RmsNorm(take("model.norm.weight"), config.rms_norm_eps)
        self.head = exact.Linear(take("lm_head.weight").to(dtype), numerics)
        assert taken == set(names), f"owned but not loaded, or loaded but not owned: {taken ^ set(names)}"
        self.attention = PagedAttention(config.num_heads, config.num_kv_heads, config.head_dim, numerics, device)
        self.rotary = {
            kind: Rotary(rope.rotary_dim, rope.theta, positions_max, device) for kind, rope in config.rope.items()
        }
        if numerics == "exact":
            widths = [
                config.hidden_size,
                config.num_heads * config.head_dim,
                config.num_kv_heads * config.head_dim,
                config.vocab_size,
            ]
            exact.probe_row_sum([*widths, config.head_dim] if config.qk_norm == "per_head" else widths, device)
        self.keys: dict[LayerType, Tensor] = {}
        self.values: dict[LayerType, Tensor] = {}
        projections = [product for layer in self.layers for product in (layer.qkv, layer.out)]
        products = [*projections, *(layer.gate.linear for layer in self.layers), self.head]
        self.bytes_kept = self.embedding.nbytes + sum(product.nbytes for product in products)
        self.kept_as = " and ".join(sorted({product.kept_as for product in projections}))

    def make_kv(self, num_blocks: dict[LayerType, int]) -> None:
        """One pool for each layer type: [its layers, B, N, TILE, D]."""
        c = self.config
        for kind in c.rope:
            shape = (len(c.layers_of(kind)), num_blocks[kind], c.num_kv_heads, TILE, c.head_dim)
            self.keys[kind] = _lazy_zeros(shape, self.dtype, self.device)
            self.values[kind] = _lazy_zeros(shape, self.dtype, self.device)

    # --- one step ----------------------------------------------------------------------------

    def begin(self, spans: list[Span]) -> Microbatch:
        """Tokens to rows: embeds, and lays out where keys go and which tiles are read."""
        tokens: list[int] = []
        positions: list[int] = []
        sampled, scored = [], []
        for span in spans:
            end = span.first + span.count
            if span.sequence.is_scoring:
                scored.append((span, len(tokens)))
            tokens += span.sequence.tokens[span.first : end]
            positions += range(span.first, end)
            if span.samples:
                sampled.append(len(tokens) - 1)
        position = self._to_device(positions)
        return Microbatch(
            spans,
            position,
            position % TILE,
            {kind: self._kv_rows(kind, spans) for kind in self.keys},
            self._to_device(sampled),
            scored,
            self.embedding[self._to_device(tokens)],
        )

    def _to_device(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=HOST).to(self.device)

    def _kv_rows(self, kind: LayerType, spans: list[Span]) -> KvRows:
        blocks: list[int] = []
        fresh: list[int] = []
        stretches = []
        for span in spans:
            table, end = span.sequence.tables[kind], span.first + span.count
            stretches.append(Stretch(len(blocks), span.first, span.count, table.first, table.blocks))
            blocks += [table.blocks[p // TILE - table.first] for p in range(span.first, end)]
            fresh += table.blocks[-(-span.first // TILE) - table.first :]
        tiles = query_tiles(stretches, self.config.sliding_window if kind == SLIDING else None)
        return KvRows(self._to_device(blocks), self._to_device(fresh), self.attention.lay_out(tiles))

    def attend(self, layer: int, mb: Microbatch) -> Tensor:
        """Attention of one layer with its residual: [T, H] -> [T, H]."""
        c, own = self.config, self.layers[layer]
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        q, k, v = own.qkv(own.norm_in(mb.hidden)).split((q_width, kv_width, kv_width), -1)
        if own.norm_q is not None and own.norm_k is not None:
            q, k = own.norm_q(q), own.norm_k(k)  # before the heads are turned
        rows = len(mb.hidden)
        rotary, kv = self.rotary[own.kind], mb.kv[own.kind]
        q = rotary(q.reshape(rows, c.num_heads, c.head_dim), mb.positions)
        k = rotary(k.reshape(rows, c.num_kv_heads, c.head_dim), mb.positions)
        keys, values = self.keys[own.kind][own.kv_index], self.values[own.kind][own.kv_index]
        # A masked key's weight of zero times what the block's last owner left must be zero, even were that NaN.
        values[kv.fresh_blocks] = 0
        keys[kv.write_block, :, mb.write_offset] = k
        values[kv.write_block, :, mb.write_offset] = v.reshape(rows, c.num_kv_heads, c.head_dim)
        mixed = self.attention(q, keys, values, kv.tiles, own.sinks)
        return mb.hidden + own.out(mixed)

    def norm_before_experts(self, layer: int, hidden: Tensor) -> Tensor:
        return self.layers[layer].norm_out(hidden)

    def gate(self, layer: int, normed: Tensor) -> Routes:
        return self.layers[layer].gate(normed)

    def unembed(self, mb: Microbatch) -> Tensor:
        """Logits of the rows that sample: [n, V] float32."""
        return self._logits(mb.hidden[mb.sampled_rows])

    def unembed_rows(self, mb: Microbatch, first: int, count: int) -> Tensor:
        """Logits of `count` rows in a row: [count, V] float32, on the host."""
        return self._logits(mb.hidden[first : first + count]).to(HOST)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden)).float()


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the host their pages take memory when first written: torch.zeros would write them all at start.

    Zeros, because a masked key's weight of zero times an unwritten value must be zero, not NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(shape)
