"""Logits to a token: a function of (logits, parameters, the sequence's tokens, seed, position), without a state.

Each row is computed alone, in float64 and in one order, so that neither the batch nor a replay shows.
The uniform number comes from Philox keyed by the sequence's seed, counted by position.

The order is vLLM's (its `v1.sample.sampler`), where order matters: all but `allowed_token_ids`, what would
complete a bad word, stop tokens before `min_tokens`, what a grammar does not allow are ruled out; `logit_bias` is
added; repetition, then frequency, then presence penalties; temperature; `min_p`, `top_k`, `top_p`.
Greedy sampling ends before the temperature. Logprobs are the model's own, from before all of this.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from attention_workers.step import Logprobs, PromptLogprob, Sampling
from attention_workers.token_counts import TokenCounts
from model import exact

_PREFIX = 512
"""Likeliest tokens looked at first for top_p: the whole vocabulary is sorted only when they fall short."""


def shaped(
    logits: Tensor,
    params: Sampling,
    ruled_out: Collection[int],
    counts: TokenCounts,
    bad: Collection[int] = (),
    by_grammar: np.ndarray | None = None,
) -> Tensor:
    """logits [V] float32 as rules, biases and penalties leave them: [V] float64, or themselves without any.

    `ruled_out` must leave a token that is allowed. `bad`: tokens that would complete a bad word; they give way
    where nothing else is left. `by_grammar`: what a grammar allows, [V] bool; where the other rules leave nothing
    of it, it alone holds. Penalties are as OpenAI (frequency, presence) and CTRL (repetition) have them.
    """
    if not (ruled_out or params.reshapes or by_grammar is not None):
        return logits
    x = logits.numpy().astype(np.float64)
    if params.allowed_token_ids:
        allowed, x = x[params.allowed], np.full_like(x, -np.inf)
        x[params.allowed] = allowed
    x[list(ruled_out)] = -np.inf
    if bad:
        before, x[list(bad)] = x[list(bad)], -np.inf
        if x.max() == -np.inf:
            x[list(bad)] = before
    if by_grammar is not None:
        x = np.where(by_grammar, x, -np.inf)
        if x.max() == -np.inf:
            x = np.where(by_grammar, logits.numpy().astype(np.float64), -np.inf)
    for token, bias in params.logit_bias:
        x[token] += bias
    if params.penalises:
        ids, generated = counts.ids, counts.generated
        penalised = x[ids]
        strength = params.repetition_penalty
        penalised = np.where(penalised > 0, penalised / strength, penalised * strength)
        penalised -= params.frequency_penalty * generated
        x[ids] = penalised - params.presence_penalty * (generated > 0)
    return torch.from_numpy(x)


def sample(logits: Tensor, position: int, params: Sampling) -> int:
    """logits [V], shaped; `position` counts generated tokens from 0."""
    if params.temperature == 0.0:
        return int(torch.argmax(logits))  # the first of equals
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        x = logits.numpy()
        # Shaped ones may rule out most of the vocabulary; what weighs nothing adds nothing to the sums below.
        ids = np.flatnonzero(x > -np.inf) if x.dtype == np.float64 else np.arange(len(x))
        weights = _weights(x[ids] if len(ids) < len(x) else x, float(logits.max()), params.temperature)
    else:
        ids, weights = _nucleus(logits, params)
    cumulative = np.cumsum(weights)
    drawn = uniform(params.seed, position) * cumulative[-1]
    last = int(np.searchsorted(cumulative, cumulative[-1]))  # the last with any weight
    return int(ids[min(int(np.searchsorted(cumulative, drawn, side="right")), last)])


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
    """Token ids and weights left by min_p, top_k and then top_p, likeliest first, ties to the lower id."""
    vocabulary = len(logits)
    highest = float(logits.max())
    is_cut = bool(params.top_k or params.min_p)
    count = min(params.top_k or (vocabulary if is_cut else _PREFIX), vocabulary)
    if params.min_p:
        x = (logits.numpy().astype(np.float64) - highest) / params.temperature
        count = min(count, int((x >= math.log(params.min_p)).sum()))
    ids, values = likeliest(logits, count)
    weights = _weights(values, highest, params.temperature)
    if params.top_p < 1.0:
        # The mass is of what the cuts before left; without any, of the whole vocabulary.
        mass = (
            float(weights.sum())
            if is_cut
            else float(np.cumsum(_weights(logits.numpy(), highest, params.temperature))[-1])
        )
        target = params.top_p * mass
        if not is_cut and np.cumsum(weights)[-1] < target and count < vocabulary:
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


def prompt_logprobs(logits: Tensor, tokens: list[int], count: int) -> tuple[PromptLogprob, ...]:
    """Of raw logits [n, V]: what they make of the token that came after each, and their `count` likeliest."""
    found = []
    for token, row in zip(tokens, exact.log_softmax(logits), strict=True):
        rank = 1 + int((row > row[token]).sum())
        found.append(PromptLogprob(float(row[token]), rank, _top(row, count)))
    return tuple(found)


def logprobs(logits: Tensor, tokens: list[int], counts: list[int | None]) -> list[Logprobs | None]:
    """Of raw logits [n, V], before temperature and cuts, for the rows that ask for them."""
    rows = [i for i, count in enumerate(counts) if count is not None]
    found: list[Logprobs | None] = [None] * len(tokens)
    if not rows:
        return found
    all_logprobs = exact.log_softmax(logits[rows])
    for i, row in zip(rows, all_logprobs, strict=True):
        found[i] = Logprobs(float(row[tokens[i]]), _top(row, counts[i] or 0))
    return found


def _top(row: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens of logprobs [V], with them."""
    if not count:
        return ()
    ids, values = likeliest(row, min(count, len(row)))
    return tuple((int(t), float(v)) for t, v in zip(ids, values, strict=True))
