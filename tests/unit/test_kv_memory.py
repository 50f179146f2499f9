"""Promises of the arithmetic behind --kv-memory: it adds up, and what does not fit is refused in words."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_workers.config import AttentionConfig
from attention_workers.kv_blocks import blocks_overlapped
from attention_workers.kv_memory import block_bytes, kv_memory
from cluster.config import ConfigError, load_config
from cluster.preflight import RoleBytes, free_for_kv, memory_needed
from model.attention import TILE
from model.config import ModelConfig
from model.errors import NotEnoughMemory
from model.layer_types import FULL, SLIDING
from model.synthetic import Variant, config_json

MIB, GIB = 1 << 20, 1 << 30
PLAIN = ModelConfig.from_dict(config_json("m2-layers", Variant(layers=2)))
HYBRID = ModelConfig.from_dict(config_json("m2-layers", Variant(layers=62, hybrid=True)))


def pool(free, model=PLAIN, on_gpu=False, **config):
    return kv_memory(AttentionConfig(**config), model, torch.bfloat16, free, on_gpu)


def test_a_block_is_32_tokens_of_keys_and_values_in_all_layers_of_its_type():
    """MiniMax-M2: 8 heads of 128 channels, 4,096 bytes a token and layer in bfloat16."""
    assert block_bytes(PLAIN, FULL, torch.bfloat16) == 2 * 32 * 4096
    assert block_bytes(PLAIN, SLIDING, torch.bfloat16) == 0
    assert block_bytes(HYBRID, SLIDING, torch.bfloat16) == 31 * 32 * 4096
    assert block_bytes(HYBRID, SLIDING, torch.float32) == 31 * 32 * 8192


@pytest.mark.parametrize(
    ("free", "config", "taken"),
    [
        (8 * GIB, {"kv_share": 0.5}, 4 * GIB),
        (8 * GIB, {"kv_bytes": 300 * MIB}, 300 * MIB),
        (8 * GIB, {}, 2 * GIB),
        (80 * GIB, {}, 4 * GIB),
        (80 * GIB, {"kv_share": 0.1}, 8 * GIB),
        (80 * GIB, {"on_gpu": True}, 64 * GIB),
        (80 * GIB, {"on_gpu": True, "kv_share": 1.0}, 80 * GIB),
    ],
)
def test_what_is_taken_is_what_was_asked_for_in_whole_blocks(free, config, taken):
    one = block_bytes(PLAIN, FULL, torch.bfloat16)
    found = pool(free, sequences_max=4096, **config)
    assert found.blocks == {FULL: taken // one}
    assert taken - one < found.bytes_taken <= taken
    assert (found.free_bytes, found.num_tokens) == (free, taken // one * TILE)


@given(free=st.integers(64 * MIB, 1 << 42), share=st.floats(0.01, 1), model_len=st.integers(1, 196_608))
def test_the_arithmetic_adds_up_for_a_hybrid_too(free, share, model_len):
    """Blocks times their sizes are the bytes taken, within the share; and so many sequences do find room."""
    wanted = int(free * share)
    try:
        found = pool(free, HYBRID, kv_share=share, model_len_max=model_len)
    except NotEnoughMemory:
        assert wanted < 2 * GIB * max(1, model_len // 4096)
        return
    gauges = found.gauges()
    assert (
        gauges["kv_bytes"]
        == found.bytes_taken
        == (
            found.blocks[FULL] * gauges["kv_block_bytes"]
            + found.blocks[SLIDING] * gauges["kv_sliding_block_bytes"]
        )
    )
    assert found.bytes_taken <= wanted
    assert gauges["kv_tokens"] == found.blocks[FULL] * gauges["kv_block_tokens"]
    assert gauges["kv_model_len"] == model_len
    num = int(found.num_sequences)
    assert num >= 1
    assert num * -(-model_len // TILE) <= found.blocks[FULL]
    assert num * blocks_overlapped(min(512, model_len), TILE) <= found.blocks[SLIDING]


@pytest.mark.parametrize("model", [PLAIN, HYBRID])
def test_a_length_that_was_asked_for_and_finds_no_room_is_refused_with_what_would(model):
    """The length that fits does, and the memory that is named is the least."""
    with pytest.raises(NotEnoughMemory, match=r"\(--max-model-len\): 100000; accepted: at most \d+, ") as refusal:
        pool(GIB, model, kv_bytes=300 * MIB, model_len_max=100_000)
    _, fits, _, least = (int(number) for number in re.findall(r"\b\d+\b", str(refusal.value)))
    assert pool(GIB, model, kv_bytes=300 * MIB, model_len_max=fits).num_sequences >= 1
    assert pool(GIB, model, kv_bytes=least, model_len_max=100_000).num_sequences >= 1
    with pytest.raises(NotEnoughMemory, match=f"at least {least}$"):
        pool(GIB, model, kv_bytes=least - 1, model_len_max=100_000)


def test_a_share_of_too_little_is_refused_with_what_is_free():
    with pytest.raises(NotEnoughMemory, match=r"500; accepted: at least 262144, .* share of 1000 bytes that are"):
        pool(1000, kv_share=0.5)


def test_what_the_checkpoint_allows_may_be_more_than_fits():
    """Nobody asked for it: shorter sequences are served, and the arithmetic says how long they get."""
    found = pool(GIB, kv_bytes=300 * MIB)
    assert found.num_sequences < 1
    assert found.gauges()["kv_model_len"] == PLAIN.max_position_embeddings


def test_free_is_what_weights_and_processes_leave_divided_among_the_workers():
    """So that shares of several workers do not add up to more than there is."""
    config = load_config(None, {"model": "m", "pools.attention_workers": 3, "attention.kv_share": 1.0})
    weights = RoleBytes(attention=GIB, experts=2 * GIB)
    available = sum(memory_needed(config, weights)) + 9 * GIB
    assert free_for_kv(config, weights, available) == 3 * GIB
    assert free_for_kv(config, weights, 0) == 0


def test_two_amounts_are_refused():
    with pytest.raises(ConfigError, match=r"kv_bytes 7 and kv_share 0\.5 are two amounts"):
        load_config(None, {"model": "m", "attention.kv_bytes": 7, "attention.kv_share": 0.5})
