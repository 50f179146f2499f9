"""A checkpoint folder: the tensors of one model, read by memory map, only where asked for.

`Checkpoint.open` reads config.json, the shard index and every shard's header, and refuses what does not fit
together: nothing is found missing later, in the middle of loading. Contents are mapped, not copied; a page
comes into memory when it is used. Knows which tensors each role needs, nothing of what is done with them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import ModelConfig, parse_config, read_config
from model.errors import CheckpointError
from model.fp8 import BLOCK, SCALE_MAX, Fp8Weight, Weight
from model.shard import Shard, TensorEntry, read_shard

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
INDEX_BYTES_MAX = 1 << 28
DTYPES = ("BF16", "F32")
SCALE_SUFFIX = ".weight_scale_inv"
ROUTER_SUFFIXES = ("gate.weight", "e_score_correction_bias")
"""Of what is computed in float32 whatever dtype is served."""
WHOLE_SHARD_BYTES_MAX = 8 << 20
SAMPLE_BYTES = 4096
EXPERT_SAMPLES_MAX = 128  # per shard

Shape = tuple[int, ...]


def attention_tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All that an attention worker loads: everything but the experts, in order of use.

    Norms of heads are given with shared gains; `own_gains` is the other shape they may have.
    """
    return dict(_with_scales(config, _attention_weight_shapes(config)))


def _attention_weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        attention, moe = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.block_sparse_moe"
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{attention}.q_proj.weight"] = (q, hidden)
        shapes[f"{attention}.k_proj.weight"] = (kv, hidden)
        shapes[f"{attention}.v_proj.weight"] = (kv, hidden)
        if config.qk_norm != "none":
            shared = config.qk_norm == "per_head"
            shapes[f"{attention}.q_norm.weight"] = (config.head_dim if shared else q,)
            shapes[f"{attention}.k_norm.weight"] = (config.head_dim if shared else kv,)
        if config.has_sinks:
            shapes[f"{attention}.sinks"] = (config.num_heads,)
        shapes[f"{attention}.o_proj.weight"] = (hidden, q)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{moe}.gate.weight"] = (config.num_experts, hidden)
        if config.use_routing_bias:
            shapes[f"{moe}.e_score_correction_bias"] = (config.num_experts,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def own_gains(config: ModelConfig, name: str) -> Shape | None:
    """The shape of a head norm's weight where each head has gains of its own; None for any other tensor."""
    if config.qk_norm == "per_head" and name.endswith(("q_norm.weight", "k_norm.weight")):
        return (config.q_size if name.endswith("q_norm.weight") else config.kv_size,)
    return None


def expert_tensor_shapes(config: ModelConfig, layer: int, expert: int) -> dict[str, Shape]:
    """w1 (gate), w2 (down), w3 (up) of one expert, each followed by its scales if it has some."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    up, down = (config.expert_hidden, config.hidden_size), (config.hidden_size, config.expert_hidden)
    weights = {f"{prefix}.w1.weight": up, f"{prefix}.w2.weight": down, f"{prefix}.w3.weight": up}
    return dict(_with_scales(config, weights))


def _with_scales(config: ModelConfig, weights: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    for name, shape in weights.items():
        yield name, shape
        if config.stores_fp8(name):
            yield scale_name(name), tuple(math.ceil(side / BLOCK) for side in shape)


def scale_name(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}{SCALE_SUFFIX}"


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the model, attention side first."""
    yield from attention_tensor_shapes(config).items()
    for layer in range(config.num_layers):
        for expert in range(config.num_experts):
            yield from expert_tensor_shapes(config, layer, expert).items()


def attention_tensor_names(config: ModelConfig) -> tuple[str, ...]:
    return tuple(attention_tensor_shapes(config))


def expert_tensor_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, ...]:
    """Of all that belongs to one expert."""
    return tuple(expert_tensor_shapes(config, layer, expert))


def expert_weight_names(config: ModelConfig, layer: int, expert: int) -> tuple[str, ...]:
    """The names of (w1, w2, w3)."""
    return tuple(name for name in expert_tensor_names(config, layer, expert) if not name.endswith(SCALE_SUFFIX))


class Checkpoint:
    """An opened, checked checkpoint. Cheap to hold: it maps shards when their tensors are first asked for."""

    def __init__(self, path: Path, config: ModelConfig, fingerprint: str, shards: dict[str, Shard]) -> None:
        """Use `open`. `shards`: for every tensor of the model the file it lies in."""
        self.path = path
        self.config = config
        self.fingerprint = fingerprint
        self.has_tokenizer = (path / TOKENIZER_FILE).is_file()
        self._shards = shards
        self._maps: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens the checkpoint in folder `path`. Raises CheckpointError or ConfigError."""
        content = read_config(path)
        config = parse_config(content, path)
        shards = _read_shards(path)
        placed = _place_tensors(path, config, shards)
        try:
            fingerprint = _fingerprint(content, shards)
        except OSError as error:
            raise CheckpointError(path, f"unreadable ({error.strerror})", "readable shards") from error
        return cls(path, config, fingerprint, placed)

    def names(self) -> tuple[str, ...]:
        """Every tensor of the model, attention side first."""
        return tuple(self._shards)

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors as they are stored."""
        return sum(entry.end - entry.begin for entry in map(self.entry, names))

    def get(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, backed by the file: do not write to it. Raises CheckpointError."""
        self.entry(name)
        file = self._shards[name].path
        try:
            if file not in self._maps:
                self._maps[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._maps[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(file, f"unreadable ({error})", "the file as it was opened", name) from error
        return tensor

    def weight(self, name: str, device: torch.device) -> Weight:
        """As `get`, but on the device: copied there straight from the mapped file, unless it is the host.

        One stored in FP8 comes with its scales, the values of both checked.
        """
        tensor = self.get(name)
        if not self.config.stores_fp8(name):
            return tensor.to(device)
        scale = self.get(scale_name(name))
        is_usable = (scale > 0) & (scale < SCALE_MAX)
        if not is_usable.all():
            at = (~is_usable).nonzero()[0].tolist()
            found, accepted = f"{scale[tuple(at)].item():g} at {at}", f"scales above 0 and below {SCALE_MAX:g}"
            raise CheckpointError(self._shards[scale_name(name)].path, found, accepted, scale_name(name))
        weight = Fp8Weight(tensor, scale).to(device)
        if not weight.is_finite():
            raise CheckpointError(self._shards[name].path, "not finite (NaN)", "finite FP8 codes", name)
        return weight

    def entry(self, name: str) -> TensorEntry:
        """How the tensor is stored. Raises CheckpointError for a name that is not the model's."""
        shard = self._shards.get(name)
        if shard is None:
            raise CheckpointError(self.path, "absent", "one of names()", name)
        return shard.tensors[name]


def _read_shards(path: Path) -> list[Shard]:
    """The shards in order of file name: each tensor in one of them, in that which the index says."""
    if (path / SINGLE_FILE).is_file():
        return [read_shard(path / SINGLE_FILE)]
    weight_map = _read_index(path / INDEX_FILE)
    a_tensor_of = {file: name for name, file in weight_map.items()}
    for file, name in a_tensor_of.items():
        if not (path / file).is_file():
            raise CheckpointError(path / file, "missing", f"in this file, as {INDEX_FILE} says", name)
    shards = [read_shard(path / file) for file in sorted(a_tensor_of)]
    for shard in shards:
        file = shard.path.name
        for name in shard.tensors:
            place = weight_map.pop(name, "nowhere else")
            if place != file:
                raise CheckpointError(shard.path, "here", f"{place}, as {INDEX_FILE} says", name)
    for name, file in weight_map.items():
        raise CheckpointError(path / file, "absent", f"in this file, as {INDEX_FILE} says", name)
    return shards


def _read_index(file: Path) -> dict[str, str]:
    accepted = f"{SINGLE_FILE} or {INDEX_FILE} with a weight_map from tensor names to file names beside it"
    try:
        with file.open("rb") as stream:
            content = stream.read(INDEX_BYTES_MAX + 1)
    except OSError as error:
        raise CheckpointError(file, f"unreadable ({error.strerror})", accepted) from error
    if len(content) > INDEX_BYTES_MAX:
        raise CheckpointError(file, "longer", f"at most {INDEX_BYTES_MAX} bytes")
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"not JSON ({error})", accepted) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(file, "without a weight_map", accepted)
    accepted_files: set[object] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in accepted_files:
            continue
        if not isinstance(shard, str) or PurePath(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(file, f"in {json.dumps(shard)}", "a .safetensors file in this folder", name)
        accepted_files.add(shard)
    return dict(weight_map)


def _place_tensors(path: Path, config: ModelConfig, shards: list[Shard]) -> dict[str, Shard]:
    """name -> shard for exactly the tensors of the model, each of the expected shape."""
    found = {name: shard for shard in shards for name in shard.tensors}
    placed: dict[str, Shard] = {}
    for name, shape in expected_shapes(config):
        shard = found.pop(name, None)
        if shard is None:
            raise CheckpointError(path, "absent", f"present with shape {list(shape)}", name)
        entry = shard.tensors[name]
        if entry.shape not in (shape, own := own_gains(config, name)):
            accepted = f"shape {list(shape)}" + (f" or {list(own)}" if own else "")
            raise CheckpointError(shard.path, f"of shape {list(entry.shape)}", accepted, name)
        dtypes = _dtypes(config, name)
        if entry.dtype not in dtypes:
            raise CheckpointError(shard.path, f"of dtype {entry.dtype}", f"dtype {' or '.join(dtypes)}", name)
        placed[name] = shard
    for name, shard in found.items():
        if not _is_beyond(name, config.num_layers):
            accepted = "only the tensors that config.json calls for"
            if name.endswith(".self_attn.sinks"):
                accepted += ", which for this one is attention_sinks: true"
            raise CheckpointError(shard.path, "unknown", accepted, name)
    return placed


def _is_beyond(name: str, num_layers: int) -> bool:
    """Layers after the last are multi-token-prediction modules, which we do not run."""
    match name.split("."):
        case ["model", "layers", index, *_] if index.isascii() and index.isdigit() and len(index) < 10:
            return int(index) >= num_layers
    return False


def _dtypes(config: ModelConfig, name: str) -> tuple[str, ...]:
    if name.endswith(SCALE_SUFFIX):
        return ("F32",)
    return ("F8_E4M3",) if config.stores_fp8(name) else DTYPES


def _fingerprint(config: bytes, shards: list[Shard]) -> str:
    """Names the checkpoint: 32 hex digits over config.json and each shard's name, size, header and contents.

    Contents: shards of up to 8 MiB whole; of larger ones up to 4 KiB from the middle of every tensor outside
    the experts and of at most 128 expert tensors, evenly spread. So two fine-tunes of one model differ, for
    some thousand small reads; a change to a few expert tensors of a large checkpoint may go unseen.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (config, *(piece for shard in shards for piece in _identity(shard))):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _identity(shard: Shard) -> Iterator[bytes]:
    yield shard.path.name.encode()
    yield shard.nbytes.to_bytes(8, "little")
    yield shard.header
    with shard.path.open("rb") as file:
        if shard.nbytes <= WHOLE_SHARD_BYTES_MAX:
            yield file.read()
            return
        for entry in _sampled(shard):
            length = min(SAMPLE_BYTES, entry.end - entry.begin)
            file.seek((entry.begin + entry.end - length) // 2)
            yield file.read(length)


def _sampled(shard: Shard) -> list[TensorEntry]:
    experts = [entry for name, entry in shard.tensors.items() if ".experts." in name]
    others = [entry for name, entry in shard.tensors.items() if ".experts." not in name]
    stride = max(1, math.ceil(len(experts) / EXPERT_SAMPLES_MAX))
    return others + experts[::stride]
