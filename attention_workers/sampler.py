"""Logits to a token: a function of (logits, parameters, seed, position), with no state between calls.

Each row is computed alone, in float64 and in one order, so that neither the batch nor a replay shows.
The uniform number comes from Philox keyed by the sequence's seed, counted by position.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attention_workers.step import Logprobs, Sampling
from model import exact

_PREFIX = 512
"""Likeliest tokens looked at first for top_p: the whole vocabulary is sorted only when they fall short."""


def sample(logits: Tensor, position: int, params: Sampling) -> int:
    """logits [V] float32; `position` counts generated tokens from 0."""
    if params.temperature == 0.0:
        return int(torch.argmax(logits))  # the first of equals
    if params.top_k == 0 and params.top_p >= 1.0:
        ids = np.arange(len(logits))
        weights = _weights(logits.numpy(), float(logits.max()), params.temperature)
    else:
        ids, weights = _nucleus(logits, params)
    cumulative = np.cumsum(weights)
    drawn = uniform(params.seed, position) * cumulative[-1]
    return int(ids[min(int(np.searchsorted(cumulative, drawn, side="right")), len(ids) - 1)])


def uniform(seed: int, position: int) -> float:
    """In [0, 1), the same for the same seed and position anywhere."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _weights(logits: np.ndarray, highest: float, temperature: float) -> np.ndarray:
    """Unnormalised probabilities in float64. numpy's float64 exp is the same alone and in an array of any size
    only element by element from whole blocks, so tails are padded."""
    x = (logits.astype(np.float64) - highest) / temperature
    pad = -len(x) % 64
    return np.exp(np.concatenate((x, np.zeros(pad))))[: len(x)]


def _nucleus(logits: Tensor, params: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and weights left by top_k and then top_p, likeliest first, ties to the lower id."""
    vocabulary = len(logits)
    highest = float(logits.max())
    count = min(params.top_k or _PREFIX, vocabulary)
    ids, values = likeliest(logits, count)
    weights = _weights(values, highest, params.temperature)
    if params.top_p < 1.0:
        # The mass is of what top_k left; without top_k, of the whole vocabulary.
        mass = (
            float(weights.sum())
            if params.top_k
            else float(np.cumsum(_weights(logits.numpy(), highest, params.temperature))[-1])
        )
        target = params.top_p * mass
        if not params.top_k and np.cumsum(weights)[-1] < target and count < vocabulary:
            ids, values = likeliest(logits, vocabulary)
            weights = _weights(values, highest, params.temperature)
        kept = int(np.searchsorted(np.cumsum(weights), target)) + 1
        ids, weights = ids[:kept], weights[:kept]
    return ids, weights


def likeliest(logits: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the `count` highest, highest first, equals by lower id: no library order involved."""
    if count < len(logits):
        threshold = torch.topk(logits, count).values[-1]
        above = torch.nonzero(logits > threshold).flatten()
        equal = torch.nonzero(logits == threshold).flatten()[: count - len(above)]
        ids = torch.cat((above, equal)).numpy()
    else:
        ids = np.arange(len(logits))
    values = logits.numpy()[ids]
    order = np.lexsort((ids, -values))
    return ids[order], values[order]


def logprobs(logits: Tensor, tokens: list[int], counts: list[int | None]) -> list[Logprobs | None]:
    """Of raw logits [n, V], before temperature and cuts, for the rows that ask for them."""
    rows = [i for i, count in enumerate(counts) if count is not None]
    found: list[Logprobs | None] = [None] * len(tokens)
    if not rows:
        return found
    all_logprobs = exact.log_softmax(logits[rows])
    for i, row in zip(rows, all_logprobs, strict=True):
        count = min(counts[i] or 0, len(row))
        ids, values = likeliest(row, count) if count else (np.empty(0), np.empty(0))
        top = tuple((int(t), float(v)) for t, v in zip(ids, values, strict=True))
        found[i] = Logprobs(float(row[tokens[i]]), top)
    return found
