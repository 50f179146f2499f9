"""Complete checkpoints with random weights in the released layout: to test, to try out and to measure with.

The same preset and seed give the same bytes of weights on every machine: values are uniform, made from a
counter of bits by float32 steps that round alike everywhere, from a stream of their own for each tensor.
A checkpoint appears at its path whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file

from model.checkpoint import (
    INDEX_FILE,
    ROUTER_SUFFIXES,
    SCALE_SUFFIX,
    SINGLE_FILE,
    Shape,
    expected_shapes,
    scale_name,
)
from model.config import ModelConfig
from model.errors import CheckpointError
from model.fp8 import quantise
from model.layer_types import FULL, SLIDING
from model.synthetic_tokenizer import BOS, EOS, added_token_id, write_tokenizer

Preset = Literal["tiny", "demo", "bench", "m2-layers"]
Progress = Callable[[int, int], None]
"""Called with (bytes made, bytes in all)."""

SHARD_BYTES_MAX = 128 << 20
LINEAR_GAIN = 2.4  # std times sqrt(fan in): strong enough that each layer moves the answer
GATE_GAIN = 1.0  # keeps sigmoids off their flat ends, where scores tie
BIAS_STD = 0.05
NORM_SPREAD = 0.2
SINK_STD = 1.0
PIECE_ELEMENTS_MAX = 1 << 24  # of a tensor, made at once
OTHER_FILES_BYTES = 64 << 20  # tokenizer and indices, at most

PRESETS: dict[Preset, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512, "max_position_embeddings": 1024, "hidden_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32,
    },
    "demo": {
        "vocab_size": 4096, "max_position_embeddings": 8192, "hidden_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "rotary_dim": 16,
        "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 256,
    },
    "bench": {
        "vocab_size": 32000, "max_position_embeddings": 32768, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "rotary_dim": 32,
        "num_local_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 384,
    },
    # MiniMax-M2 itself, with fewer layers.
    "m2-layers": {
        "vocab_size": 200064, "max_position_embeddings": 196608, "hidden_size": 3072, "num_hidden_layers": 1,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64,
        "num_local_experts": 256, "num_experts_per_tok": 8, "intermediate_size": 1536,
    },
}  # fmt: skip
DTYPES: dict[Preset, str] = {"tiny": "float32", "demo": "bfloat16", "bench": "bfloat16", "m2-layers": "bfloat16"}
WINDOWS: dict[Preset, int] = {"tiny": 24, "demo": 128, "bench": 512, "m2-layers": 512}
SLIDING_THETA = 10_000.0
SLIDING_FACTOR = 1.0
QUANTISATION: dict[str, object] = {
    "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What to make of a preset; by default its released form in the preset's dtype."""

    layers: int | None = None
    """Instead of the preset's."""
    hybrid: bool = False
    """Every other layer slides, the first one does, with a rotation of their own."""
    qk_norm: Literal["per_layer", "per_head", "none"] = "per_layer"
    sinks: bool = False
    fp8: bool = False
    """Attention projections and experts in blocks of 128 x 128, as the released ones are."""


RELEASED = Variant()


def make_checkpoint(
    preset: Preset,
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    force: bool = False,
    variant: Variant = RELEASED,
) -> None:
    """Writes the checkpoint folder `out`. With `force` it replaces a checkpoint that is there.

    Raises CheckpointError if `out` is in the way or the disk too small, ConfigError for a count of layers that
    no model has, OSError if the disk fails.
    """
    out = out.absolute()
    _check_free(out, force)
    raw = config_json(preset, variant)
    config = ModelConfig.from_dict(raw)
    _check_disk(out, config)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run that had our pid
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", raw)
        _write_json(partial / "generation_config.json", _generation_config(raw))
        write_tokenizer(partial, config.vocab_size, config.max_position_embeddings)
        _write_weights(partial, config, seed, progress)
        if force and out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_json(preset: Preset, variant: Variant = RELEASED) -> dict[str, object]:
    """The preset's config.json in the released field names. Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; accepted: {', '.join(PRESETS)}")
    sizes = dict(PRESETS[preset])
    if variant.layers is not None:
        sizes["num_hidden_layers"] = variant.layers
    raw: dict[str, object] = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        **sizes,
        "torch_dtype": DTYPES[preset],
        "rope_theta": 5_000_000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_qk_norm": variant.qk_norm != "none",
        "qk_norm_type": variant.qk_norm,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
        "sliding_window": None,
        "attn_type_list": [1] * sizes["num_hidden_layers"],
        "tie_word_embeddings": False,
        "bos_token_id": added_token_id(BOS, sizes["vocab_size"]),
        "eos_token_id": added_token_id(EOS, sizes["vocab_size"]),
        **({"quantization_config": QUANTISATION} if variant.fp8 else {}),
    }
    if variant.sinks:
        raw["attention_sinks"] = True
    if variant.hybrid:
        del raw["rotary_dim"], raw["rope_theta"]
        factor = sizes["rotary_dim"] / sizes["head_dim"]
        raw |= {
            "layer_types": [FULL if layer % 2 else SLIDING for layer in range(sizes["num_hidden_layers"])],
            "sliding_window": WINDOWS[preset],
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 5_000_000, "partial_rotary_factor": factor},
                SLIDING: {
                    "rope_type": "default", "rope_theta": SLIDING_THETA, "partial_rotary_factor": SLIDING_FACTOR,
                },
            },
        }  # fmt: skip
    return raw


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink():
        if not any(out.iterdir()):
            return
        if force and (out / "config.json").is_file():
            return
    raise CheckpointError(out, "there already", "a path that is free, or --force and an older checkpoint")


def _check_disk(out: Path, config: ModelConfig) -> None:
    folder = next(parent for parent in out.parents if parent.exists())
    needed = sum(_nbytes(name, shape, config) for name, shape in expected_shapes(config)) + OTHER_FILES_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        accepted = f"a disk with {needed / 2**30:.2f} GiB free, or fewer --layers, or a smaller --preset"
        raise CheckpointError(out, f"on a disk with {free / 2**30:.2f} GiB free", accepted)


def _generation_config(raw: dict[str, object]) -> dict[str, object]:
    return {
        "bos_token_id": raw["bos_token_id"],
        "eos_token_id": raw["eos_token_id"],
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 40,
    }


def _write_weights(folder: Path, config: ModelConfig, seed: int, progress: Progress | None) -> None:
    """One shard at a time, so that memory holds one, not the model."""
    shards = _shards(config)
    total = sum(_nbytes(name, shape, config) for shard in shards for name, shape in shard.items())
    done = 0
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            if name.endswith(SCALE_SUFFIX):
                continue  # made with the weight before it
            is_fp8, dtype = config.stores_fp8(name), _dtype(name, config)
            tensor = torch.empty(shape, dtype=torch.float32 if is_fp8 else dtype)
            if is_fp8:
                done += _nbytes(scale_name(name), shapes[scale_name(name)], config)
            for num_elements in _fill(name, tensor, seed):
                done += num_elements * dtype.itemsize
                if progress is not None:
                    progress(done, total)
            tensors |= _quantised(name, tensor) if is_fp8 else {name: tensor}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors lets only the owner read it
        weight_map |= dict.fromkeys(shapes, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _shards(config: ModelConfig) -> list[dict[str, Shape]]:
    """A weight and its scales in the same shard."""
    shards: list[dict[str, Shape]] = [{}]
    nbytes = 0
    for name, shape in expected_shapes(config):
        size = _nbytes(name, shape, config)
        if nbytes + size > SHARD_BYTES_MAX and not name.endswith(SCALE_SUFFIX):
            shards.append({})
            nbytes = 0
        shards[-1][name] = shape
        nbytes += size
    return shards


def _is_router(name: str) -> bool:
    return name.endswith(ROUTER_SUFFIXES)


def _dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The router is float32 in every checkpoint of the family; the rest is in the model's dtype."""
    if config.stores_fp8(name):
        return torch.float8_e4m3fn
    is_wide = _is_router(name) or name.endswith(SCALE_SUFFIX) or config.dtype == "float32"
    return torch.float32 if is_wide else torch.bfloat16


def _nbytes(name: str, shape: Shape, config: ModelConfig) -> int:
    return math.prod(shape) * _dtype(name, config).itemsize


def _quantised(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight in FP8, and its scales."""
    weight = quantise(tensor)
    return {name: weight.codes, scale_name(name): weight.scale_inv}


def _fill(name: str, tensor: torch.Tensor, seed: int) -> Iterator[int]:
    """Fills it piece by piece, so that memory holds little beside it; yields the elements of each piece."""
    if name.endswith("norm.weight"):
        mean, std = 1.0, NORM_SPREAD
    elif name.endswith("e_score_correction_bias"):
        mean, std = 0.0, BIAS_STD
    elif name.endswith("embed_tokens.weight"):
        mean, std = 0.0, 1.0
    elif name.endswith(".sinks"):
        mean, std = 0.0, SINK_STD
    else:
        mean, std = 0.0, (GATE_GAIN if _is_router(name) else LINEAR_GAIN) / math.sqrt(tensor.shape[-1])
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    for piece in tensor.view(-1).split(PIECE_ELEMENTS_MAX):
        values = generator.random(len(piece), np.float32)
        values -= np.float32(0.5)
        values *= np.float32(std * math.sqrt(12.0))  # a uniform variable of width 1 has variance 1/12
        values += np.float32(mean)
        piece.copy_(torch.from_numpy(values))
        yield len(piece)


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
