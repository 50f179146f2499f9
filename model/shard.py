"""One safetensors file, described by its header: which tensors it holds, of what dtype and shape, and where.

The header is read and checked here, with bounds, before any tensor is mapped: tensors lie end to end, each as
long as its shape and dtype say, and the file ends where the last one does. Tensor contents are not looked at.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import CheckpointError

HEADER_BYTES_MAX = 100_000_000  # the format's own limit
LENGTH_BYTES = 8
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """Where one tensor lies: bytes [begin, end) of the file. A tuple: a large model has a hundred thousand."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A checked safetensors file. `tensors` are in the order they lie in."""

    path: Path
    nbytes: int
    header: bytes
    tensors: dict[str, TensorEntry]


def read_shard(path: Path) -> Shard:
    """Reads and checks the header of `path`. Raises CheckpointError: missing, truncated, malformed."""
    accepted = "a whole safetensors file"
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if not 2 <= length <= min(HEADER_BYTES_MAX, nbytes - LENGTH_BYTES):
                raise CheckpointError(path, f"truncated or no safetensors file ({nbytes} bytes)", accepted)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"unreadable ({error.strerror})", accepted) from error
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"without a readable header ({error})", accepted) from error
    if not isinstance(entries, dict):
        raise CheckpointError(path, "without a header object", accepted)
    entries.pop("__metadata__", None)
    start = LENGTH_BYTES + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(path, ordered, start, nbytes)
    return Shard(path, nbytes, header, ordered)


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_entry = type(dtype) is str and type(shape) is list and set(map(type, (begin, end, *shape))) == {int}
        is_entry = is_entry and min(shape, default=0) >= 0
    except (TypeError, KeyError, ValueError):
        is_entry = False
    if not is_entry:
        raise CheckpointError(path, json.dumps(entry), "{dtype, shape, data_offsets}", name)
    if dtype not in ITEM_BYTES:
        raise CheckpointError(path, f"dtype {dtype}", f"one of {', '.join(ITEM_BYTES)}", name)
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if begin < 0 or end - begin != expected:
        accepted = f"{expected} bytes, as {dtype} {shape} takes"
        raise CheckpointError(path, f"at bytes {begin} to {end}", accepted, name)
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _check_layout(path: Path, ordered: dict[str, TensorEntry], start: int, nbytes: int) -> None:
    at = start
    for name, entry in ordered.items():
        if entry.begin != at:
            raise CheckpointError(path, f"at byte {entry.begin}", f"byte {at}, where the last one ends", name)
        if entry.end > nbytes:
            found = f"truncated: the file has {nbytes} bytes, it ends at {entry.end}"
            raise CheckpointError(path, found, "a whole file", name)
        at = entry.end
    if at != nbytes:
        raise CheckpointError(path, f"{nbytes} bytes long", f"{at} bytes, where its last tensor ends")
