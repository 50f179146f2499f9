"""The oracle against an implementation we did not write: Transformers' MiniMaxM2ForCausalLM, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MiniMaxM2ForCausalLM

from model.checkpoint import Checkpoint
from model.reference import Reference
from model.synthetic import make_checkpoint
from tests.parity.transformers_oracle import oracle_logits, save_random_model

PROMPT_LENGTHS = (1, 2, 3, 16, 17, 64, 130)
DIFFERENCE_MAX = 1e-4


def prompt(length: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("rotary_fraction", [0.25, 0.5, 1.0])
def test_logits_equal_transformers(tmp_path: Path, rotary_fraction: float) -> None:
    """A checkpoint saved by Transformers and loaded unchanged gives its logits, at every position."""
    model = save_random_model(tmp_path, rotary_fraction=rotary_fraction, seed=int(rotary_fraction * 100))
    reference = Reference(Checkpoint.open(tmp_path))
    for length in PROMPT_LENGTHS:
        token_ids = prompt(length, model.config.vocab_size)
        expected = oracle_logits(model, token_ids)
        assert expected.std() > 1, "a flat oracle would agree with anything"
        assert (reference.logits(token_ids) - expected).abs().max() <= DIFFERENCE_MAX


def test_rotation_matters_to_the_comparison(tmp_path: Path) -> None:
    """A model that turned the wrong share of each head would be caught: logits move far more than allowed."""
    half = save_random_model(tmp_path / "half", rotary_fraction=0.5, seed=7)
    save_random_model(tmp_path / "whole", rotary_fraction=1.0, seed=7)
    token_ids = prompt(64, half.config.vocab_size)
    whole = Reference(Checkpoint.open(tmp_path / "whole")).logits(token_ids)
    assert (whole - oracle_logits(half, token_ids)).abs().max() > 0.1


def test_gate_gaps_are_those_of_transformers_router(tmp_path: Path) -> None:
    """The gaps tell how far each layer's choice of experts was from another, as Transformers scored them."""
    model = save_random_model(tmp_path, rotary_fraction=0.5, seed=3)
    scores: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _gate, inputs, output: scores.append(output[0].sigmoid() + inputs[1])
        )
    token_ids = prompt(40, model.config.vocab_size)
    oracle_logits(model, token_ids)
    ranked = torch.stack(scores, dim=1).sort(dim=-1, descending=True).values  # [T, L, E]
    count = model.config.num_experts_per_tok
    gaps = Reference(Checkpoint.open(tmp_path)).trace(token_ids).gate_gaps
    torch.testing.assert_close(gaps, ranked[..., count - 1] - ranked[..., count], atol=1e-5, rtol=0)


def test_transformers_runs_our_checkpoints(tmp_path: Path) -> None:
    """What make-checkpoint writes is the released layout: Transformers loads it and computes the same."""
    make_checkpoint("tiny", tmp_path / "tiny", seed=5)
    model, report = MiniMaxM2ForCausalLM.from_pretrained(
        tmp_path / "tiny", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), "a name that Transformers misses, adds or cannot place"
    reference = Reference(Checkpoint.open(tmp_path / "tiny"))
    token_ids = prompt(130, model.config.vocab_size)
    difference = (reference.logits(token_ids) - oracle_logits(model.eval(), token_ids)).abs().max()
    assert difference <= DIFFERENCE_MAX


def test_transformers_reads_our_tokenizer(tmp_path: Path) -> None:
    """Tokenizer, special tokens and chat template load from the folder, and special means special."""
    make_checkpoint("tiny", tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    messages = [{"role": "user", "content": "Grüße, 世界"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=True).endswith("Grüße, 世界\nai\n<think>\n")
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("[e~[", "]~!b[")
