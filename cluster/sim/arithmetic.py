"""What simulated workers compute: whole numbers, so that every sum is exact and every mistake is seen.

A token's hidden value goes through layers of experts as in the model; the next token is a hash of the tokens that
the worker's key-value blocks hold, the seed, and that value. So it is a function of (prompt, seed, position), and a
block that was freed while in use, a row merged twice or a token lost shows in all that follows.
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
    value = hidden[:, 0].to(torch.int64)
    first = (value + layer) % SHAPE.num_experts
    step = 1 + value // SHAPE.num_experts % (SHAPE.num_experts - 1)
    ids = torch.stack((first, (first + step) % SHAPE.num_experts), dim=1)
    return Routes(ids, torch.tensor([WEIGHTS]).expand(len(hidden), TOP_K))


def expert(layer: int, rows: Tensor, experts: Tensor) -> Tensor:
    """rows [r, H] and their experts [r] -> [r, H]."""
    value = (rows[:, 0] * (experts + 2) + layer) % _EXPERT_MOD
    return torch.stack((value, torch.ones(len(rows))), dim=1)


def add(hidden: Tensor, mixed: Tensor) -> Tensor:
    """The residual, kept small."""
    out = hidden.clone()
    out[:, 0] = (hidden[:, 0] + 4 * mixed[:, 0]) % _HIDDEN_MOD
    return out


def next_token(seen: Sequence[int], seed: int, value: int) -> int:
    """`seen`: what the key-value blocks hold of the sequence; `value`: the last token's hidden value."""
    return zlib.crc32(array("i", seen).tobytes() + seed.to_bytes(8, "little"), value) % VOCAB


@functools.cache
def value_of(token: int) -> int:
    """A token's hidden value behind the last layer, in plain integers: what the tensors must come to."""
    value, size = token, SHAPE.num_experts
    for layer in range(SHAPE.num_layers):
        first = (value + layer) % size
        chosen = (first, (first + 1 + value // size % (size - 1)) % size)
        answers = [(value * (e + 2) + layer) % _EXPERT_MOD for e in chosen]
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
