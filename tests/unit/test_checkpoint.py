"""A checkpoint folder is checked when it is opened, read where asked for, and named by its content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    attention_tensor_names,
    expert_tensor_names,
)
from model.errors import CheckpointError
from model.shard import read_shard
from model.synthetic import Variant, make_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.7.w1.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint("tiny", path)
    return path


@pytest.fixture
def single(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "single"))


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same tensors in two files: experts in the second."""
    tensors = load_file(single / SINGLE_FILE)
    (single / SINGLE_FILE).unlink()
    files = {name: f"part-{2 if '.experts.' in name else 1}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, single / file)
    (single / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    return single


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / SINGLE_FILE).items()}
    change(tensors)
    save_file(tensors, path / SINGLE_FILE)


def edit_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX_FILE).read_text())
    change(index["weight_map"])
    (path / INDEX_FILE).write_text(json.dumps(index))


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert "; accepted: " in str(caught.value)
    return caught.value


def write_shard(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    (path / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def head_norms(tmp_path: Path) -> Path:
    """Norms of heads with shared gains, and sinks."""
    make_checkpoint("tiny", tmp_path / "m", variant=Variant(qk_norm="per_head", sinks=True))
    return tmp_path / "m"


def test_head_norms_may_be_shared_or_each_heads_own(head_norms: Path) -> None:
    """Of head_dim 16, or 4 heads of 16; nothing else."""
    name = "model.layers.0.self_attn.q_norm.weight"
    assert Checkpoint.open(head_norms).get(name).shape == (16,)
    edit(head_norms, lambda tensors: tensors.update({name: torch.ones(64)}))
    assert Checkpoint.open(head_norms).get(name).shape == (64,)
    edit(head_norms, lambda tensors: tensors.update({name: torch.ones(32)}))
    assert "of shape [32]; accepted: shape [16] or [64]" in str(refusal(head_norms))


def test_sinks_are_there_when_and_only_when_config_says_so(head_norms: Path, single: Path) -> None:
    name = "model.layers.2.self_attn.sinks"
    assert Checkpoint.open(head_norms).get(name).shape == (4,)
    edit(head_norms, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is absent" in str(refusal(head_norms))
    edit(single, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert f"tensor {name} is unknown" in str(refusal(single))
    assert "attention_sinks: true" in str(refusal(single))


def test_the_two_roles_share_no_tensor_and_leave_none_out(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    config = checkpoint.config
    attention = attention_tensor_names(config)
    experts = [
        name
        for layer in range(config.num_layers)
        for expert in range(config.num_experts)
        for name in expert_tensor_names(config, layer, expert)
    ]
    assert sorted([*attention, *experts]) == sorted(checkpoint.names())
    assert len(set(checkpoint.names())) == len(attention) + len(experts)
    assert checkpoint.nbytes(experts) == len(experts) * 32 * 64 * 4
    stored = sum(tensor.nbytes for tensor in load_file(single / SINGLE_FILE).values())
    assert checkpoint.nbytes(attention) + checkpoint.nbytes(experts) == stored


def test_tensors_are_mapped_not_copied(single: Path) -> None:
    """Asking twice gives the same bytes of the same mapping: no worker holds a second copy of weights."""
    checkpoint = Checkpoint.open(single)
    stored = load_file(single / SINGLE_FILE)
    for name in checkpoint.names():
        torch.testing.assert_close(checkpoint.get(name), stored[name], rtol=0, atol=0)
        assert checkpoint.get(name).dtype == stored[name].dtype
    assert checkpoint.get(Q_PROJ).data_ptr() == checkpoint.get(Q_PROJ).data_ptr()


def test_a_role_reads_only_the_files_of_its_tensors(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    (sharded / "part-2.safetensors").unlink()
    for name in attention_tensor_names(checkpoint.config):
        checkpoint.get(name)
    with pytest.raises(CheckpointError, match=r"part-2\.safetensors: tensor .*experts\.0\.w1"):
        checkpoint.get(expert_tensor_names(checkpoint.config, 0, 0)[0])


def test_sharded_and_single_hold_the_same(tiny: Path, sharded: Path) -> None:
    one, two = Checkpoint.open(tiny), Checkpoint.open(sharded)
    assert one.names() == two.names()
    assert one.fingerprint != two.fingerprint, "another layout is another checkpoint"
    torch.testing.assert_close(one.get(EXPERT), two.get(EXPERT), rtol=0, atol=0)


def test_fingerprint_depends_on_content_not_on_place_or_time(tiny: Path, single: Path) -> None:
    os.utime(single / SINGLE_FILE, (1, 1))
    assert Checkpoint.open(single).fingerprint == Checkpoint.open(tiny).fingerprint


@pytest.mark.parametrize("whole_shard_bytes_max", [1 << 30, 0])
@pytest.mark.parametrize("name", ["lm_head.weight", Q_PROJ, "model.layers.0.block_sparse_moe.gate.weight", EXPERT])
def test_fingerprint_sees_changed_weights(
    tiny: Path, single: Path, name: str, whole_shard_bytes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether shards are hashed whole or, as large ones are, by samples."""
    monkeypatch.setattr("model.checkpoint.WHOLE_SHARD_BYTES_MAX", whole_shard_bytes_max)
    edit(single, lambda tensors: tensors[name].mul_(1.01))
    assert Checkpoint.open(single).fingerprint != Checkpoint.open(tiny).fingerprint


def test_fingerprint_sees_the_config(tiny: Path, single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "rope_theta": 10000}))
    assert Checkpoint.open(single).fingerprint != Checkpoint.open(tiny).fingerprint


def test_tokenizer_may_be_absent(single: Path) -> None:
    assert Checkpoint.open(single).has_tokenizer
    (single / "tokenizer.json").unlink()
    assert not Checkpoint.open(single).has_tokenizer


def test_prediction_modules_beyond_the_last_layer_are_left_aside(single: Path) -> None:
    edit(single, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}))
    assert "model.layers.3.eh_proj.weight" not in Checkpoint.open(single).names()


@pytest.mark.parametrize(
    ("change", "tensor", "found", "accepted"),
    [
        (lambda t: t.pop(EXPERT), EXPERT, "absent", "present with shape [32, 64]"),
        (lambda t: t.update({EXPERT: torch.zeros(64, 32)}), EXPERT, "of shape [64, 32]", "shape [32, 64]"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].double()}), Q_PROJ, "of dtype F64", "dtype BF16 or F32"),
        (
            lambda t: t.update({"model.layers.2.mlp.extra": torch.zeros(1)}),
            "model.layers.2.mlp.extra",
            "unknown",
            "only the tensors that config.json calls for",
        ),
    ],
)
def test_tensors_must_be_those_of_the_config(
    single: Path, change: Callable[[Tensors], object], tensor: str, found: str, accepted: str
) -> None:
    edit(single, change)
    error = refusal(single)
    assert (error.tensor, error.found, error.accepted) == (tensor, found, accepted)
    assert str(single) in str(error)


def test_truncated_file_names_the_first_tensor_lost(single: Path) -> None:
    size = (single / SINGLE_FILE).stat().st_size
    last = list(read_shard(single / SINGLE_FILE).tensors)[-1]
    os.truncate(single / SINGLE_FILE, size - 1)
    error = refusal(single)
    assert (error.file, error.tensor) == (single / SINGLE_FILE, last)
    assert error.found == f"truncated: the file has {size - 1} bytes, it ends at {size}"


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_file_cut_within_its_header_is_refused(single: Path, size: int) -> None:
    os.truncate(single / SINGLE_FILE, size)
    assert "truncated or no safetensors file" in refusal(single).found


def test_longer_file_is_refused(single: Path) -> None:
    with (single / SINGLE_FILE).open("ab") as file:
        file.write(b"\0")
    assert refusal(single).accepted.endswith("bytes, where its last tensor ends")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "without a header object"),
        ({"a": 3}, "tensor a is 3; accepted: {dtype, shape, data_offsets}"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "accepted: {dtype, shape, data_offsets}"),
        (
            {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}},
            "tensor a is dtype F4; accepted: one of BOOL",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"accepted: 8 bytes, as F32 \[2\] takes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "at bytes -4 to 0"),
        (
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            "tensor b is at byte .*, where the last one ends",
        ),
    ],
)
def test_malformed_headers_are_refused(single: Path, header: object, message: str) -> None:
    write_shard(single, header, bytes(6))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(single)


def test_header_length_is_bounded_before_it_is_read(single: Path) -> None:
    (single / SINGLE_FILE).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    assert "no safetensors file" in refusal(single).found


def test_no_weights_at_all(single: Path) -> None:
    (single / SINGLE_FILE).unlink()
    error = refusal(single)
    assert error.file == single / INDEX_FILE
    assert error.accepted.startswith("model.safetensors or model.safetensors.index.json")


def test_no_such_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").file == tmp_path / "nowhere" / "config.json"


def test_missing_shard_is_named_with_a_tensor_it_should_hold(sharded: Path) -> None:
    (sharded / "part-2.safetensors").unlink()
    error = refusal(sharded)
    assert (error.file.name, error.found) == ("part-2.safetensors", "missing")
    assert error.tensor is not None
    assert ".experts." in error.tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update({Q_PROJ: "part-2.safetensors"}),
            "part-1.safetensors: tensor .* is here; accepted: part-2",
        ),
        (lambda m: m.pop(Q_PROJ), "is here; accepted: nowhere else, as model.safetensors.index.json says"),
        (
            lambda m: m.update(more="part-1.safetensors"),
            "part-1.safetensors: tensor more is absent; accepted: in this",
        ),
        (lambda m: m.update(more="../other.safetensors"), "accepted: a .safetensors file in this folder"),
        (lambda m: m.update(more="/etc/passwd"), "accepted: a .safetensors file in this folder"),
        (lambda m: m.update(more=["part-1.safetensors"]), "accepted: a .safetensors file in this folder"),
        (lambda m: m.clear(), "without a weight_map"),
    ],
)
def test_index_must_agree_with_the_shards(
    sharded: Path, change: Callable[[dict[str, str]], object], message: str
) -> None:
    edit_index(sharded, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sharded)


def test_index_must_be_json(sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text("{")
    assert refusal(sharded).found.startswith("not JSON")


def test_unknown_name_is_refused(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.9\.w is absent"):
        checkpoint.get("model.layers.9.w")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.9\.w is absent"):
        checkpoint.nbytes(["model.layers.9.w"])
