"""What a step trace holds, as fixed records, and as bytes for who asks. Torch-free: the command line reads it too.

A step has one record, each layer of each of its microbatches another (an exchange: attention, dispatch, wait and
merge), each expert worker's answer a third. Times are nanoseconds of `time.perf_counter_ns` on the attention
worker's machine; of an expert worker only spans are known, so the clocks of two machines are never compared.

    header: magic, bytes of JSON · JSON: worker, now_ns, peers, counts, choices · steps · exchanges · replies
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from struct import Struct
from struct import error as StructError
from typing import Any

import numpy as np
from numpy.typing import NDArray

Fields = tuple[tuple[str, str], ...]  # name and struct's code
Records = NDArray[Any]  # structured

STEP: Fields = (
    ("number", "q"), ("began_ns", "q"), ("ended_ns", "q"),  # all layers, without sampling
    ("rows", "I"), ("sequences", "I"), ("is_prefill", "B"), ("microbatches", "B"),
)  # fmt: skip
EXCHANGE: Fields = (
    ("step", "q"), ("attended_from_ns", "q"), ("attend_ns", "q"), ("dispatch_ns", "q"),
    ("waited_from_ns", "q"), ("wait_ns", "q"), ("merge_ns", "q"),
    ("last_by_ns", "q"),  # how long the last reply alone was waited for
    ("experts_ns", "q"),  # of the wait: the expert worker's queue and computing; the rest is exchange
    ("layer", "H"), ("last", "H"), ("microbatch", "B"),
)  # fmt: skip
REPLY: Fields = (
    ("step", "q"), ("sent_ns", "q"), ("heard_ns", "q"), ("queued_ns", "q"), ("computed_ns", "q"),
    ("layer", "H"), ("peer", "H"), ("microbatch", "B"),
)  # fmt: skip
NOBODY = (1 << 16) - 1  # `last` of an exchange that nobody answered

BYTES_MAX = 16 << 20
"""Of one worker's trace, uncompressed."""

_CODES = {"q": "<i8", "I": "<u4", "H": "<u2", "B": "u1"}
_LAYOUT = (("steps", STEP, "number"), ("exchanges", EXCHANGE, "step"), ("replies", REPLY, "step"))
_HEADER = Struct("<4sI")
_MAGIC = b"EMT\x01"
_JSON_BYTES_MAX = 1 << 20


class TraceMalformed(ValueError):
    """Bytes that are no trace of this version."""


def dtype_of(fields: Fields) -> np.dtype[Any]:
    """Packed, little-endian."""
    return np.dtype([(name, _CODES[code]) for name, code in fields])


def struct_of(fields: Fields) -> Struct:
    return Struct("<" + "".join(code for _, code in fields))


@dataclass(frozen=True)
class Snapshot:
    """Whole steps, by number. `peers`: the expert workers that `last` and `peer` index."""

    worker: str
    now_ns: int  # when it was taken
    peers: tuple[str, ...]
    steps: Records
    exchanges: Records
    replies: Records
    choices: tuple[dict[str, Any], ...] = ()  # of microbatches, by kind of step
    has_forgotten: bool = False  # there were older steps

    def since(self, from_ns: int, bytes_max: int = BYTES_MAX) -> Snapshot:
        """The steps that began at `from_ns` or later; the newest of them, if all are more than `bytes_max`."""
        numbers, began_ns = self.steps["number"], self.steps["began_ns"]
        nbytes = np.full(len(numbers), self.steps.itemsize)
        for part in (self.exchanges, self.replies):
            nbytes += np.bincount(np.searchsorted(numbers, part["step"]), minlength=len(numbers)) * part.itemsize
        fits = np.cumsum(nbytes[::-1])[::-1] <= bytes_max
        kept = (began_ns >= from_ns) & fits
        first = int(numbers[kept].min(initial=np.iinfo(np.int64).max))
        lacks_older = self.has_forgotten and bool(len(numbers)) and int(began_ns[0]) > from_ns
        return replace(
            self,
            steps=self.steps[numbers >= first],
            exchanges=self.exchanges[self.exchanges["step"] >= first],
            replies=self.replies[self.replies["step"] >= first],
            has_forgotten=lacks_older or not bool(fits[began_ns >= from_ns].all()),
        )

    def encode(self) -> bytes:
        """Compressed; `decode` reads it."""
        parts = [getattr(self, name) for name, _, _ in _LAYOUT]
        about = {
            "worker": self.worker, "now_ns": self.now_ns, "peers": self.peers, "counts": [len(p) for p in parts],
            "choices": self.choices, "has_forgotten": self.has_forgotten,
        }  # fmt: skip
        text = json.dumps(about).encode()
        return zlib.compress(b"".join((_HEADER.pack(_MAGIC, len(text)), text, *(p.tobytes() for p in parts))), 1)


def decode(data: bytes) -> Snapshot:
    """Raises TraceMalformed. Sizes are checked before anything is made of them."""
    limit = BYTES_MAX + _JSON_BYTES_MAX
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data, limit)
        magic, size = _HEADER.unpack_from(raw)
        if magic != _MAGIC or size > _JSON_BYTES_MAX or not unpacker.eof:
            raise TraceMalformed(f"trace: begins with {magic!r}, {size} bytes of JSON; must be {_MAGIC!r}, at "
                                 f"most {_JSON_BYTES_MAX}, and {limit} bytes in all")  # fmt: skip
        offset = _HEADER.size + size
        about = json.loads(raw[_HEADER.size : offset])
        parts: dict[str, Records] = {}
        for (name, fields, _), count in zip(_LAYOUT, about["counts"], strict=True):
            parts[name] = np.frombuffer(raw, dtype_of(fields), count, offset)
            offset += parts[name].nbytes
        return Snapshot(
            str(about["worker"]), int(about["now_ns"]), tuple(map(str, about["peers"])), **parts,
            choices=tuple(about["choices"]), has_forgotten=bool(about["has_forgotten"]),
        )  # fmt: skip
    except TraceMalformed:
        raise
    except (ValueError, KeyError, TypeError, StructError, zlib.error, RecursionError) as error:
        raise TraceMalformed(f"trace: {type(error).__name__}: {error}") from None
