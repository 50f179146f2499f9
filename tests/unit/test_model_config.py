"""config.json becomes a ModelConfig, or is refused with the field, what it was and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import CONFIG_BYTES_MAX, ModelConfig, load_config
from model.errors import CheckpointError, ConfigError, shorten
from model.layer_types import FULL, Rope

ABSENT = object()

RELEASED: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 5000000,
    "max_position_embeddings": 196608,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "intermediate_size": 1536,
    "shared_intermediate_size": 0,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "sliding_window": None,
    "attn_type_list": [1] * 62,
    "vocab_size": 200064,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
    "use_mtp": True,
    "num_mtp_modules": 3,
    "mtp_transformer_layers": 1,
    "attention_dropout": 0.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "mlp_intermediate_size": 8192,
    "layernorm_mlp_beta": 1.0,
    "shared_moe_mode": "sigmoid",
}

FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}

# What Transformers 5.23 writes: nested rope, `dtype`, and none of the fields its code takes for granted.
SAVED_BY_TRANSFORMERS: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 200034,
    "dtype": "float32",
    "eos_token_id": 200020,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "model_type": "minimax_m2",
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 128,
}


def changed(base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**base, **fields}.items() if value is not ABSENT}


def test_released_layout() -> None:
    config = ModelConfig.from_dict(RELEASED)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (62, 48, 8, 128)
    assert (config.q_size, config.kv_size) == (6144, 1024)
    assert config.rope == {FULL: Rope(theta=5e6, rotary_dim=64)}
    assert (config.num_experts, config.experts_per_token, config.expert_hidden) == (256, 8, 1536)
    assert (config.qk_norm, config.use_routing_bias, config.dtype) == ("per_layer", True, "bfloat16")
    assert (config.bos_id, config.eos_ids) == (None, ())
    assert (config.layer_types, config.sliding_window) == (("full_attention",) * 62, None)
    assert not config.has_sinks


def test_layout_saved_by_transformers_means_norms_and_bias_on() -> None:
    """Transformers leaves out what its code always does; reading absence as off would drop norms and bias."""
    config = ModelConfig.from_dict(SAVED_BY_TRANSFORMERS)
    assert (config.qk_norm, config.use_routing_bias) == ("per_layer", True)
    assert config.rope == {FULL: Rope(theta=10000.0, rotary_dim=8)}
    assert config.dtype == "float32"
    assert (config.bos_id, config.eos_ids) == (200034, (200020,))


def test_both_layouts_of_one_model_agree() -> None:
    """The nested and the flat spelling of the rotation, num_experts and torch_dtype are only spellings."""
    flat = changed(
        SAVED_BY_TRANSFORMERS,
        rope_parameters=ABSENT, rotary_dim=8, rope_theta=10000, rope_scaling=None,
        num_local_experts=ABSENT, num_experts=8, dtype=ABSENT, torch_dtype="float32", eos_token_id=[200020],
    )  # fmt: skip
    assert ModelConfig.from_dict(flat) == ModelConfig.from_dict(SAVED_BY_TRANSFORMERS)


@pytest.mark.parametrize(
    ("fields", "rotary_dim", "theta"),
    [
        ({"rope_parameters": ABSENT}, 16, 5e6),  # Transformers turns the whole head unless told otherwise
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rotary_dim": 8}, 8, 1e4),
        ({"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 0.25}, 4, 5e6),
        ({"rope_parameters": None, "rope_scaling": {"type": "default"}, "rotary_dim": 2}, 2, 5e6),
    ],
)
def test_rotation_from_each_spelling(fields: dict[str, Any], rotary_dim: int, theta: float) -> None:
    config = ModelConfig.from_dict(changed(SAVED_BY_TRANSFORMERS, **fields))
    assert config.rope == {FULL: Rope(theta=theta, rotary_dim=rotary_dim)}


def test_qk_norm_may_be_off() -> None:
    assert ModelConfig.from_dict(changed(RELEASED, use_qk_norm=False)).qk_norm == "none"


def test_eos_may_be_several() -> None:
    assert ModelConfig.from_dict(changed(RELEASED, eos_token_id=[5, 7])).eos_ids == (5, 7)


REFUSED = [
    ("model_type", "minimax_m3", "'minimax_m2'"),
    ("model_type", ABSENT, "a value"),
    ("hidden_size", ABSENT, "a value"),
    ("hidden_size", "3072", "a valid integer"),
    ("hidden_size", True, "a valid integer"),
    ("num_hidden_layers", 0, "greater than or equal to 1"),
    ("num_hidden_layers", 10**9, "less than or equal to 1024"),
    ("vocab_size", 1.5, "a valid integer"),
    ("rms_norm_eps", float("nan"), "a finite number"),
    ("rope_theta", -1.0, "greater than 1"),
    ("scoring_func", "softmax", "'sigmoid'"),
    ("qk_norm_type", "per_tensor", "'per_layer', 'per_head' or 'none'"),
    ("qk_norm_type", "none", "per_layer or per_head, as use_qk_norm is true"),
    ("use_qk_norm", "yes", "a valid boolean"),
    ("hidden_act", "gelu", "'silu'"),
    ("sliding_window", 4096, "null, or layer_types beside it to say which layers slide"),
    ("sliding_window", 0, "greater than or equal to 1"),
    ("attention_sinks", 1, "a valid boolean"),
    ("attention_value_scale", 0.7, "null"),
    ("swiglu_limit", 7.0, "null"),
    ("shared_intermediate_size", 1024, "0"),
    ("tie_word_embeddings", True, "false"),
    ("attention_bias", True, "false"),
    ("quantization_config", "fp8", "a valid dictionary"),
    ("routed_scaling_factor", 2.0, "less than or equal to 1"),
    ("first_k_dense_replace", 1, "0"),
    ("final_logit_softcapping", 30.0, "null"),
    ("num_key_value_heads", 7, "a divisor of 48 heads"),
    ("num_experts_per_tok", 257, "at most 256 experts"),
    ("num_experts", 255, "256, as num_local_experts says"),
    ("torch_dtype", "float16", "'float32' or 'bfloat16'"),
    ("attn_type_list", [1] * 61, "one entry for each of 62 layers"),
    ("layer_types", ["full_attention"], "one entry for each of 62 layers"),
    ("bos_token_id", -1, "greater than or equal to 0"),
]


@pytest.mark.parametrize(("field", "value", "accepted"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(field: str, value: Any, accepted: str) -> None:
    """The message alone is enough to mend the file: file, field, value, what is accepted."""
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(changed(RELEASED, **{field: value}), "/m/config.json")
    said = "absent" if value is ABSENT else shorten(json.dumps(value))
    assert str(refusal.value) == f"/m/config.json: field {field} is {said}; accepted: {accepted}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_type_list": [1, 0]}, "attn_type_list.1 is 0; accepted: 1"),
        ({"layer_types": ["linear_attention"]}, 'layer_types.0 is "linear_attention"; accepted: \'full_'),
        ({"dtype": "float32"}, 'torch_dtype is "bfloat16"; accepted: "float32", as dtype says'),
        ({"eos_token_id": [1, "x"]}, 'eos_token_id.1 is "x"; accepted: a valid integer'),
        ({"rotary_dim": 63}, "rotary_dim is 63 channels; accepted: an even count of rotary channels, 2 to 128"),
        ({"rotary_dim": 130}, "rotary_dim is 130 channels; accepted: an even count"),
        ({"head_dim": 33, "rotary_dim": ABSENT}, "head_dim is 33 channels; accepted: an even count"),
        ({"partial_rotary_factor": 0.3, "rotary_dim": ABSENT}, "partial_rotary_factor is 38.4 channels"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 32 channels; accepted: 64 channels, as rot"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.type is \"yarn\"; accepted: 'default'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, 'rope_parameters.rope_type is "llama3"; accepted: \'d'),
        ({"rope_parameters": {"factor": 4.0}}, "rope_parameters.factor is 4.0; accepted: absent"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 10000; accepted: 5e+06, as rope_theta says"),
    ],
)
def test_nested_fields_and_contradictions_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(changed(RELEASED, **fields))
    assert message in str(refusal.value)


ATTENTION = "model.layers.3.self_attn.{}_proj.weight"
EXPERT = "model.layers.3.block_sparse_moe.experts.7.w{}.weight"


def test_released_quantisation() -> None:
    """Attention projections and experts lie in FP8, nothing else does."""
    config = ModelConfig.from_dict(changed(RELEASED, quantization_config=FP8))
    stored = [*map(ATTENTION.format, "qkvo"), *map(EXPERT.format, "123")]
    assert all(map(config.stores_fp8, stored))
    for name in ("model.embed_tokens", "lm_head", "model.norm", "model.layers.3.input_layernorm",
                 "model.layers.3.self_attn.q_norm", "model.layers.3.block_sparse_moe.gate"):  # fmt: skip
        assert not config.stores_fp8(f"{name}.weight")
    assert not any(map(ModelConfig.from_dict(RELEASED).stores_fp8, stored))


@pytest.mark.parametrize(
    ("modules", "excepted"),
    [
        (["gate"], []),
        (["self_attn"], [*map(ATTENTION.format, "qkvo")]),
        (["self_att", "proj", "q_pro"], []),
        (["k_proj", "w2"], [ATTENTION.format("k"), EXPERT.format("2")]),
        (["layers.3.self_attn"], [*map(ATTENTION.format, "qkvo")]),
        (["model.layers.3.self_attn.q_proj"], [ATTENTION.format("q")]),
        (["layers.33.self_attn", "3.self"], []),
        (None, []),
    ],
)
def test_modules_are_excepted_by_whole_components(modules: list[str] | None, excepted: list[str]) -> None:
    """Not by substring: `gate` would except a `gate_up_proj` too."""
    raw = changed(RELEASED, quantization_config={**FP8, "modules_to_not_convert": modules})
    config = ModelConfig.from_dict(raw)
    names = [*map(ATTENTION.format, "qkvo"), *map(EXPERT.format, "123")]
    assert [name for name in names if not config.stores_fp8(name)] == excepted


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("quant_method", "awq", "\"awq\"; accepted: 'fp8'"),
        ("quant_method", ABSENT, "absent; accepted: a value"),
        ("fmt", "float8_e5m2", "\"float8_e5m2\"; accepted: 'float8_e4m3fn'"),
        ("activation_scheme", "static", "\"static\"; accepted: 'dynamic'"),
        ("weight_block_size", ABSENT, "absent; accepted: a value"),
        ("weight_block_size", None, "null; accepted: a valid list"),
        ("weight_block_size", [128], "[128]; accepted: List should have at least 2 items"),
        ("weight_block_size.1", [128, 64], "64; accepted: 128"),
        ("modules_to_not_convert", "gate", '"gate"; accepted: a valid list'),
        ("scale_fmt", "ue8m0", '"ue8m0"; accepted: absent'),
        ("kv_cache_scheme", {"type": "float"}, '{"type": "float"}; accepted: absent'),
    ],
)
def test_other_quantisations_are_refused_by_name(field: str, value: Any, said: str) -> None:
    raw = changed(FP8, **{field.split(".")[0]: value})
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(changed(RELEASED, quantization_config=raw))
    assert f"field quantization_config.{field} is {said}" in str(refusal.value)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(changed(RELEASED, quantization_config={"ignore": ["layer"] * 10_000}))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("raw", [[], None, "config", 3])
def test_config_must_be_an_object(raw: object) -> None:
    with pytest.raises(ConfigError, match="accepted: a JSON object"):
        ModelConfig.from_dict(raw)


def test_load_config_reads_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert load_config(tmp_path) == ModelConfig.from_dict(RELEASED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "unreadable"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (CONFIG_BYTES_MAX + 1), "longer"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)
