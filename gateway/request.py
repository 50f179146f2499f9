"""What a client asked, once validated, and what comes back for it. Plain values: no text, no wire."""

from __future__ import annotations

import enum
import hashlib
import math
import struct
from dataclasses import dataclass, replace
from typing import NamedTuple


class FinishReason(enum.Enum):
    STOP = "stop"  # eos, a stop token id, or a stop string
    LENGTH = "length"
    CANCELLED = "cancelled"  # by plan: the sequence was moved away
    FAILED = "failed"  # refused or given up by the worker; `detail` says why


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the highest logit. top_p 1, top_k 0, min_p 0: all tokens. seed: unsigned 64 bits.

    Repetition is penalised over prompt and generated tokens (1: not), frequency and presence over generated ones
    (0: not). `logit_bias`: (token, added to its logit), each token once. `allowed_token_ids`: nothing else is
    sampled, unless it is empty. `bad_words`: token sequences that are not generated to their end.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Grammar:
    """What the generated tokens must be together: a thought, where it can end, and behind it `text`."""

    text: str  # as llguidance reads it; empty: anything
    eos: tuple[int, ...]  # what may follow when it is complete
    thought_ends: tuple[int, ...] = ()  # the first to come ends the thought; none: there is no thought
    thought_tokens_max: int = 0  # then the first of its ends is forced
    barred: tuple[int, ...] = ()  # from the thought


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt and the n sequences wanted for it. `stop_token_ids` holds eos too unless it is ignored."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int  # generated tokens of each sequence
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None  # None: none; 0: the sampled token's; k: and the k likeliest
    priority: int = 0  # lower runs earlier
    tenant: str = ""  # whose share of the cluster serves it
    min_tokens: int = 0  # generated tokens before which neither a stop token nor a stop string ends a sequence
    cache_salt: str = ""  # cached prefixes are shared among requests of one salt
    num_prompt_logprobs: int | None = None  # None: none; 0: those of the prompt's tokens; k: and the k likeliest
    time_s: float = math.inf  # from its admission to its deadline
    grammar: Grammar | None = None  # None: any tokens


class PromptLogprob(NamedTuple):
    """What the model made of one token of the prompt. `rank` 1: none was likelier. `top`: (token, logprob) pairs,
    likeliest first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenDelta:
    """New tokens of one attempt from `position` on; 0 is the first generated token.

    `logprobs` and `top_logprobs` have one entry per token where asked for, else none; a `top_logprobs`
    entry is (token, logprob) pairs, likeliest first. `finish` belongs to the last token, or to none when
    a resumed sequence turns out to be over. `num_cached`: with position 0, prompt tokens that were not computed.

    One with `prompt_logprobs` has no tokens: they are of the prompt's tokens from `prompt_position` on.
    """

    request_id: str
    index: int
    attempt: int
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish: FinishReason | None = None
    detail: str = ""
    num_cached: int = 0
    prompt_position: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()

    def since(self, position: int) -> TokenDelta:
        """The same without what lies before `position` (which is inside it, or at its end)."""
        skip = position - self.position
        return TokenDelta(
            self.request_id,
            self.index,
            self.attempt,
            position,
            self.tokens[skip:],
            self.logprobs[skip:],
            self.top_logprobs[skip:],
            self.finish,
            self.detail,
            0 if skip else self.num_cached,
        )

    def scores_since(self, prompt_position: int) -> TokenDelta:
        """Likewise of its prompt's logprobs."""
        skip = prompt_position - self.prompt_position
        return replace(self, prompt_position=prompt_position, prompt_logprobs=self.prompt_logprobs[skip:])


def sibling_seed(seed: int, index: int) -> int:
    """The seed of a request's sequence `index`: its own for 0, so that n does not change the first answer.

    Otherwise the first 8 bytes, little-endian, of BLAKE2b over both numbers as little-endian 64-bit words.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest(), "little")
