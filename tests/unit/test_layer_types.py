"""Hybrids: every spelling of windows and rotation per layer type becomes one form, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import ConfigError
from model.layer_types import FULL, SLIDING, Rope
from tests.unit.test_model_config import ABSENT, SAVED_BY_TRANSFORMERS, changed

# Six layers of the size Transformers saved, rotation absent.
BASE: dict[str, Any] = changed(SAVED_BY_TRANSFORMERS, num_hidden_layers=6, rope_parameters=ABSENT)
S_F = [SLIDING, FULL] * 3
S_F_WINDOW = {"layer_types": S_F, "sliding_window": 128}


def config(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict(changed(BASE, **fields))


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        config(**fields)
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "slides", "window"),
    [
        (S_F_WINDOW, "101010", 128),
        ({"layer_types": S_F, "sliding_window_size": 128}, "101010", 128),
        ({"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "sliding_window": 9}, "011110", 9),
        ({"sliding_window_pattern": 3, "sliding_window": 9}, "110110", 9),
        ({"sliding_window_pattern": 1, "sliding_window": 9}, "000000", None),
        ({"attn_window_size": 64}, "111111", 64),
        ({"attn_window_size": [64, 0, 64, None, -1, 64]}, "101001", 64),
        ({"attn_window_size": 0}, "000000", None),
        ({"attn_window_size": -1, "sliding_window": None}, "000000", None),
        ({"layer_types": [FULL] * 6, "sliding_window": 512}, "000000", None),
        ({**S_F_WINDOW, "hybrid_layer_pattern": [1, 0] * 3, "attn_type_list": [1] * 6}, "101010", 128),
        ({**S_F_WINDOW, "attn_window_size": [128, None] * 3}, "101010", 128),
        ({}, "000000", None),
    ],
)
def test_which_layers_slide(fields: dict[str, Any], slides: str, window: int | None) -> None:
    read = config(**fields)
    assert read.layer_types == tuple(SLIDING if slide == "1" else FULL for slide in slides)
    assert read.sliding_window == window
    assert read.rope.keys() == set(read.layer_types)
    assert read.layers_of(SLIDING) == [i for i, slide in enumerate(slides) if slide == "1"]


NESTED = {FULL: {"rope_theta": 5e6, "partial_rotary_factor": 0.5}, SLIDING: {"rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("fields", "full", "sliding"),
    [
        ({}, (5e6, 16), (5e6, 16)),
        ({"rotary_dim": 8, "rope_theta": 1e6}, (1e6, 8), (1e6, 8)),
        ({"rotary_dim": 8, "rope_theta": 1e6, "swa_rope_theta": 1e4}, (1e6, 8), (1e4, 8)),
        ({"rope_theta": 1e6, "swa_rope_theta": 0}, (1e6, 16), (1e6, 16)),
        ({"rope_theta": 1e6, "swa_rope_theta": -1}, (1e6, 16), (1e6, 16)),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, (1e6, 16), (1e4, 16)),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, (1e6, 4), (1e6, 4)),
        ({"rope_parameters": NESTED}, (5e6, 8), (1e4, 16)),
        ({"rope_parameters": NESTED, "rope_theta": 5e6, "rotary_dim": 8}, (5e6, 8), (1e4, 8)),
        ({"rope_parameters": NESTED, "swa_rope_theta": 1e4}, (5e6, 8), (1e4, 16)),
    ],
)
def test_rotation_of_each_layer_type(
    fields: dict[str, Any], full: tuple[float, int], sliding: tuple[float, int]
) -> None:
    """A rotation by layer type says all of itself; flat fields hold for both types, a theta for windows aside."""
    ropes = {FULL: full, SLIDING: sliding}
    expected = {kind: Rope(theta=theta, rotary_dim=dim) for kind, (theta, dim) in ropes.items()}
    assert config(**S_F_WINDOW, **fields).rope == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_types": S_F},
            "sliding_window is null; accepted: a count of tokens, as layer_types",
        ),
        ({"sliding_window_pattern": 2}, "sliding_window is null; accepted: a count of tokens"),
        ({"sliding_window_size": 8}, "sliding_window_size is 8; accepted: null, or layer_types beside it"),
        (
            {**S_F_WINDOW, "sliding_window_size": 129},
            "sliding_window_size is 129; accepted: 128, as",
        ),
        ({"attn_window_size": [4, 8, 4, 4, 4, 4]}, "attn_window_size.1 is 8; accepted: 4, as attn_window_size.0"),
        ({"attn_window_size": [4] * 5}, "attn_window_size is [4, 4, 4, 4, 4]; accepted: one entry for each of 6"),
        ({"attn_window_size": "128"}, 'is "128"; accepted: a valid integer'),
        (
            {**S_F_WINDOW, "attn_window_size": 128},
            "attn_window_size is 128; accepted: the same layers sliding",
        ),
        (
            {**S_F_WINDOW, "hybrid_layer_pattern": [0, 1] * 3},
            "the same layers sliding as layer_types says",
        ),
        ({"hybrid_layer_pattern": [1] * 5}, "accepted: one entry for each of 6 layers"),
        ({**S_F_WINDOW, "attn_type_list": [0, 1] * 3}, "attn_type_list.0 is 0; accepted: 1"),
        (
            {**S_F_WINDOW, "use_sliding_window": False},
            "use_sliding_window is false; accepted: true, as layer_types lets 3 layers slide",
        ),
        ({**S_F_WINDOW, "swa_num_key_value_heads": 1}, "swa_num_key_value_heads is 1; accepted: 2, as in layers"),
        ({**S_F_WINDOW, "swa_head_dim": 8}, "swa_head_dim is 8; accepted: 16, as in layers that do not slide"),
        ({**S_F_WINDOW, "partial_rotary_factors": [0.5] * 6}, "partial_rotary_factors is [0.5, 0.5, 0.5, 0.5, 0."),
        (
            {**S_F_WINDOW, "swa_rope_theta": 0.5},
            "swa_rope_theta is 0.5; accepted: greater than 1",
        ),
        (
            {**S_F_WINDOW, "rope_parameters": NESTED, "swa_rope_theta": 2e4},
            "swa_rope_theta is 20000; accepted: 10000, as rope_parameters.sliding_attention.rope_theta says",
        ),
        (
            {**S_F_WINDOW, "rope_parameters": NESTED, "rope_theta": 1e6},
            "rope_parameters.full_attention.rope_theta is 5e+06; accepted: 1e+06, as rope_theta says",
        ),
        (
            {**S_F_WINDOW, "rope_parameters": {**NESTED, "rope_theta": 1e6}},
            "rope_parameters.rope_theta is 1000000.0; accepted: absent beside full_attention",
        ),
        (
            {**S_F_WINDOW, "rope_parameters": {FULL: {"rope_theta": 1e4}}},
            "rope_parameters.sliding_attention is null; accepted: present, as there are layers of",
        ),
        (
            {**S_F_WINDOW, "rope_parameters": {**NESTED, SLIDING: {"rope_type": "yarn"}}},
            "rope_parameters.sliding_attention.rope_type is \"yarn\"; accepted: 'default'",
        ),
    ],
)
def test_contradictions_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**fields)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "per_layer"),
        ({"qk_norm_type": "per_head"}, "per_head"),
        ({"qk_norm_type": "none"}, "none"),
        ({"use_qk_norm": False, "qk_norm_type": "per_head"}, "none"),
    ],
)
def test_norm_modes(fields: dict[str, Any], mode: str) -> None:
    assert config(**fields).qk_norm == mode
