"""What simulated workers compute: whole numbers, so that every sum is exact and every mistake is seen.

A token's hidden value goes through layers of experts as in the model; the next token is a hash of the tokens that
the worker's key-value blocks hold, the seed, and that value. So it is a function of (prompt, seed, position), and
a block that was freed while in use, a row merged twice or a token lost shows in all that follows.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.epochs import ModelShape
from model.gate import Routes

SHAPE = ModelShape("f00d", num_layers=2, num_experts=6)
OTHER_FINGERPRINT = "beef"
TOP_K = 2
HIDDEN = 2
VOCAB = 509
WEIGHTS = (0.5, 0.25)
STOPS = frozenset(range(0, VOCAB, 64))
_EXPERT_MOD, _HIDDEN_MOD = 251, 1009


def begin(tokens: Sequence[int]) -> Tensor:
    """[T, H] float32."""
    return torch.tensor([[float(token), 1.0] for token in tokens])


def gate(layer: int, hidden: Tensor) -> Routes:
    """[T, H] -> routes [T, K]."""
    ids = torch.tensor([_chosen(layer, int(value)) for value, _ in hidden.tolist()])
    return Routes(ids, torch.tensor([WEIGHTS]).expand(len(hidden), TOP_K))


def expert(layer: int, rows: Tensor, experts: Tensor) -> Tensor:
    """rows [r, H] and their experts [r] -> [r, H]."""
    pairs = zip(rows.tolist(), experts.tolist(), strict=True)
    return torch.tensor([[float(_answer(layer, int(value), expert)), 1.0] for (value, _), expert in pairs])


def add(hidden: Tensor, mixed: Tensor) -> Tensor:
    """The residual, kept small."""
    return torch.tensor([
        [(h[0] + 4 * m[0]) % _HIDDEN_MOD, 1.0] for h, m in zip(hidden.tolist(), mixed.tolist(), strict=True)
    ])  # fmt: skip


def _chosen(layer: int, value: int) -> tuple[int, int]:
    size = SHAPE.num_experts
    first = (value + layer) % size
    return first, (first + 1 + value // size % (size - 1)) % size


def _answer(layer: int, value: int, expert: int) -> int:
    return (value * (expert + 2) + layer) % _EXPERT_MOD


def next_token(seen: Sequence[int], seed: int, value: int) -> int:
    """`seen`: what the key-value blocks hold of the sequence; `value`: the last token's hidden value."""
    return zlib.crc32(array("i", seen).tobytes() + seed.to_bytes(8, "little"), value) % VOCAB


@functools.cache
def value_of(token: int) -> int:
    """A token's hidden value behind the last layer, in plain integers: what the tensors must come to."""
    value = token
    for layer in range(SHAPE.num_layers):
        answers = [_answer(layer, value, e) for e in _chosen(layer, value)]
        value = (value + int(4 * sum(w * a for w, a in zip(WEIGHTS, answers, strict=True)))) % _HIDDEN_MOD
    return value


def expected(prompt: Sequence[int], seed: int, max_tokens: int) -> list[int]:
    """What a sequence must come to: all its tokens."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens, seed, value_of(tokens[-1])))
        if tokens[-1] in STOPS:
            break
    return tokens[len(prompt) :]
