"""What the gateway knows of the model it fronts: names, limits, defaults, tokenizer and template. No tensors."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.errors import CheckpointUnreadable
from gateway.grammar_judge import GrammarJudge
from gateway.parsers.tags import Tags, find_tags
from gateway.request import Sampling
from gateway.template import ChatTemplate, load_template, read_json, spelled
from gateway.tokens import EOS, TOKENIZER, Tokens, load_tokens


@dataclass(frozen=True)
class ModelCard:
    """`context`: longest prompt and answer together that the checkpoint allows, in tokens."""

    name: str
    fingerprint: str
    vocab_size: int
    context: int
    eos: frozenset[int] = frozenset()
    defaults: Sampling = field(default_factory=Sampling)
    tokens: Tokens | None = None
    template: ChatTemplate | None = None
    tags: Tags | None = None  # None: answers are not divided into thought, content and calls
    judge: GrammarJudge | None = None  # None: without a tokenizer, or an end, answers cannot be held to a grammar
    created: int = field(default_factory=lambda: int(time.time()))


def read_model_card(folder: Path, *, name: str, fingerprint: str, vocab_size: int, context: int) -> ModelCard:
    """Raises CheckpointUnreadable naming the file.

    Released configs may name no eos, so it is also taken from the tokenizer, by its string.
    """
    tokens = load_tokens(folder)
    generation = read_json(folder / "generation_config.json")
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    eos = _ids(read_json(folder / "config.json"), "config.json", vocab_size)
    eos |= _ids(generation, "generation_config.json", vocab_size)
    if tokens is not None:
        names = (EOS, spelled(tokenizer_config.get("eos_token")))
        eos |= {i for name in names if name is not None and (i := tokens.id_of(name)) is not None}
    defaults = Sampling(
        temperature=_number(generation, "temperature", 1.0, 0.0, 1e6),
        top_p=_number(generation, "top_p", 1.0, 0.0, 1.0) or 1.0,
        top_k=min(int(_number(generation, "top_k", 0, 0, 2**31)), vocab_size),
        min_p=_number(generation, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(generation, "repetition_penalty", 1.0, 0.01, 100.0),
    )
    tags = find_tags(tokens.id_of) if tokens is not None else None
    judge = None
    if tokens is not None and eos:
        judge = GrammarJudge(folder / TOKENIZER, vocab_size, sorted(eos))
    template = load_template(folder)
    return ModelCard(name, fingerprint, vocab_size, context, eos, defaults, tokens, template, tags, judge)


def _ids(config: dict[str, Any], file: str, vocab_size: int) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointUnreadable(file, f"eos_token_id is {value!r}; accepted: token ids below {vocab_size}")
    return frozenset(ids)


def _number(config: dict[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most:
        raise CheckpointUnreadable(
            "generation_config.json", f"{key} is {value!r}; accepted: a number from {least:g} to {most:g}"
        )
    return float(value)
