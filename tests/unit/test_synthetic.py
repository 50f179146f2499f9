"""make-checkpoint writes complete checkpoints in the released layout, the same from the same seed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model import synthetic, synthetic_tokenizer
from model.checkpoint import Checkpoint, expected_shapes
from model.config import ModelConfig
from model.errors import CheckpointError
from model.layer_types import FULL, SLIDING, Rope
from model.reference import Reference
from model.synthetic import Variant, config_json, make_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "tiny"
    make_checkpoint("tiny", path, seed=0)
    return path


def test_tiny_is_small(tiny: Path) -> None:
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 2_000_000


def test_bench_is_the_model_the_benchmarks_name() -> None:
    config = ModelConfig.from_dict(config_json("bench"))
    assert sum(math.prod(shape) for _, shape in expected_shapes(config)) == 748_125_696


def test_m2_layers_has_the_shapes_of_the_released_model() -> None:
    """All of it: 62 layers of this preset are the model whose weights were counted."""
    released = ModelConfig.from_dict(config_json("m2-layers", Variant(layers=62)))
    assert sum(math.prod(shape) for _, shape in expected_shapes(released)) == 228_689_764_864
    assert (released.sliding_window, released.qk_norm, released.dtype) == (None, "per_layer", "bfloat16")
    assert released.rope == {FULL: Rope(theta=5e6, rotary_dim=64)}
    assert ModelConfig.from_dict(config_json("m2-layers", Variant(layers=2))).num_layers == 2


def test_a_hybrid_slides_in_every_other_layer(tmp_path: Path) -> None:
    """With a rotation of its own; norms and sinks as told; it is complete and its text varies."""
    make_checkpoint("tiny", tmp_path / "m", variant=Variant(5, hybrid=True, qk_norm="per_head", sinks=True))
    checkpoint = Checkpoint.open(tmp_path / "m")
    config = checkpoint.config
    assert config.layer_types == (SLIDING, FULL, SLIDING, FULL, SLIDING)
    assert (config.sliding_window, config.qk_norm, config.has_sinks) == (24, "per_head", True)
    assert config.rope == {FULL: Rope(theta=5e6, rotary_dim=8), SLIDING: Rope(theta=1e4, rotary_dim=16)}
    assert checkpoint.get("model.layers.4.self_attn.sinks").std() > 0.1
    reference, token_ids = Reference(checkpoint), [20]
    for _ in range(20):
        token_ids.append(int(reference.logits(token_ids)[-1].argmax()))
    assert len(set(token_ids)) > 12


def test_a_disk_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: nearly_full)
    with pytest.raises(CheckpointError, match=r"with 1\.00 GiB free; accepted: a disk with 9\.19 GiB free"):
        make_checkpoint("m2-layers", tmp_path / "m", variant=Variant(layers=1))
    assert list(tmp_path.iterdir()) == []


def test_pieces_leave_no_trace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor too large to make at once has the same bytes."""
    monkeypatch.setattr(synthetic, "PIECE_ELEMENTS_MAX", 1000)
    make_checkpoint("tiny", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_same_seed_same_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """Bit for bit, so that a fingerprint in a test or a benchmark record means something."""
    make_checkpoint("tiny", tmp_path / "again", seed=0)
    make_checkpoint("tiny", tmp_path / "other", seed=1)
    for file in tiny.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert Checkpoint.open(tiny).fingerprint == Checkpoint.open(tmp_path / "again").fingerprint
    assert Checkpoint.open(tiny).fingerprint != Checkpoint.open(tmp_path / "other").fingerprint


def test_weights_do_not_depend_on_sharding(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor has a stream of its own, and shards are written one by one with an index."""
    monkeypatch.setattr(synthetic, "SHARD_BYTES_MAX", 200_000)
    make_checkpoint("tiny", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    whole, parts = Checkpoint.open(tiny), Checkpoint.open(tmp_path / "sharded")
    for name in whole.names():
        assert torch.equal(whole.get(name), parts.get(name))


def test_router_is_float32_in_a_bfloat16_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in every checkpoint of the family: gate and bias in float32, the bias not zero, the rest bfloat16."""
    monkeypatch.setitem(synthetic.DTYPES, "tiny", "bfloat16")
    make_checkpoint("tiny", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        is_router = ".gate." in name or name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_router else torch.bfloat16), name
        assert tensor.count_nonzero() > 0, name


def test_bfloat16_stays_near_float32(tiny: Path) -> None:
    """The reference's rounding is rounding: typical logits (of spread 2.6) move by a few hundredths."""
    token_ids = torch.randint(512, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    checkpoint = Checkpoint.open(tiny)
    exact = Reference(checkpoint, "float32").logits(token_ids)
    rounded = Reference(checkpoint, "bfloat16").logits(token_ids)
    assert 0.001 < (exact - rounded).abs().median() < 0.1


@pytest.mark.parametrize("text", ["Hello, tell me a story.", "x"])
def test_greedy_text_varies(tiny: Path, text: str) -> None:
    """A random model that repeats one token would make every parity test blind."""
    token_ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    start = len(token_ids)
    reference = Reference(Checkpoint.open(tiny))
    for _ in range(32):
        token_ids.append(int(reference.logits(token_ids)[-1].argmax()))
    assert len(set(token_ids[start:])) > 20


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    make_checkpoint("tiny", tmp_path / "m", progress=lambda done, total: calls.append((done, total)))
    checkpoint = Checkpoint.open(tmp_path / "m")
    total = checkpoint.nbytes(checkpoint.names())
    assert len(calls) == len(checkpoint.names())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {of for _, of in calls} == {total}
    assert calls[-1][0] == total


def test_a_stopped_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, _total: int) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint("tiny", tmp_path / "m", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Without force nothing is touched; with force only a checkpoint is replaced, never some other folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, force in (("mine", False), ("mine", True), ("file", True)):
        with pytest.raises(CheckpointError, match="there already; accepted: a path that is free"):
            make_checkpoint("tiny", tmp_path / name, force=force)
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_force_replaces_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint("tiny", tmp_path / "m", seed=1)
    with pytest.raises(CheckpointError):
        make_checkpoint("tiny", tmp_path / "m", seed=0)
    make_checkpoint("tiny", tmp_path / "m", seed=0, force=True)
    assert Checkpoint.open(tmp_path / "m").fingerprint == Checkpoint.open(tiny).fingerprint


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset is 'huge'; accepted: tiny, demo, bench"):
        config_json("huge")  # type: ignore[arg-type]


def test_tokenizer_is_byte_level_and_complete(tiny: Path) -> None:
    """Any text survives, every id of the vocabulary has a token, and only control tokens are special."""
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "def f(x):\n\treturn 'ä' + \"世界\" # 🙂\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == Checkpoint.open(tiny).config.vocab_size
    tagged = "]~b]ai\n<think>\na</think><minimax:tool_call>b</minimax:tool_call>[e~["
    encoded = tokenizer.encode(tagged)
    assert {*synthetic_tokenizer.PLAIN, "]~b]", "[e~["} <= set(encoded.tokens)
    kept = tokenizer.decode(encoded.ids, skip_special_tokens=True)
    assert kept == "ai\n<think>\na</think><minimax:tool_call>b</minimax:tool_call>"


def test_a_vocabulary_beyond_the_trained_one_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every id has a text that streams as its own; no input becomes one of the filling ids."""
    monkeypatch.setattr(synthetic_tokenizer, "TRAINED_VOCAB_MAX", 400)
    synthetic_tokenizer.write_tokenizer(tmp_path, 600, 1024)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.token_to_id("[e~[") == synthetic_tokenizer.added_token_id("[e~[", 600)
    assert tokenizer.decode([400, 589, 65]).startswith("unused000400unused000589")
    assert max(tokenizer.encode("unused000400 and some words").ids) < 400


def test_end_of_text_is_the_same_everywhere(tiny: Path) -> None:
    """config.json, generation_config.json and the tokenizer name one eos and one bos."""
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    eos, bos = tokenizer.token_to_id("[e~["), tokenizer.token_to_id("]~!b[")
    config = Checkpoint.open(tiny).config
    assert (config.eos_ids, config.bos_id) == ((eos,), bos)
    assert json.loads((tiny / "generation_config.json").read_text()) == {
        "bos_token_id": bos, "eos_token_id": eos,
        "do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 40,
    }  # fmt: skip
