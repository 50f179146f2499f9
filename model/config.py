"""ModelConfig: what a checkpoint's config.json says, normalised once.

Accepts the released MiniMax-M2 layout and what Transformers >= 5.18 saves, and fills absent fields as the
family means them: Transformers leaves out use_qk_norm, scoring_func and use_routing_bias because its code
always has them, so absent means on. What would change the mathematics and is not implemented is refused by
name; fields that no M2 implementation reads (mtp, dropout, layernorm betas, ...) have no effect here either.
The released models attend in full on every layer; hybrids with sliding windows are the family's other form
(`model/layer_types.py`).

Does not read weights and does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from model.errors import CheckpointError, ConfigError
from model.layer_types import LayerType, Rope, Size, WrittenLayers, read_layer_types, read_ropes

CONFIG_BYTES_MAX = 1 << 20

FP8_WEIGHTS = tuple(
    f".{module}.weight" for module in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
)  # fmt: skip

ALIASES = {"num_experts": "num_local_experts", "torch_dtype": "dtype"}

Modules = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=4096),
    BeforeValidator(lambda names: [] if names is None else names),
]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=1 << 31)]],
    BeforeValidator(lambda ids: ids if isinstance(ids, list) else [] if ids is None else [ids]),
]


class ModelConfig(BaseModel):
    """The shape of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Query head i reads key-value head i // (num_heads // num_kv_heads)."""
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    qk_norm: Literal["per_layer", "per_head", "none"]
    """Before heads are turned. per_layer: one RMS over all heads of q, one over all heads of k. per_head: an RMS
    of each head; the length of q_norm and k_norm says whether heads share their gains (head_dim) or have their
    own (heads x head_dim). Gains are plain, not 1 + weight, in both."""
    has_sinks: bool
    """Whether each query head has a learned logit that takes part in its softmax and carries no value."""
    use_routing_bias: bool
    """Whether a per-expert bias is added to the scores for the choice of experts (never to their weights)."""
    dtype: Literal["float32", "bfloat16"]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """As config.json gives them, empty on the released M2: there the tokenizer knows. May lie beyond the
    vocabulary (Transformers' defaults do on small models), where they can never be sampled."""
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None
    """Tokens that a sliding layer sees, the current one included; None where no layer slides."""
    rope: dict[LayerType, Rope]
    """Of each layer type there is."""
    is_fp8: bool
    """Whether linear layers are stored in FP8 blocks of 128 x 128 (`model/fp8.py`)."""
    not_fp8: tuple[str, ...]
    """Modules that are not: each a component of a tensor's name, or several in a row (`layers.0.self_attn`)."""

    def stores_fp8(self, name: str) -> bool:
        """Whether this weight lies in FP8: attention projections and experts, unless config.json excepts them.

        Whole components are compared: `gate` says nothing of `gate_up_proj`.
        """
        if not self.is_fp8 or not name.endswith(FP8_WEIGHTS):
            return False
        components = f".{name}."
        return not any(f".{module}." in components for module in self.not_fp8)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layers_of(self, layer_type: LayerType) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == layer_type]

    @classmethod
    def from_dict(cls, raw: object, file: str = "config.json") -> ModelConfig:
        """Normalises the parsed JSON of a config.json; `file` is only named in errors. Raises ConfigError."""
        if not isinstance(raw, Mapping):
            raise ConfigError("(top level)", _as_json(raw), "a JSON object", file)
        try:
            written = _Written.model_validate(_without_aliases(raw, file))
        except ValidationError as error:
            _refuse_first(error, raw, file)
        _check_relations(written, file)
        layer_types, sliding_window = read_layer_types(written, file)
        quantised = written.quantization_config
        return cls(
            vocab_size=written.vocab_size,
            hidden_size=written.hidden_size,
            num_layers=written.num_hidden_layers,
            num_heads=written.num_attention_heads,
            num_kv_heads=written.num_key_value_heads,
            head_dim=written.head_dim,
            max_position_embeddings=written.max_position_embeddings,
            rms_norm_eps=written.rms_norm_eps,
            num_experts=written.num_local_experts,
            experts_per_token=written.num_experts_per_tok,
            expert_hidden=written.intermediate_size,
            qk_norm=written.qk_norm_type if written.use_qk_norm else "none",
            has_sinks=written.attention_sinks,
            use_routing_bias=written.use_routing_bias,
            dtype=written.dtype,
            bos_id=written.bos_token_id,
            eos_ids=tuple(written.eos_token_id),
            layer_types=layer_types,
            sliding_window=sliding_window,
            rope=read_ropes(written, layer_types, file),
            is_fp8=quantised is not None,
            not_fp8=tuple(quantised.modules_to_not_convert) if quantised else (),
        )


def load_config(path: Path) -> ModelConfig:
    """The configuration of the checkpoint in folder `path`. Raises CheckpointError or ConfigError."""
    return parse_config(read_config(path), path)


def read_config(path: Path) -> bytes:
    """The bytes of `path`/config.json. Raises CheckpointError where there is no such file of sane size."""
    file = path / "config.json"
    accepted = f"a JSON object of at most {CONFIG_BYTES_MAX} bytes"
    try:
        with file.open("rb") as stream:
            content = stream.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise CheckpointError(file, f"unreadable ({error.strerror})", accepted) from error
    if len(content) > CONFIG_BYTES_MAX:
        raise CheckpointError(file, "longer", accepted)
    return content


def parse_config(content: bytes, path: Path) -> ModelConfig:
    """ModelConfig from the bytes of config.json in folder `path`. Raises CheckpointError or ConfigError."""
    file = path / "config.json"
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"not JSON ({error})", "a JSON object") from error
    return ModelConfig.from_dict(raw, str(file))


class _Quantization(BaseModel):
    """quantization_config: only the scheme of the released checkpoints.

    `activation_scheme` and `dequantize` tell a loader how to compute; here activations are never quantised.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    quant_method: Literal["fp8"]
    fmt: Literal["float8_e4m3fn"] = "float8_e4m3fn"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: list[Literal[128]] = Field(min_length=2, max_length=2)
    modules_to_not_convert: Modules = []
    dequantize: bool = False


class _Written(WrittenLayers):
    """config.json as written: the type of a field is what we accept, its default what absence means."""

    model_type: Literal["minimax_m2"]
    vocab_size: Size
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    intermediate_size: Size
    num_local_experts: int = Field(ge=1, le=4096)
    num_experts_per_tok: Size
    max_position_embeddings: Size
    rms_norm_eps: float = Field(1e-6, gt=0, le=0.1)
    hidden_act: Literal["silu"] = "silu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    bos_token_id: int | None = Field(default=None, ge=0)
    eos_token_id: TokenIds = Field(default_factory=list)

    use_qk_norm: bool = True
    qk_norm_type: Literal["per_layer", "per_head", "none"] = "per_layer"
    attention_sinks: bool = False
    scoring_func: Literal["sigmoid"] = "sigmoid"
    use_routing_bias: bool = True

    quantization_config: _Quantization | None = None

    # Parts that related models have and this family has not: only the value that leaves them out.
    tie_word_embeddings: Literal[False] = False
    attention_bias: Literal[False] = False
    shared_intermediate_size: Literal[0] = 0
    n_shared_experts: Literal[0] | None = None
    first_k_dense_replace: Literal[0] | None = None
    n_group: Literal[1] | None = None
    topk_group: Literal[1] | None = None
    norm_topk_prob: Literal[True] = True
    routed_scaling_factor: float = Field(1.0, ge=1, le=1)
    attn_logit_softcapping: None = None
    attention_value_scale: None = None
    gating: Literal[False] | None = None
    add_full_attention_sink_bias: Literal[False] | None = None
    add_swa_attention_sink_bias: Literal[False] | None = None
    final_logit_softcapping: None = None
    swiglu_limit: None = None
    partial_rotary_factors: None = None
    """One for each layer."""
    attention_other_setting: None = None
    mlp_layer_types: list[Literal["sparse"]] | None = None

    # Sliding layers have the heads of all others: absent, or the same number.
    swa_num_attention_heads: Size | None = None
    swa_num_key_value_heads: Size | None = None
    swa_head_dim: Size | None = None
    swa_v_head_dim: Size | None = None


def _without_aliases(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    fields = dict(raw)
    for alias, name in ALIASES.items():
        if alias in fields:
            value = fields.pop(alias)
            if fields.setdefault(name, value) != value:
                raise ConfigError(alias, _as_json(value), f"{_as_json(fields[name])}, as {name} says", file)
    return fields


def _refuse_first(error: ValidationError, raw: Mapping[str, Any], file: str) -> NoReturn:
    details: ErrorDetails = error.errors(include_url=False)[0]
    as_written = {name: alias for alias, name in ALIASES.items() if alias in raw}
    field = ".".join(as_written.get(str(part), str(part)) for part in details["loc"])
    value = "absent" if details["type"] == "missing" else _as_json(details["input"])
    accepted = {"missing": "a value", "extra_forbidden": "absent"}.get(details["type"], details["msg"])
    accepted = re.sub(r"^Input should be | or instance of \w+$", "", accepted)
    for python, written in (("None", "null"), ("True", "true"), ("False", "false")):
        accepted = accepted.replace(python, written)
    raise ConfigError(field, value, accepted, file) from error


def _check_relations(written: _Written, file: str) -> None:
    def require(held: bool, field: str, accepted: str) -> None:
        if not held:
            raise ConfigError(field, _as_json(getattr(written, field)), accepted, file)

    heads = written.num_attention_heads
    require(heads % written.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of {heads} heads")
    for field, own in (
        ("swa_num_attention_heads", heads),
        ("swa_num_key_value_heads", written.num_key_value_heads),
        ("swa_head_dim", written.head_dim),
        ("swa_v_head_dim", written.head_dim),
    ):
        require(getattr(written, field) in (None, own), field, f"{own}, as in layers that do not slide")
    experts = written.num_local_experts
    require(written.num_experts_per_tok <= experts, "num_experts_per_tok", f"at most {experts} experts")
    if written.qk_norm_type == "none" and "use_qk_norm" in written.model_fields_set:
        require(not written.use_qk_norm, "qk_norm_type", "per_layer or per_head, as use_qk_norm is true")


def _as_json(value: object) -> str:
    return json.dumps(value, default=repr)
