"""What a whole KV block is called: a hash of all tokens up to its end, rooted in the checkpoint and a salt.

Two blocks have one name only if their keys and values are the same, bit for bit: those of a token depend on the
weights and on all tokens before it. A name is a cryptographic hash, so that nobody can make a prompt whose blocks
are taken for those of another's; a salt keeps the blocks of those who share it from everybody else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

NAME_BYTES = 32
HINT_BYTES = 8


def root(fingerprint: str, salt: str) -> bytes:
    """What stands before the first block: [NAME_BYTES]."""
    return hashlib.blake2b(f"{fingerprint}\0{salt}".encode(), digest_size=NAME_BYTES).digest()


def follow(names: list[bytes], tokens: Sequence[int], block_tokens: int, base: bytes) -> None:
    """Append the names of those whole blocks of `tokens` that `names` does not have yet. `base`: the root."""
    done, num_whole = len(names), len(tokens) // block_tokens
    if done == num_whole:
        return
    name = names[-1] if names else base
    count = (num_whole - done) * block_tokens
    packed = struct.pack(f"<{count}I", *tokens[done * block_tokens : num_whole * block_tokens])
    size = 4 * block_tokens
    for at in range(0, len(packed), size):
        name = hashlib.blake2b(name + packed[at : at + size], digest_size=NAME_BYTES).digest()
        names.append(name)


def hint(name: bytes) -> int:
    """A name cut to a number of HINT_BYTES: enough to guess by, not to trust."""
    return int.from_bytes(name[:HINT_BYTES], "little")
