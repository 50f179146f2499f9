"""The whole model on one page: the oracle that every faster path is compared with.

One sequence, all positions at once, no cache, plain torch, nothing shared with the code it judges but the
checkpoint reader. Written to be read beside a paper, not to be fast.

Precision. With float32 everything is float32. With bfloat16 a value is rounded to bfloat16 at these points
and nowhere else:
  * weights stored in FP8: the product with their block's scale, in float32;
  * after every product with a weight matrix (accumulated in float32), the logits included;
  * after every RMS norm, whose statistic and gain are float32;
  * after rotation, whose angles and products are float32;
  * after attention over the keys a query sees: scores, sinks, softmax and weighted sum are float32;
  * after silu(gate) * up, which is float32;
  * after the K expert outputs are summed in float32, in ascending rank k;
  * after each addition to the residual stream.
The router is float32 throughout: its scores decide which experts run, so they are never rounded.

Windows. In a sliding layer the token at position i sees those at j with 0 <= i - j < W: W tokens, its own
included. Sinks. A head's sink is one more logit beside those of the keys; it takes its share of the softmax
and carries no value, so that a head need not attend to anything.

Legend: T tokens · H hidden · N query heads · M key-value heads · D head width · R rotary width ·
E experts · K experts per token · F expert hidden · V vocabulary · L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from model.checkpoint import Checkpoint
from model.layer_types import Rope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Trace:
    """One forward pass over T tokens."""

    logits: Tensor  # [T, V] float32
    gate_gaps: Tensor  # [T, L] float32: how far the last chosen expert's score lay above the first not chosen


class Reference:
    def __init__(self, checkpoint: Checkpoint, dtype: Literal["float32", "bfloat16"] | None = None) -> None:
        """Computes in `dtype`, by default the checkpoint's own; weights stay as they are stored."""
        self.config = checkpoint.config
        self.dtype = DTYPES[dtype or self.config.dtype]
        self.weights = {name: checkpoint.get(name) for name in checkpoint.names()}

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T] token ids, T >= 1 -> [T, V] float32; row t predicts token t + 1."""
        return self.trace(token_ids).logits

    @torch.inference_mode()
    def trace(self, token_ids: Sequence[int]) -> Trace:
        """As `logits`, with what the router saw."""
        x = embedding(torch.tensor(token_ids), self._weight("model.embed_tokens"))  # [T, H]
        gaps = []
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(layer, self._norm(f"{prefix}.input_layernorm", x))
            h = self._norm(f"{prefix}.post_attention_layernorm", x)
            ids, weights, gap = self._route(f"{prefix}.block_sparse_moe", h)
            x = x + self._experts(f"{prefix}.block_sparse_moe.experts", h, ids, weights)
            gaps.append(gap)
        logits = linear(self._norm("model.norm", x), self._weight("lm_head"))
        return Trace(logits.float(), torch.stack(gaps, dim=1))

    def _attention(self, layer: int, h: Tensor) -> Tensor:
        """Grouped-query causal attention, over all earlier tokens or a window of them: h [T, H] -> [T, H]."""
        config, length, prefix = self.config, h.shape[0], f"model.layers.{layer}.self_attn"
        q = self._qk_norm(f"{prefix}.q_norm", linear(h, self._weight(f"{prefix}.q_proj")))  # [T, N, D]
        k = self._qk_norm(f"{prefix}.k_norm", linear(h, self._weight(f"{prefix}.k_proj")))  # [T, M, D]
        v = linear(h, self._weight(f"{prefix}.v_proj")).view(length, config.num_kv_heads, config.head_dim)
        rope = config.rope[config.layer_types[layer]]
        q, k, v = self._rotate(q, rope).transpose(0, 1), self._rotate(k, rope).transpose(0, 1), v.transpose(0, 1)
        group = config.num_heads // config.num_kv_heads  # query head i reads key-value head i // group
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)  # [N, T, D]
        scores = q.float() @ k.float().transpose(1, 2) * config.head_dim**-0.5  # [N, T, T]
        behind = torch.arange(length)[:, None] - torch.arange(length)  # [T, T]: by how much key j lies before i
        hidden = behind < 0
        if config.layer_types[layer] == "sliding_attention" and config.sliding_window is not None:
            hidden = hidden | (behind >= config.sliding_window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if config.has_sinks:
            sinks = self.weights[f"{prefix}.sinks"].float()[:, None, None].expand(-1, length, 1)  # [N, T, 1]
            share = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]  # [N, T, T], less than 1 in all
        else:
            share = scores.softmax(-1)
        mixed = share @ v.float()  # [N, T, D]
        heads = mixed.to(self.dtype).transpose(0, 1).reshape(length, config.q_size)
        return linear(heads, self._weight(f"{prefix}.o_proj"))

    def _qk_norm(self, name: str, x: Tensor) -> Tensor:
        """x [T, N*D] -> [T, N, D], before the heads are turned.

        per_layer: one statistic over all heads. per_head: one for each; its gains [D] or [N*D].
        """
        split = (len(x), -1, self.config.head_dim)
        if self.config.qk_norm == "per_layer":
            x = self._norm(name, x)
        elif self.config.qk_norm == "per_head":
            gains = self.weights[f"{name}.weight"].view(-1, self.config.head_dim)  # [1, D] or [N, D]
            return self._norm(name, x.view(split), gains)
        return x.view(split)

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """Turns pairs (i, i + R/2) of each head by position * theta^(-2i/R); x [T, heads, D]."""
        rotary = rope.rotary_dim
        frequency = 1.0 / rope.theta ** (torch.arange(0, rotary, 2).float() / rotary)  # [R/2]
        angle = torch.arange(x.shape[0]).float()[:, None, None] * frequency  # [T, 1, R/2]
        first, second = x[..., :rotary].float().chunk(2, dim=-1)
        turned = torch.cat(
            (
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ),
            dim=-1,
        )
        return torch.cat((turned.to(x.dtype), x[..., rotary:]), dim=-1)

    def _route(self, prefix: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [T, H] -> expert ids [T, K], their weights [T, K] float32, gap [T].

        The bias takes part in the choice only. Equal scores go to the lower expert id.
        """
        count = self.config.experts_per_token
        scores = linear(h.float(), self.weights[f"{prefix}.gate.weight"].float()).sigmoid()  # [T, E]
        biased = scores
        if self.config.use_routing_bias:
            biased = scores + self.weights[f"{prefix}.e_score_correction_bias"].float()
        ranked, order = biased.sort(dim=-1, descending=True, stable=True)
        ids = order[:, :count]
        weights = scores.gather(1, ids)
        if count == self.config.num_experts:
            gap = torch.full((h.shape[0],), torch.inf)
        else:
            gap = ranked[:, count - 1] - ranked[:, count]
        return ids, weights / weights.sum(-1, keepdim=True), gap

    def _experts(self, prefix: str, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of K SwiGLU experts per token: h [T, H], ids and weights [T, K] -> [T, H]."""
        out = h.new_empty(*ids.shape, h.shape[1])  # [T, K, H]
        for expert in torch.unique(ids).tolist():
            token, rank = (ids == expert).nonzero(as_tuple=True)
            rows = h[token]  # [n, H]
            gate = linear(rows, self._weight(f"{prefix}.{expert}.w1")).float()  # [n, F]
            up = linear(rows, self._weight(f"{prefix}.{expert}.w3")).float()
            hidden = (gate * gate.sigmoid() * up).to(self.dtype)
            out[token, rank] = linear(hidden, self._weight(f"{prefix}.{expert}.w2"))
        total = torch.zeros_like(h, dtype=torch.float32)
        for k in range(ids.shape[1]):
            total = total + weights[:, k, None] * out[:, k].float()
        return total.to(self.dtype)

    def _norm(self, name: str, x: Tensor, gains: Tensor | None = None) -> Tensor:
        """x / rms(x) * weight over the last axis; `gains`: the weight, where its shape is not as stored."""
        x32 = x.float()
        scale = (x32.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        weight = self.weights[f"{name}.weight"] if gains is None else gains
        return (x32 * scale * weight.float()).to(self.dtype)

    def _weight(self, name: str) -> Tensor:
        weight, scale = self.weights[f"{name}.weight"], self.weights.get(f"{name}.weight_scale_inv")
        if scale is not None:  # one for each block of 128 x 128; those at the edges are smaller
            rows, columns = (torch.arange(side) // 128 for side in weight.shape)
            weight = weight.float() * scale[rows][:, columns]
        return weight.to(self.dtype)
