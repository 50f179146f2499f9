"""Random tiny hybrids made of Transformers' parts: the oracle we did not write, for what it has no class for.

Transformers runs MiniMax-M2 with full attention only. Here its `MiniMaxM2ForCausalLM` keeps embedding, norms,
router, experts and head, and each attention module gives way to one put together from other models' parts:

* rotation by layer type: `transformers.models.laguna.modeling_laguna.LagunaRotaryEmbedding`,
* windows: `transformers.masking_utils.create_sliding_window_causal_mask` (and `create_causal_mask`),
* sinks: `transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward`,
* norms of heads: `MiniMaxM2RMSNorm` over one head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LagunaConfig, MiniMaxM2ForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as attend_with_sinks
from transformers.models.laguna.modeling_laguna import LagunaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RMSNorm, eager_attention_forward

from tests.parity.transformers_oracle import WEIGHT_STD, save_random_model

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True)
class Form:
    """What of the family's freedom a model takes."""

    qk_norm: str
    gains: str = "shared"  # "own": each head its own, with per_head
    sinks: bool = False
    window: int = 24


class HybridAttention(nn.Module):
    def __init__(self, old: nn.Module, kind: str, form: Form, config: LagunaConfig) -> None:
        """Takes over the projections of `old`, whose norms it replaces."""
        super().__init__()
        self.config, self.kind, self.form, self.head_dim = config, kind, form, old.head_dim
        self.num_key_value_groups, self.scaling = old.num_key_value_groups, old.scaling
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(old, name))
        if form.qk_norm == "per_layer":
            self.q_norm, self.k_norm = old.q_norm, old.k_norm
        elif form.qk_norm == "per_head":
            for name, projection in (("q_norm", self.q_proj), ("k_norm", self.k_proj)):
                width = self.head_dim if form.gains == "shared" else projection.out_features
                norm = MiniMaxM2RMSNorm(width, config.rms_norm_eps)
                norm.weight.data.normal_(1.0, 0.2)
                setattr(self, name, norm)
        if form.sinks:
            self.sinks = nn.Parameter(torch.randn(self.q_proj.out_features // self.head_dim) * 2)
        self.rotary = LagunaRotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self._norm("q_norm", self.q_proj(hidden_states)).view(shape).transpose(1, 2)
        k = self._norm("k_norm", self.k_proj(hidden_states)).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        position_ids = torch.arange(hidden_states.shape[1])[None]
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(hidden_states, position_ids, self.kind))
        mask = MASKS[self.kind](
            config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None,
            position_ids=position_ids,
        )  # fmt: skip
        attend = attend_with_sinks if self.form.sinks else eager_attention_forward
        mixed, _weights = attend(self, q, k, v, mask, scaling=self.scaling)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), None

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if self.form.qk_norm == "none":
            return x
        norm = getattr(self, name)
        if self.form.qk_norm == "per_layer":
            return norm(x)
        heads = x.view(*x.shape[:-1], -1, self.head_dim)
        if self.form.gains == "shared":
            return norm(heads).view(x.shape)
        statistic = MiniMaxM2RMSNorm(self.head_dim, norm.variance_epsilon)  # its weight is one
        return norm.weight * statistic(heads).view(x.shape)


def save_random_hybrid(path: Path, form: Form, seed: int) -> MiniMaxM2ForCausalLM:
    """Writes a float32 checkpoint to `path` as `save_pretrained` does, its config.json told; returns the model."""
    model = save_random_model(path, rotary_fraction=0.5, seed=seed, layers=len(LAYER_TYPES))
    own = model.config
    config = LagunaConfig(
        hidden_size=own.hidden_size, num_hidden_layers=own.num_hidden_layers, head_dim=own.head_dim,
        num_attention_heads=own.num_attention_heads, num_key_value_heads=own.num_key_value_heads,
        max_position_embeddings=own.max_position_embeddings, rms_norm_eps=own.rms_norm_eps,
        layer_types=LAYER_TYPES, sliding_window=form.window, rope_parameters=ROPES, attn_implementation="eager",
    )  # fmt: skip
    for layer, kind in zip(model.model.layers, LAYER_TYPES, strict=True):
        layer.self_attn = HybridAttention(layer.self_attn, kind, form, config)
    model.eval()
    model.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    told = {"layer_types": LAYER_TYPES, "sliding_window": form.window, "rope_parameters": ROPES}
    told |= {"qk_norm_type": form.qk_norm, "attention_sinks": form.sinks}
    (path / "config.json").write_text(json.dumps(written | told))
    assert WEIGHT_STD > 0.1, "a model that repeats one token would agree with anything"
    return model
