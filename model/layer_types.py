"""Which layers slide, over what window, and how each layer type turns its heads: one form of many spellings.

Hybrids of full and sliding-window attention were written down in several ways before one became usual; here
each is read once. `sliding_window` W counts the current token: position i sees j with 0 <= i - j < W.

| spelling | says |
|---|---|
| layer_types, hybrid_layer_pattern (1 slides), sliding_window_pattern p (each p-th is full) | which slide |
| sliding_window, sliding_window_size | W |
| attn_window_size: one for all layers or one each; 0, less or null is full | both |
| rope_parameters by layer type; or flat fields, with swa_rope_theta or rope_local_base_freq | rotation |

What contradicts itself is refused by name, and so is a window without a word on which layers have it.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from model.errors import ConfigError

LayerType = Literal["full_attention", "sliding_attention"]
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"

ROPE_THETA_DEFAULT = 5_000_000.0

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Theta = Annotated[float, Field(gt=1)]
Factor = Annotated[float, Field(gt=0, le=1)]


class Rope(BaseModel):
    """How the heads of one layer type turn with the position."""

    model_config = ConfigDict(frozen=True)

    theta: float
    rotary_dim: int
    """How many leading channels of each head turn: even, at most head_dim."""


class WrittenRope(BaseModel):
    """Only unscaled rotation."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: Theta | None = None
    partial_rotary_factor: Factor | None = None


class WrittenRopes(WrittenRope):
    """rope_parameters: flat, for every layer, or by layer type."""

    full_attention: WrittenRope | None = None
    sliding_attention: WrittenRope | None = None

    @property
    def is_nested(self) -> bool:
        return self.full_attention is not None or self.sliding_attention is not None


class WrittenLayers(BaseModel):
    """The fields of config.json that are read here."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    num_hidden_layers: int = Field(ge=1, le=1024)
    head_dim: Size

    layer_types: list[LayerType] | None = None
    hybrid_layer_pattern: list[Literal[0, 1]] | None = None
    sliding_window_pattern: Size | None = None
    attn_window_size: int | list[int | None] | None = None
    sliding_window: Size | None = None
    sliding_window_size: Size | None = None
    use_sliding_window: bool | None = None
    attn_type_list: list[Literal[1]] | None = None
    """1: softmax attention, windowed or not."""

    rope_theta: Theta | None = None
    rotary_dim: Size | None = None
    partial_rotary_factor: Factor | None = None
    rope_scaling: WrittenRope | None = None
    rope_parameters: WrittenRopes | None = None
    swa_rope_theta: float | None = None
    """0 or less: as rope_theta."""
    rope_local_base_freq: Theta | None = None


def read_layer_types(written: WrittenLayers, file: str) -> tuple[tuple[LayerType, ...], int | None]:
    """Each layer's type, and the window of those that slide: None where none does. Raises ConfigError."""
    patterns = _patterns(written)
    for field in (*patterns, "attn_type_list"):
        entries = getattr(written, field)
        if isinstance(entries, list) and len(entries) != written.num_hidden_layers:
            accepted = f"one entry for each of {written.num_hidden_layers} layers"
            _refuse(field, entries, accepted, file)
    said_by, slides = next(iter(patterns.items()), ("", [False] * written.num_hidden_layers))
    for field, pattern in patterns.items():
        if pattern != slides:
            _refuse(field, getattr(written, field), f"the same layers sliding as {said_by} says", file)
    windows = _windows(written)
    if windows and not patterns:
        field = next(iter(windows))
        _refuse(field, windows[field], "null, or layer_types beside it to say which layers slide", file)
    if not any(slides):
        return (FULL,) * written.num_hidden_layers, None
    if written.use_sliding_window is False:
        _refuse("use_sliding_window", False, f"true, as {said_by} lets {sum(slides)} layers slide", file)
    if not windows:
        accepted = f"a count of tokens, as {said_by} lets {sum(slides)} layers slide"
        _refuse("sliding_window", written.sliding_window, accepted, file)
    said_by, window = next(iter(windows.items()))
    for field, value in windows.items():
        if value != window:
            _refuse(field, value, f"{window}, as {said_by} says: one window for all", file)
    return tuple(SLIDING if slide else FULL for slide in slides), window


def _patterns(written: WrittenLayers) -> dict[str, list[bool]]:
    """Which layers slide, by the field that says so."""
    layers = written.num_hidden_layers
    patterns: dict[str, list[bool]] = {}
    if written.layer_types is not None:
        patterns["layer_types"] = [kind == SLIDING for kind in written.layer_types]
    if written.hybrid_layer_pattern is not None:
        patterns["hybrid_layer_pattern"] = [entry == 1 for entry in written.hybrid_layer_pattern]
    if written.sliding_window_pattern is not None:
        patterns["sliding_window_pattern"] = [(i + 1) % written.sliding_window_pattern != 0 for i in range(layers)]
    if written.attn_window_size is not None:
        sizes = written.attn_window_size
        each = sizes if isinstance(sizes, list) else [sizes] * layers
        patterns["attn_window_size"] = [size is not None and size > 0 for size in each]
    return patterns


def _windows(written: WrittenLayers) -> dict[str, int]:
    """W, by the field that says so."""
    windows = {
        field: size
        for field in ("sliding_window", "sliding_window_size")
        if (size := getattr(written, field)) is not None
    }
    sizes = written.attn_window_size
    for i, size in enumerate(sizes if isinstance(sizes, list) else [sizes]):
        if size is not None and size > 0:
            windows[f"attn_window_size.{i}" if isinstance(sizes, list) else "attn_window_size"] = size
    return windows


def read_ropes(written: WrittenLayers, layer_types: tuple[LayerType, ...], file: str) -> dict[LayerType, Rope]:
    """The rotation of each layer type there is. Raises ConfigError."""
    nested, legacy = written.rope_parameters or WrittenRopes(), written.rope_scaling or WrittenRope()
    thetas: dict[str, float] = {}  # by the field that says so
    dims: dict[str, float] = {}  # in channels
    if written.rotary_dim is not None:
        dims["rotary_dim"] = written.rotary_dim
    for prefix, source in (("", written), ("rope_parameters.", nested), ("rope_scaling.", legacy)):
        _collect(prefix, source, written.head_dim, thetas, dims)
    if nested.is_nested:
        for found in (*thetas, *dims):
            if found.startswith("rope_parameters."):
                accepted = "absent beside full_attention and sliding_attention"
                _refuse(found, (thetas | dims)[found], accepted, file)
    ropes: dict[LayerType, Rope] = {}
    for kind in sorted(set(layer_types)):
        own: tuple[dict[str, float], dict[str, float]] = {}, {}
        if nested.is_nested:
            source = getattr(nested, kind)
            if source is None:
                _refuse(f"rope_parameters.{kind}", None, f"present, as there are layers of {kind}", file)
            _collect(f"rope_parameters.{kind}.", source, written.head_dim, *own)
        if kind == SLIDING:
            own[0].update(_sliding_thetas(written, file))
            found_thetas, found_dims = own[0] or thetas, own[1] or dims
        else:
            found_thetas, found_dims = thetas | own[0], dims | own[1]
        # No spelling at all: Transformers turns the whole head, so a checkpoint saved that way means that.
        rotary_dim = _rotary_dim(found_dims or {"head_dim": float(written.head_dim)}, written.head_dim, file)
        ropes[kind] = Rope(theta=_agreed(found_thetas, "", file)[1], rotary_dim=rotary_dim)
    return ropes


def _collect(
    prefix: str,
    source: WrittenLayers | WrittenRope,
    head_dim: int,
    thetas: dict[str, float],
    dims: dict[str, float],
) -> None:
    if source.partial_rotary_factor is not None:
        dims[f"{prefix}partial_rotary_factor"] = source.partial_rotary_factor * head_dim
    if source.rope_theta is not None:
        thetas[f"{prefix}rope_theta"] = source.rope_theta


def _sliding_thetas(written: WrittenLayers, file: str) -> dict[str, float]:
    thetas: dict[str, float] = {}
    if written.swa_rope_theta is not None and written.swa_rope_theta > 0:
        if written.swa_rope_theta <= 1:
            _refuse("swa_rope_theta", written.swa_rope_theta, "greater than 1, or 0 for that of rope_theta", file)
        thetas["swa_rope_theta"] = written.swa_rope_theta
    if written.rope_local_base_freq is not None:
        thetas["rope_local_base_freq"] = written.rope_local_base_freq
    return thetas


def _agreed(found: dict[str, float], unit: str, file: str) -> tuple[str, float]:
    """(field, value) of what all spellings say; two that disagree are refused."""
    first, expected = next(iter(found.items()), ("", ROPE_THETA_DEFAULT))
    for field, value in found.items():
        if abs(value - expected) > 1e-6 * expected:
            raise ConfigError(field, f"{value:g}{unit}", f"{expected:g}{unit}, as {first} says", file)
    return first, expected


def _rotary_dim(found: dict[str, float], head_dim: int, file: str) -> int:
    field, dim = _agreed(found, " channels", file)
    rotary_dim = round(dim)
    if abs(dim - rotary_dim) > 1e-6 or rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        accepted = f"an even count of rotary channels, 2 to {head_dim} (head_dim)"
        raise ConfigError(field, f"{dim:g} channels", accepted, file)
    return rotary_dim


def _refuse(field: str, value: object, accepted: str, file: str) -> NoReturn:
    raise ConfigError(field, json.dumps(value), accepted, file)
