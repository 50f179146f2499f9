"""Rule 2 at the widths of the released model, where kernels differ from those for small shapes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import Checkpoint, attention_tensor_shapes, expert_tensor_shapes
from tests.equivalence.local_cluster import LocalCluster, request

# MiniMax-M2's widths; fewer experts and words, so that a test machine holds it.
CONFIG = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "hidden_size": 3072,
    "num_hidden_layers": 1, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64,
    "rope_theta": 5000000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "num_local_experts": 10,
    "num_experts_per_tok": 8, "intermediate_size": 1536, "vocab_size": 512, "torch_dtype": "bfloat16",
    "use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_routing_bias": True,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("m2")
    (path / "config.json").write_text(json.dumps(CONFIG))
    from model.config import load_config

    config = load_config(path)
    shapes = attention_tensor_shapes(config)
    for expert in range(config.num_experts):
        shapes |= expert_tensor_shapes(config, 0, expert)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, shape in shapes.items():
        is_router = "gate.weight" in name or "bias" in name
        values = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        values = values + 1 if "norm" in name else values
        tensors[name] = values if is_router else values.bfloat16()
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def test_one_layer_of_true_width_is_exact(checkpoint):
    """Alone on one expert worker, and among others, in chunks, in two microbatches on three."""
    me = request("me", range(40, 90), temperature=1.0, seed=9, max_tokens=6)
    others = [request(f"s{i}", range(10 + i, 30 + 3 * i), temperature=1.0, seed=i, max_tokens=8) for i in range(6)]
    with LocalCluster(checkpoint) as cluster:
        alone = cluster.run([me])["me"]
    with LocalCluster(checkpoint, experts=3, microbatches=2) as cluster:
        together = cluster.run([me, *others], step_tokens=40, chunk_tokens=16)["me"]
    assert together == alone
