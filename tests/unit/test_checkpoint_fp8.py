"""FP8 checkpoints: weights and their scales are checked, together and by name, from tiny to the released size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, expected_shapes, expert_weight_names
from model.config import ModelConfig
from model.device import HOST
from model.errors import CheckpointError
from model.fp8 import Fp8Weight
from model.reference import Reference
from model.shard import ITEM_BYTES, read_shard
from model.synthetic import Variant, config_json, make_checkpoint
from tests.unit.test_model_config import FP8, RELEASED

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.7.w1.weight"
SCALE = EXPERT + "_scale_inv"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "tiny"
    make_checkpoint("tiny", path, variant=Variant(fp8=True))
    return path


@pytest.fixture
def single(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "single"))


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / SINGLE_FILE).items()}
    change(tensors)
    save_file(tensors, path / SINGLE_FILE)


def refusal(act: Callable[[], object]) -> tuple[str | None, str, str]:
    with pytest.raises(CheckpointError) as caught:
        act()
    return caught.value.tensor, caught.value.found, caught.value.accepted


def test_what_is_made_is_the_released_layout(tiny: Path) -> None:
    """FP8 with float32 scales where the released checkpoints have them, the router in float32."""
    tensors = load_file(tiny / SINGLE_FILE)
    assert json.loads((tiny / "config.json").read_text())["quantization_config"] == FP8
    for name, tensor in tensors.items():
        is_fp8 = name.endswith(
            tuple(f".{m}.weight" for m in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"))
        )
        assert (tensor.dtype == torch.float8_e4m3fn) == is_fp8, name
        assert (f"{name}_scale_inv" in tensors) == is_fp8
        if is_fp8:
            assert tensors[f"{name}_scale_inv"].shape == tuple(-(-side // 128) for side in tensor.shape)


def test_quantised_weights_are_those_of_the_same_seed(tiny: Path, tmp_path: Path) -> None:
    """Within half a step of a code; what is not quantised is the same."""
    make_checkpoint("tiny", tmp_path / "wide")
    wide, fp8 = Checkpoint.open(tmp_path / "wide"), Checkpoint.open(tiny)
    for name in wide.names():
        weight = fp8.weight(name, HOST)
        if isinstance(weight, Fp8Weight):
            step = torch.maximum(wide.get(name).abs() / 16, weight.scale_inv.max() * 2.0**-10)
            assert ((weight.dequantised(torch.float32) - wide.get(name)).abs() <= step).all()
        else:
            assert torch.equal(weight, wide.get(name))
    assert fp8.nbytes(fp8.names()) < 0.6 * wide.nbytes(wide.names())


def test_weights_do_not_depend_on_sharding(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight and its scales stay in one shard; progress ends at the whole."""
    monkeypatch.setattr("model.synthetic.SHARD_BYTES_MAX", 60_000)
    calls: list[tuple[int, int]] = []
    make_checkpoint(
        "tiny", tmp_path / "parts", progress=lambda *sizes: calls.append(sizes), variant=Variant(fp8=True)
    )
    whole, parts = Checkpoint.open(tiny), Checkpoint.open(tmp_path / "parts")
    assert calls[-1] == (whole.nbytes(whole.names()),) * 2
    for name in whole.names():
        assert torch.equal(whole.get(name).view(torch.uint8), parts.get(name).view(torch.uint8))
    files = json.loads((tmp_path / "parts" / INDEX_FILE).read_text())["weight_map"]
    assert len(set(files.values())) > 3
    assert all(files[name] == files[name.removesuffix("_scale_inv")] for name in files)


def test_the_reference_dequantises_for_itself(tiny: Path, tmp_path: Path) -> None:
    """Its logits are those of a checkpoint dequantised here, by the definition's own words."""
    shutil.copytree(tiny, tmp_path / "wide")
    tensors = load_file(tiny / SINGLE_FILE)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), tensors[name.removesuffix("_scale_inv")].float()
        for i in range(weight.shape[0]):
            for j in range(0, weight.shape[1], 128):
                weight[i, j : j + 128] *= scale[i // 128, j // 128]
        tensors[name.removesuffix("_scale_inv")] = weight
    save_file(tensors, tmp_path / "wide" / SINGLE_FILE)
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config_json("tiny")))
    ids = [(31 * i) % 500 for i in range(40)]
    logits, expected = (Reference(Checkpoint.open(path)).logits(ids) for path in (tiny, tmp_path / "wide"))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # the library's sums depend on addresses


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda t: t.pop(SCALE), (SCALE, "absent", "present with shape [1, 1]")),
        (lambda t: t.update({SCALE: torch.ones(1, 2)}), (SCALE, "of shape [1, 2]", "shape [1, 1]")),
        (lambda t: t.update({SCALE: t[SCALE].bfloat16()}), (SCALE, "of dtype BF16", "dtype F32")),
        (lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}), (EXPERT, "of dtype BF16", "dtype F8_E4M3")),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].float().to(torch.float8_e5m2)}),
            (Q_PROJ, "of dtype F8_E5M2", "dtype F8_E4M3"),
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            ("lm_head.weight", "of dtype F8_E4M3", "dtype BF16 or F32"),
        ),
        *(
            (
                lambda t, name=name: t.update({name: torch.ones(1, 1)}),
                (name, "unknown", "only the tensors that config.json calls for"),
            )
            for name in (
                "model.layers.1.self_attn.k_proj.k_scale",
                "model.layers.1.self_attn.v_proj.v_scale",
                "model.layers.1.self_attn.q_norm.weight_scale_inv",
                "lm_head.weight_scale_inv",
            )
        ),
    ],
)
def test_weights_and_scales_must_be_those_of_the_config(
    single: Path, change: Callable[[Tensors], object], refused: tuple[str, str, str]
) -> None:
    edit(single, change)
    assert refusal(lambda: Checkpoint.open(single)) == refused


def test_scales_of_layers_beyond_the_last_are_left_aside(single: Path) -> None:
    name = "model.layers.3.block_sparse_moe.experts.0.w1.weight_scale_inv"
    edit(single, lambda tensors: tensors.update({name: torch.ones(1, 1)}))
    assert name not in Checkpoint.open(single).names()


def test_excepted_modules_lie_in_the_models_dtype(single: Path) -> None:
    """And are refused in FP8: config.json and files must say the same."""
    config = config_json("tiny", Variant(fp8=True))
    config["quantization_config"] = {**FP8, "modules_to_not_convert": ["gate", "lm_head", "self_attn"]}
    (single / "config.json").write_text(json.dumps(config))
    [name, found, _] = refusal(lambda: Checkpoint.open(single))
    assert (name, found) == ("model.layers.0.self_attn.q_proj.weight", "of dtype F8_E4M3")

    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".self_attn." in name]:
            if name.endswith("_scale_inv"):
                del tensors[name]
            else:
                tensors[name] = tensors[name].bfloat16()

    edit(single, widen)
    assert Checkpoint.open(single).get(Q_PROJ).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("value", "said"), [(torch.nan, "nan"), (torch.inf, "inf"), (0.0, "0"), (-0.5, "-0.5"), (128.0, "128")]
)
def test_a_scale_that_is_none_is_refused_when_it_is_read(single: Path, value: float, said: str) -> None:
    edit(single, lambda tensors: tensors[SCALE].fill_(value))
    checkpoint = Checkpoint.open(single)
    accepted = "scales above 0 and below 128"
    assert refusal(lambda: checkpoint.weight(EXPERT, HOST)) == (SCALE, f"{said} at [0, 0]", accepted)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_refused_when_it_is_loaded(single: Path, code: int) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[EXPERT].view(torch.uint8)[3, 5] = code

    edit(single, spoil)
    checkpoint = Checkpoint.open(single)
    assert refusal(lambda: checkpoint.weight(EXPERT, HOST)) == (EXPERT, "not finite (NaN)", "finite FP8 codes")


# --- the released checkpoint, as files with holes --------------------------------------------------

NUM_LAYERS = 62
PREDICTION = f"model.layers.{NUM_LAYERS}.eh_proj.weight"
Entries = dict[str, tuple[str, tuple[int, ...]]]  # name to (dtype, shape)


def write_released(path: Path, num_layers: int, num_shards: int) -> None:
    """Every tensor of the released FP8 checkpoint up to some layer, one of a prediction module; no contents."""
    path.mkdir()
    layers = {"num_hidden_layers": num_layers, "attn_type_list": [1] * num_layers}
    raw = {**RELEASED, **layers, "quantization_config": FP8}
    (path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_dict(raw)
    entries = {name: (released_dtype(config, name), shape) for name, shape in expected_shapes(config)}
    entries[PREDICTION] = ("BF16", (3072, 6144))
    names = list(entries)
    each = -(-len(names) // num_shards)
    weight_map = {}
    for number in range(num_shards):
        mine = names[number * each : (number + 1) * each]
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        write_sparse(path / file, {name: entries[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def released_dtype(config: ModelConfig, name: str) -> str:
    if config.stores_fp8(name):
        return "F8_E4M3"
    return "F32" if name.endswith(("_scale_inv", "gate.weight", "correction_bias")) else "BF16"


def write_sparse(file: Path, entries: Entries) -> None:
    header, at = {}, 0
    for name, (dtype, shape) in entries.items():
        size = ITEM_BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def test_the_released_checkpoint_is_accepted(tmp_path: Path) -> None:
    """All 96,103 tensors; its sizes are those its makers tell: 230 GB, of which the experts are 225."""
    released = tmp_path / "released"
    write_released(released, NUM_LAYERS, 126)
    checkpoint = Checkpoint.open(released)
    names = checkpoint.names()
    assert len(names) == 96_103
    assert PREDICTION not in names
    assert checkpoint.nbytes(names) == 230_121_630_720
    assert checkpoint.nbytes(name for name in names if ".experts." in name) == 224_735_330_304
    assert len(expert_weight_names(checkpoint.config, 61, 255)) == 3
    assert sum(file.stat().st_blocks * 512 for file in released.iterdir()) < 40 << 20, "holes take no room"


LAST = "model.layers.3.block_sparse_moe.experts.255.w2.weight_scale_inv"
EXTRA = "model.layers.3.self_attn.v_proj.v_scale"


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda e: e.update({LAST: ("F32", (12, 24))}), (LAST, "of shape [12, 24]", "shape [24, 12]")),
        (
            lambda e: e.update({EXTRA: ("F32", ())}),
            (EXTRA, "unknown", "only the tensors that config.json calls for"),
        ),
    ],
)
def test_one_defect_among_them_is_named(
    tmp_path: Path, change: Callable[[Entries], object], refused: tuple[str, str, str]
) -> None:
    """In the last of its shards; of four layers, for the way there is the same."""
    path = tmp_path / "released"
    write_released(path, num_layers=4, num_shards=8)
    last = path / "model-00008-of-00008.safetensors"
    entries = {name: (entry.dtype, entry.shape) for name, entry in read_shard(last).tensors.items()}
    change(entries)
    write_sparse(last, entries)
    weight_map = json.loads((path / INDEX_FILE).read_text())["weight_map"] | dict.fromkeys(entries, last.name)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(lambda: Checkpoint.open(path)) == refused
