"""Which tokens a client wants ruled out: words that must not come, the only ids that may, and that some are left.

Raises BadRequest, naming field, value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from gateway.config import GatewayConfig
from gateway.errors import invalid
from gateway.model_card import ModelCard
from gateway.prompts import Prompts, token_ids
from gateway.request import Sampling

Word = tuple[int, ...]


def bad_words(words: Sequence[str], prompts: Prompts, config: GatewayConfig) -> tuple[Word, ...]:
    """The token sequences of words that must not be generated: as vLLM has it, of each as it stands alone, and
    with a space before it where that makes another sequence of as many tokens."""
    if len(words) > config.bad_words_max:
        raise invalid("bad_words", words, f"at most {config.bad_words_max} strings")
    found: dict[Word, None] = {}
    for number, word in enumerate(words):
        if len(word) > config.bad_word_chars_max or not word.strip():
            accepted = f"a string of 1 to {config.bad_word_chars_max} characters, not of spaces alone"
            raise invalid(f"bad_words[{number}]", word, accepted)
        tokens = prompts.tokenizer("bad_words", "null")
        plain, spaced = (tuple(tokens.encode(space + word.lstrip())) for space in ("", " "))
        found[plain] = None
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found[spaced] = None
    return tuple(found)


def allowed_token_ids(ids: Sequence[int], card: ModelCard, config: GatewayConfig) -> tuple[int, ...]:
    """Each once, in order."""
    if not 1 <= len(ids) <= config.allowed_token_ids_max:
        raise invalid("allowed_token_ids", ids, f"a list of 1 to {config.allowed_token_ids_max} token ids")
    return tuple(sorted(set(token_ids(list(ids), "allowed_token_ids", card))))


def check_left(sampling: Sampling, stop_token_ids: Set[int], min_tokens: int, vocab_size: int) -> None:
    """Raises BadRequest where nothing would be left to sample, whatever was generated before."""
    banned = {word[0] for word in sampling.bad_words if len(word) == 1}
    if not _num_left(sampling, banned, vocab_size):
        raise invalid("bad_words", sorted(banned), "words that leave a token of allowed_token_ids")
    if min_tokens and not _num_left(sampling, banned | stop_token_ids, vocab_size):
        raise invalid("min_tokens", min_tokens, "nothing, where every token that may come is a stop token")


def _num_left(sampling: Sampling, ruled_out: Set[int], vocab_size: int) -> int:
    allowed = sampling.allowed_token_ids
    return len(set(allowed) - ruled_out) if allowed else vocab_size - len(ruled_out)
