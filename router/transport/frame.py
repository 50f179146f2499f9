"""Parcels, replies and refusals as bytes: the one codec of every transport that has any.

A frame is a fixed header and a payload; its size follows from the header alone, which is checked against the
link's limits before anything is read or allocated. Tensors are written straight into the given buffer and
read as views of it, except the routes of a parcel: they are small, copied, and checked. This file neither
waits nor sends. Weights are there, and sums come back, if the link says so (rows.py). Legend: n rows and r routes
of one parcel · H hidden · P what a row takes on its way, H or less.

    parcel   header · rows [n, P] · pad to 8 · route_rows [r] int32 · route_experts [r] int32 · weights [r] float32
    reply    header · rows [r, H]; sums [n, H]
    refusal  header · detail, UTF-8
    pulse    header: no answer, but a sign of life
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from router.config import RouterConfig
from router.errors import FrameError
from router.placement import Member
from router.rows import sent_width
from router.transport.base import LinkIdentity, Parcel, Refusal, RefusalReason, Reply, Spent

VERSION = 1
PARCEL, REPLY, REFUSAL, PULSE = 1, 2, 3, 4
DETAIL_BYTES_MAX = 512
_VIEWS_MAX = 256
_SPENT_NS_MAX = 3600 * 10**9  # no batch takes an hour
_COPIED_MAX = 64 << 10

_PREFIX = struct.Struct("<4sHHI8s4x")  # magic, version, dtype, hidden, fingerprint: the same on all of a link
_HEADER = struct.Struct(f"<{_PREFIX.size}sIIIIQQQQQIIQQQ16x")  # rows begin a cache line
_MAGIC = b"EMX\x01"
_CODES = {torch.float32: 1, torch.bfloat16: 2}
_FP8, _SUMS = 1 << 8, 1 << 9  # added to the code of the dtype
_REASONS = frozenset(map(int, RefusalReason))

HEADER_BYTES = _HEADER.size
REFUSAL_BYTES_MAX = HEADER_BYTES + DETAIL_BYTES_MAX


class Header(NamedTuple):
    prefix: bytes
    kind: int
    reason: int  # of a refusal
    parcel_index: int  # its place in the ticket
    layer: int
    ticket: int
    sender: int  # incarnation of who sends this frame
    to: int  # incarnation of whom it is meant for
    term: int  # epoch
    number: int
    num_rows: int
    num_routes: int
    payload_bytes: int
    queued_ns: int = 0  # of a reply: what the expert worker spent on it
    computed_ns: int = 0


@dataclass(frozen=True)
class FrameLimits:
    """What a link carries; a frame that differs or exceeds is refused."""

    rows_max: int
    routes_max: int
    hidden: int
    dtype: torch.dtype
    row_bytes: int  # of a reply, in a frame
    row_apart_bytes: int  # of a reply, beside its frame
    sent_width: int  # P, of a parcel's rows
    sent_row_bytes: int  # in a frame
    sent_apart_bytes: int  # beside its frame
    route_bytes: int
    sums: bool  # a reply has a row for each of the parcel's rows instead of each of its routes
    prefix: bytes

    def answer_rows(self, parcel: Parcel) -> int:
        return parcel.rows.shape[0] if self.sums else parcel.route_rows.shape[0]


def limits_of(identity: LinkIdentity, config: RouterConfig, *, rows_apart: bool = False) -> FrameLimits:
    """`rows_apart`: frames hold no rows, not even room for them (lane.py)."""
    if identity.dtype not in _CODES:
        raise ValueError(f"dtype: {identity.dtype}; must be one of {list(_CODES)}")
    fingerprint = identity.fingerprint.encode()[:8]
    code = _CODES[identity.dtype] | _FP8 * (identity.rows == "fp8") | _SUMS * (identity.replies == "sums")
    width = sent_width(identity.hidden, identity.dtype, identity.rows)
    row_bytes, sent_row_bytes = identity.hidden * identity.dtype.itemsize, width * identity.dtype.itemsize
    return FrameLimits(
        rows_max=config.rows_max,
        routes_max=config.routes_max,
        hidden=identity.hidden,
        dtype=identity.dtype,
        row_bytes=0 if rows_apart else row_bytes,
        row_apart_bytes=row_bytes if rows_apart else 0,
        sent_width=width,
        sent_row_bytes=0 if rows_apart else sent_row_bytes,
        sent_apart_bytes=sent_row_bytes if rows_apart else 0,
        route_bytes=12 if identity.replies == "sums" else 8,
        sums=identity.replies == "sums",
        prefix=_PREFIX.pack(_MAGIC, VERSION, code, identity.hidden, fingerprint),
    )


class Region:
    """Memory in which frames are written and read. Tensors read from it keep it alive."""

    def __init__(self, buffer: memoryview, limits: FrameLimits, elements: Tensor | None = None) -> None:
        """elements: where rows lie, at the same offsets, if not in `buffer`."""
        self.view = buffer
        own = torch.frombuffer(buffer, dtype=limits.dtype, count=len(buffer) // limits.dtype.itemsize)
        self.address = own.data_ptr()
        self._elements = own if elements is None else elements
        self._rows: dict[tuple[int, int, int], Tensor] = {}

    def rows(self, offset: int, num_rows: int, width: int) -> Tensor:
        """[num_rows, width] at `offset`, a multiple of 8. A view is kept and given again: frames of one size keep
        falling on the same place, and with cold caches making a view takes longer than all the checks."""
        rows = self._rows.get((offset, num_rows, width))
        if rows is None:
            if len(self._rows) == _VIEWS_MAX:
                self._rows.clear()
            start = offset // self._elements.itemsize
            rows = self._elements.as_strided((num_rows, width), (width, 1), start)
            self._rows[offset, num_rows, width] = rows
        return rows

    def put_rows(self, offset: int, rows: Tensor, nbytes: int) -> None:
        _copy(self.address + offset, rows, nbytes)


def parcel_bytes(num_rows: int, num_routes: int, limits: FrameLimits) -> int:
    return HEADER_BYTES + _routes_at(num_rows, limits) + limits.route_bytes * num_routes


def reply_bytes(num_rows: int, limits: FrameLimits) -> int:
    return HEADER_BYTES + num_rows * limits.row_bytes


def why_malformed(parcel: Parcel, limits: FrameLimits) -> str:
    """What keeps our own parcel from fitting the link; empty if nothing."""
    shape, num_routes = parcel.rows.shape, parcel.route_rows.shape[0]
    if len(shape) != 2 or shape[1] != limits.sent_width or parcel.rows.dtype != limits.dtype:
        return f"rows: {list(shape)} {parcel.rows.dtype}; must be [n, {limits.sent_width}] {limits.dtype}"
    if shape[0] > limits.rows_max:
        return f"rows: {shape[0]}; at most {limits.rows_max}"
    if num_routes != parcel.route_experts.shape[0]:
        return f"routes: {num_routes} rows, {parcel.route_experts.shape[0]} experts; must be as many"
    if num_routes > limits.routes_max:
        return f"routes: {num_routes}; at most {limits.routes_max}"
    if parcel.route_rows.dtype != torch.int32 or parcel.route_experts.dtype != torch.int32:
        return f"routes: {parcel.route_rows.dtype}, {parcel.route_experts.dtype}; must be torch.int32"
    weights = parcel.route_weights
    if limits.sums and (weights is None or weights.shape != (num_routes,) or weights.dtype != torch.float32):
        return f"weights: {weights if weights is None else list(weights.shape)}; must be [{num_routes}] float32"
    return ""


def check_answer(parcel: Parcel, rows: Tensor, limits: FrameLimits) -> None:
    """Our own reply: a row for each route, or for each row. Raises ValueError."""
    expected = (limits.answer_rows(parcel), limits.hidden)
    if rows.shape != expected or rows.dtype != limits.dtype:
        raise ValueError(f"rows: {list(rows.shape)} {rows.dtype}; must be {list(expected)} {limits.dtype}")


def write_parcel(region: Region, offset: int, parcel: Parcel, index: int, limits: FrameLimits) -> None:
    """The caller has room for `parcel_bytes` at `offset`, and found nothing malformed."""
    num_rows, num_routes = parcel.rows.shape[0], parcel.route_rows.shape[0]
    routes_at = _routes_at(num_rows, limits)
    _HEADER.pack_into(region.view, offset, *_parcel_header(parcel, index, limits))
    region.put_rows(offset + HEADER_BYTES, parcel.rows, num_rows * limits.sent_row_bytes)
    payload = region.address + offset + HEADER_BYTES
    for place, tensor in enumerate(_of_routes(parcel, limits)):
        _copy(payload + routes_at + 4 * num_routes * place, tensor, 4 * num_routes)


def write_reply(
    region: Region, offset: int, parcel: Parcel, index: int, rows: Tensor, spent: Spent, limits: FrameLimits
) -> None:
    """rows: [r, H]. The caller has room for `reply_bytes` at `offset`."""
    num_routes = rows.shape[0]
    _HEADER.pack_into(region.view, offset, *_reply_header(parcel, index, num_routes, spent, limits))
    region.put_rows(offset + HEADER_BYTES, rows, num_routes * limits.row_bytes)


def encode_detail(detail: str) -> bytes:
    """A refusal's detail as its frame carries it."""
    return detail.encode()[:DETAIL_BYTES_MAX]


def write_refusal(
    region: Region, offset: int, parcel: Parcel, index: int, reason: RefusalReason, detail: bytes,
    limits: FrameLimits,
) -> None:  # fmt: skip
    """detail: from `encode_detail`. The caller has room for it and a header at `offset`."""
    _HEADER.pack_into(region.view, offset, *_refusal_header(parcel, index, reason, detail, limits))
    start = offset + HEADER_BYTES
    region.view[start : start + len(detail)] = detail


def parcel_message(parcel: Parcel, index: int, limits: FrameLimits) -> bytes:
    """The frame as a message of its own, for transports that send those. Nothing was found malformed."""
    num_rows, num_routes = parcel.rows.shape[0], parcel.route_rows.shape[0]
    header = _HEADER.pack(*_parcel_header(parcel, index, limits))
    gap = bytes(-num_rows * limits.sent_row_bytes % 8)
    rows = _bytes_of(parcel.rows, num_rows * limits.sent_row_bytes)
    routes = (_bytes_of(tensor, 4 * num_routes) for tensor in _of_routes(parcel, limits))
    return b"".join((header, rows, gap, *routes))


def reply_message(parcel: Parcel, index: int, rows: Tensor, spent: Spent, limits: FrameLimits) -> bytes:
    """rows: [r, H]."""
    header = _HEADER.pack(*_reply_header(parcel, index, rows.shape[0], spent, limits))
    return header + _bytes_of(rows, rows.shape[0] * limits.row_bytes)


def refusal_message(
    parcel: Parcel, index: int, reason: RefusalReason, detail: bytes, limits: FrameLimits
) -> bytes:
    """detail: from `encode_detail`."""
    return _HEADER.pack(*_refusal_header(parcel, index, reason, detail, limits)) + detail


def pulse_message(sender: Member, to: Member, limits: FrameLimits) -> bytes:
    """Always the same between two lives: it is known by comparing, and never decoded."""
    return _HEADER.pack(
        limits.prefix, PULSE, 0, 0, 0, 0, sender.incarnation, to.incarnation, 0, 0, 0, 0, 0, 0, 0
    )  # fmt: skip


def read_header(region: Region, offset: int, available: int, limits: FrameLimits) -> Header:
    """The checked header at `offset`, a multiple of 8; the whole frame lies within `available` bytes of it."""
    if available < HEADER_BYTES:
        raise FrameError(f"frame: {available} bytes; a header alone has {HEADER_BYTES}")
    header = Header._make(_HEADER.unpack_from(region.view, offset))
    if header.prefix != limits.prefix:
        raise FrameError(f"frame: begins with {_explained(header.prefix)}; must be {_explained(limits.prefix)}")
    if header.num_rows > limits.rows_max or header.num_routes > limits.routes_max:
        raise FrameError(f"frame: {header.num_rows} rows, {header.num_routes} routes; at most "
                         f"{limits.rows_max}, {limits.routes_max}")  # fmt: skip
    if max(header.queued_ns, header.computed_ns) > _SPENT_NS_MAX:
        raise FrameError(f"frame: {header.queued_ns} ns queued, {header.computed_ns} ns computed; at most "
                         f"{_SPENT_NS_MAX}")  # fmt: skip
    if header.payload_bytes != _payload_bytes(header, limits):
        raise FrameError(f"frame: kind {header.kind}, {header.num_rows} rows, {header.num_routes} routes, "
                         f"payload of {header.payload_bytes} bytes: these do not agree")  # fmt: skip
    if header.payload_bytes > available - HEADER_BYTES:
        raise FrameError(f"frame: payload of {header.payload_bytes} bytes; {available} bytes follow")
    return header


class ReadParcel(NamedTuple):
    rows: Tensor  # [n, P], a view
    route_rows: Tensor  # [r] int32, a copy
    route_experts: Tensor  # [r] int32, a copy
    route_weights: Tensor | None  # [r] float32, a copy


def read_parcel(region: Region, offset: int, header: Header, limits: FrameLimits) -> ReadParcel:
    """`header` was checked."""
    routes_at = offset + HEADER_BYTES + _routes_at(header.num_rows, limits)
    part = 4 * header.num_routes
    copies = [bytearray(region.view[routes_at + at : routes_at + at + part]) for at in (0, part, 2 * part)]
    if part and _largest(copies[0]) >= header.num_rows:
        raise FrameError(f"frame: a route names a row outside 0 to {header.num_rows - 1}")
    return ReadParcel(
        rows=region.rows(offset + HEADER_BYTES, header.num_rows, limits.sent_width),
        route_rows=_values(copies[0], torch.int32),
        route_experts=_values(copies[1], torch.int32),
        route_weights=_values(copies[2], torch.float32) if limits.sums else None,
    )


def read_answer(
    region: Region, offset: int, header: Header, limits: FrameLimits, heard_ns: int = 0
) -> Reply | Refusal:
    """A reply, whose rows [r, H] are a view, or a refusal. `header` was checked."""
    if header.kind == REPLY:
        rows = region.rows(offset + HEADER_BYTES, header.num_routes, limits.hidden)
        return Reply(rows, Spent(header.queued_ns, header.computed_ns), heard_ns)
    start = offset + HEADER_BYTES
    detail = bytes(region.view[start : start + header.payload_bytes])
    return Refusal(RefusalReason(header.reason), detail.decode(errors="replace"))


def _routes_at(num_rows: int, limits: FrameLimits) -> int:
    return (num_rows * limits.sent_row_bytes + 7) & ~7


def _payload_bytes(header: Header, limits: FrameLimits) -> int:
    """What the other fields say it must be."""
    if header.kind == PARCEL:
        return _routes_at(header.num_rows, limits) + limits.route_bytes * header.num_routes
    if header.kind == REPLY and header.num_rows == 0:
        return header.num_routes * limits.row_bytes
    if header.kind == REFUSAL and header.reason in _REASONS:
        return min(header.payload_bytes, DETAIL_BYTES_MAX)
    raise FrameError(f"frame: no such kind: {header.kind}, reason {header.reason}, {header.num_rows} rows")


def _explained(prefix: bytes) -> str:
    magic, version, dtype, hidden, fingerprint = _PREFIX.unpack(prefix)
    return f"{magic!r}, version {version}, dtype {dtype}, hidden {hidden}, fingerprint {fingerprint!r}"


def _parcel_header(parcel: Parcel, index: int, limits: FrameLimits) -> Header:
    num_rows, num_routes = parcel.rows.shape[0], parcel.route_rows.shape[0]
    return Header(
        limits.prefix, PARCEL, 0, index, parcel.layer, parcel.ticket, parcel.sender.incarnation,
        parcel.to.incarnation, parcel.epoch.term, parcel.epoch.number, num_rows, num_routes,
        _routes_at(num_rows, limits) + limits.route_bytes * num_routes,
    )  # fmt: skip


def _reply_header(parcel: Parcel, index: int, num_routes: int, spent: Spent, limits: FrameLimits) -> Header:
    header = _answer_header(REPLY, 0, parcel, index, num_routes, num_routes * limits.row_bytes, limits)
    return header._replace(queued_ns=spent.queued_ns, computed_ns=spent.computed_ns)


def _refusal_header(
    parcel: Parcel, index: int, reason: RefusalReason, detail: bytes, limits: FrameLimits
) -> Header:
    return _answer_header(REFUSAL, reason, parcel, index, 0, len(detail), limits)


def _answer_header(
    kind: int, reason: int, parcel: Parcel, index: int, num_routes: int, payload_bytes: int, limits: FrameLimits
) -> Header:
    return Header(
        limits.prefix, kind, reason, index, parcel.layer, parcel.ticket, parcel.to.incarnation,
        parcel.sender.incarnation, parcel.epoch.term, parcel.epoch.number, 0, num_routes, payload_bytes,
    )  # fmt: skip


def _of_routes(parcel: Parcel, limits: FrameLimits) -> tuple[Tensor, ...]:
    """Each [r], of four bytes an element."""
    if not limits.sums:
        return parcel.route_rows, parcel.route_experts
    assert parcel.route_weights is not None, "found malformed before it is written"
    return parcel.route_rows, parcel.route_experts, parcel.route_weights


def _bytes_of(tensor: Tensor, nbytes: int) -> bytes | memoryview:
    """Its elements in row order; in place where they are many, since for few a copy takes a third of the time."""
    tensor = tensor.contiguous()  # held until copied
    if nbytes <= _COPIED_MAX:
        return ctypes.string_at(tensor.data_ptr(), nbytes)
    return tensor.view(-1).view(torch.uint8).numpy().data


def _copy(address: int, tensor: Tensor, nbytes: int) -> None:
    """One call instead of the four that a tensor view of the target would take."""
    tensor = tensor.contiguous()  # held until copied
    ctypes.memmove(address, tensor.data_ptr(), nbytes)


def _largest(values: bytearray) -> int:
    """Of int32 values taken as unsigned, so that a negative one is huge."""
    few = memoryview(values).cast("I")
    return max(few) if len(few) <= 256 else int(np.frombuffer(values, np.uint32).max())  # 10 us less when few


def _values(raw: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
