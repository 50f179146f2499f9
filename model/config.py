"""ModelConfig: what a checkpoint's config.json says, normalised once.

Accepts the released MiniMax-M2 layout and what Transformers >= 5.18 saves, and fills absent fields as the
family means them: Transformers leaves out use_qk_norm, scoring_func and use_routing_bias because its code
always has them, so absent means on. What would change the mathematics and is not implemented is refused by
name; fields that no M2 implementation reads (mtp, dropout, layernorm betas, ...) have no effect here either.

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

CONFIG_BYTES_MAX = 1 << 20
ROPE_THETA_DEFAULT = 5_000_000.0

FP8_WEIGHTS = tuple(
    f".{module}.weight" for module in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
)  # fmt: skip

ALIASES = {"num_experts": "num_local_experts", "torch_dtype": "dtype"}

Size = Annotated[int, Field(ge=1, le=1 << 24)]
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
    rotary_dim: int
    """How many leading channels of each head turn with the position: even, at most head_dim."""
    rope_theta: float
    max_position_embeddings: int
    rms_norm_eps: float
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    qk_norm: Literal["per_layer", "none"]
    """per_layer: one RMS over all heads of q, one over all heads of k, before heads are split and turned."""
    use_routing_bias: bool
    """Whether a per-expert bias is added to the scores for the choice of experts (never to their weights)."""
    dtype: Literal["float32", "bfloat16"]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """As config.json gives them, empty on the released M2: there the tokenizer knows. May lie beyond the
    vocabulary (Transformers' defaults do on small models), where they can never be sampled."""
    layer_types: tuple[str, ...]
    """One of "full_attention" per layer."""
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
        return not any(f".{module}." in f".{name}." for module in self.not_fp8)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

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
        rotary_dim, rope_theta = _rope(written, file)
        quantised = written.quantization_config
        return cls(
            vocab_size=written.vocab_size,
            hidden_size=written.hidden_size,
            num_layers=written.num_hidden_layers,
            num_heads=written.num_attention_heads,
            num_kv_heads=written.num_key_value_heads,
            head_dim=written.head_dim,
            rotary_dim=rotary_dim,
            rope_theta=rope_theta,
            max_position_embeddings=written.max_position_embeddings,
            rms_norm_eps=written.rms_norm_eps,
            num_experts=written.num_local_experts,
            experts_per_token=written.num_experts_per_tok,
            expert_hidden=written.intermediate_size,
            qk_norm=written.qk_norm_type if written.use_qk_norm else "none",
            use_routing_bias=written.use_routing_bias,
            dtype=written.dtype,
            bos_id=written.bos_token_id,
            eos_ids=tuple(written.eos_token_id),
            layer_types=("full_attention",) * written.num_hidden_layers,
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


class _Rope(BaseModel):
    """rope_parameters or the older rope_scaling: only unscaled rotation."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: float | None = Field(default=None, gt=1)
    partial_rotary_factor: float | None = Field(default=None, gt=0, le=1)


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


class _Written(BaseModel):
    """config.json as written: the type of a field is what we accept, its default what absence means."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model_type: Literal["minimax_m2"]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    num_local_experts: int = Field(ge=1, le=4096)
    num_experts_per_tok: Size
    max_position_embeddings: Size
    rms_norm_eps: float = Field(1e-6, gt=0, le=0.1)
    hidden_act: Literal["silu"] = "silu"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    bos_token_id: int | None = Field(default=None, ge=0)
    eos_token_id: TokenIds = []

    use_qk_norm: bool = True
    qk_norm_type: Literal["per_layer"] = "per_layer"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    use_routing_bias: bool = True

    rope_theta: float | None = Field(default=None, gt=1)
    rotary_dim: Size | None = None
    partial_rotary_factor: float | None = Field(default=None, gt=0, le=1)
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None

    layer_types: list[Literal["full_attention"]] | None = None
    attn_type_list: list[Literal[1]] | None = None
    sliding_window: None = None
    attn_window_size: None = None
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
    final_logit_softcapping: None = None


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

    heads, layers = written.num_attention_heads, written.num_hidden_layers
    require(heads % written.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of {heads} heads")
    experts = written.num_local_experts
    require(written.num_experts_per_tok <= experts, "num_experts_per_tok", f"at most {experts} experts")
    for field in ("layer_types", "attn_type_list"):
        kinds = getattr(written, field)
        require(kinds is None or len(kinds) == layers, field, f"one entry for each of {layers} layers")


def _rope(written: _Written, file: str) -> tuple[int, float]:
    """(rotary_dim, rope_theta) from whichever spellings are present; two that disagree are refused."""
    nested = written.rope_parameters or _Rope()
    legacy = written.rope_scaling or _Rope()
    dims: dict[str, float] = {}  # in channels, by the field that says so
    thetas: dict[str, float] = {}
    if written.rotary_dim is not None:
        dims["rotary_dim"] = written.rotary_dim
    for prefix, source in (("", written), ("rope_parameters.", nested), ("rope_scaling.", legacy)):
        if source.partial_rotary_factor is not None:
            dims[f"{prefix}partial_rotary_factor"] = source.partial_rotary_factor * written.head_dim
        if source.rope_theta is not None:
            thetas[f"{prefix}rope_theta"] = source.rope_theta
    for found, unit in ((dims, " channels"), (thetas, "")):
        for field, value in found.items():
            first, expected = next(iter(found.items()))
            if abs(value - expected) > 1e-6 * expected:
                raise ConfigError(field, f"{value:g}{unit}", f"{expected:g}{unit}, as {first} says", file)
    # Neither spelling: Transformers turns the whole head, so a checkpoint saved that way means that.
    field, dim = next(iter(dims.items()), ("head_dim", float(written.head_dim)))
    rotary_dim = round(dim)
    if abs(dim - rotary_dim) > 1e-6 or rotary_dim % 2 or not 2 <= rotary_dim <= written.head_dim:
        accepted = f"an even count of rotary channels, 2 to {written.head_dim} (head_dim)"
        raise ConfigError(field, f"{dim:g} channels", accepted, file)
    return rotary_dim, next(iter(thetas.values()), ROPE_THETA_DEFAULT)


def _as_json(value: object) -> str:
    return json.dumps(value, default=repr)
