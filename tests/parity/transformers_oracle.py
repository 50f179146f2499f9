"""Random tiny MiniMax-M2 models made, saved and run by Transformers: the oracle we did not write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

WEIGHT_STD = 0.3  # the usual 0.02 gives models that repeat one token, whatever a server does to them


def save_random_model(
    path: Path,
    *,
    rotary_fraction: float,
    seed: int,
    layers: int = 3,
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    experts: int = 8,
    experts_per_token: int = 3,
    expert_hidden: int = 32,
    vocabulary: int = 256,
    positions: int = 512,
) -> MiniMaxM2ForCausalLM:
    """Writes a float32 checkpoint with `save_pretrained` to `path`, nothing changed after; returns the model."""
    torch.manual_seed(seed)
    config = MiniMaxM2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=expert_hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=experts_per_token,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "partial_rotary_factor": rotary_fraction,
        },
    )
    model = MiniMaxM2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, WEIGHT_STD)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(path)
    return model


@torch.inference_mode()
def oracle_logits(model: MiniMaxM2ForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """[T] token ids -> [T, V] float32, in one pass without a cache."""
    logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    return logits[0].float()
