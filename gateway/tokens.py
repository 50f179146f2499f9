"""Text to tokens and back: a checkpoint's tokenizer.json, and a detokeniser that may be asked after each token.

The family's tokenizers are byte-level: a token is a piece of UTF-8, not of text, so a character may need
several tokens. `IncrementalDetokeniser` gives out whole characters only, and all it gave out together equals
decoding everything at once, invalid bytes included. Other kinds of decoder are refused when loaded.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gateway.errors import CheckpointUnreadable

TOKENIZER = "tokenizer.json"
EOS = "[e~["  # the family's; released configs carry no eos id


class Tokens:
    """A tokenizer. Special tokens have no text; added tokens that are not special (`<think>`) have."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._bytes: dict[int, bytes] = {}  # filled as tokens are seen; bounded by the vocabulary

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Nothing is added: templates write the special tokens themselves. `add_special`: what the tokenizer
        would add of its own accord."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of a finished sequence."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def spelled(self, tokens: list[int]) -> str:
        """The text with special tokens by name; bytes that are no text are U+FFFD."""
        return b"".join(map(self.spelling_of, tokens)).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """As the vocabulary writes it; empty for ids the tokenizer does not know."""
        return self._tokenizer.id_to_token(token) or ""

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def bytes_of(self, token: int) -> bytes:
        """A token's part of the text: none for special tokens and for ids the tokenizer does not know."""
        return b"" if token in self._special else self.spelling_of(token)

    def spelling_of(self, token: int) -> bytes:
        """A token's bytes, a special one's name included; none for ids the tokenizer does not know."""
        if token not in self._bytes:
            self._bytes[token] = _spelling(self._tokenizer.id_to_token(token))
        return self._bytes[token]


class IncrementalDetokeniser:
    """One sequence's text as its tokens come."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; possibly none."""
        return self._decoder.decode(self._tokens.bytes_of(token))

    def flush(self) -> str:
        """What was held back: at the end an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def shown_token(tokens: Tokens | None, token: int, *, as_id: bool = False) -> str:
    """A token's name in logprobs: its text, `bytes:\\x..` where that is no text, else `token_id:n`."""
    spelling = b"" if tokens is None or as_id else tokens.spelling_of(token)
    if not spelling:
        return f"token_id:{token}"
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def load_tokens(folder: Path) -> Tokens | None:
    """None where the checkpoint has no tokenizer.json. Raises CheckpointUnreadable."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    try:
        text = path.read_text()
        kind: Any = (json.loads(text).get("decoder") or {}).get("type")
        if kind != "ByteLevel":
            raise CheckpointUnreadable(path.name, f"decoder.type is {kind!r}; accepted: 'ByteLevel'")
        return Tokens(Tokenizer.from_str(text))
    except CheckpointUnreadable:
        raise
    except Exception as error:  # the tokenizers package raises plain Exception for what it cannot read
        raise CheckpointUnreadable(path.name, f"not a tokenizer: {error}") from error


def _alphabet() -> dict[str, int]:
    """How byte-level tokenizers write a byte as a printable character: itself, or 256 and up in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _alphabet()


def _spelling(token: str | None) -> bytes:
    """An added token may hold characters outside the alphabet: then it is plain text."""
    if token is None:
        return b""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:
        return token.encode()
