"""Frames: what is written is read; what is not a frame of this link is refused before it costs anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from router.config import RouterConfig
from router.errors import FrameError
from router.placement import EpochId, Member
from router.transport import frame
from router.transport.base import LinkIdentity, Parcel, Refusal, RefusalReason, Reply, Spent

CONFIG = RouterConfig(rows_max=8, experts_per_row_max=2)
LIMITS = frame.limits_of(LinkIdentity(Member("", 1), "0123456789abcdef", "", 3, torch.bfloat16), CONFIG)
OFFSET = 64  # frames rarely begin a region


def parcel(num_rows: int = 3, route_rows: tuple[int, ...] = (2, 0, 1, 1)) -> Parcel:
    rows = torch.arange(num_rows * 3, dtype=torch.bfloat16).view(num_rows, 3)
    chosen = torch.tensor(route_rows, dtype=torch.int32)
    return Parcel(Member("attention-0", 5), Member("expert-0", 6), EpochId(7, 8), 9, 10, rows, chosen, chosen + 40)


def written(sent: Parcel) -> frame.Region:
    size = frame.parcel_bytes(len(sent.rows), len(sent.route_rows), LIMITS)
    region = new_region(size)
    frame.write_parcel(region, OFFSET, sent, 11, LIMITS)
    return region


def new_region(size: int) -> frame.Region:
    return frame.Region(memoryview(bytearray(OFFSET + size)), LIMITS)


def header_of(region: frame.Region) -> frame.Header:
    return frame.read_header(region, OFFSET, len(region.view) - OFFSET, LIMITS)


@pytest.mark.parametrize("sent", [parcel(), parcel(0, ()), parcel(8, ()), parcel(1, (0,) * 16)])
def test_a_parcel_survives(sent: Parcel) -> None:
    """Every field; odd numbers of rows leave the routes aligned."""
    region = written(sent)
    header = header_of(region)
    rows, route_rows, route_experts, _ = frame.read_parcel(region, OFFSET, header, LIMITS)
    assert torch.equal(rows, sent.rows)
    assert torch.equal(route_rows, sent.route_rows)
    assert torch.equal(route_experts, sent.route_experts)
    assert (header.sender, header.to, header.term, header.number) == (5, 6, 7, 8)
    assert (header.ticket, header.layer, header.parcel_index) == (9, 10, 11)


def test_rows_are_read_in_place_and_routes_are_not() -> None:
    """4 MB need no copy; what indexes memory must not change after it was checked."""
    region = written(parcel())
    rows, route_rows, *_ = frame.read_parcel(region, OFFSET, header_of(region), LIMITS)
    payload = region.view[OFFSET + frame.HEADER_BYTES :]
    payload[:] = b"\xff" * len(payload)
    assert rows.isnan().all()
    assert route_rows.tolist() == [2, 0, 1, 1]


def test_a_reply_and_a_refusal_survive() -> None:
    """They name the parcel they answer, the other way round."""
    sent = parcel()
    region = new_region(frame.reply_bytes(4, LIMITS))
    rows = sent.rows[sent.route_rows] + 1
    frame.write_reply(region, OFFSET, sent, 11, rows, Spent(12, 13), LIMITS)
    header = header_of(region)
    assert (header.sender, header.to, header.ticket, header.parcel_index) == (6, 5, 9, 11)
    reply = frame.read_answer(region, OFFSET, header, LIMITS, heard_ns=14)
    assert isinstance(reply, Reply)
    assert (reply.spent, reply.heard_ns) == (Spent(12, 13), 14)
    assert torch.equal(reply.rows, rows)

    detail = frame.encode_detail("slot 3: loading " * 99)
    region = new_region(frame.REFUSAL_BYTES_MAX)
    frame.write_refusal(region, OFFSET, sent, 11, RefusalReason.NOT_RESIDENT, detail, LIMITS)
    refusal = frame.read_answer(region, OFFSET, header_of(region), LIMITS)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.NOT_RESIDENT
    assert refusal.detail.startswith("slot 3: loading ")


def changed(**fields: Any) -> frame.Region:
    """A written parcel whose header says something else."""
    region = written(parcel())
    frame._HEADER.pack_into(region.view, OFFSET, *header_of(region)._replace(**fields))
    return region


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prefix": b"HTTP" + LIMITS.prefix[4:]}, "begins with b'HTTP'"),
        ({"prefix": LIMITS.prefix[:4] + b"\2" + LIMITS.prefix[5:]}, "version 2"),
        ({"kind": 0}, "no such kind: 0"),
        ({"kind": frame.REFUSAL, "reason": 99, "num_routes": 0}, "reason 99"),
        ({"kind": frame.REPLY}, "3 rows"),
        ({"prefix": LIMITS.prefix[:6] + b"\1" + LIMITS.prefix[7:]}, "dtype 1"),
        ({"prefix": LIMITS.prefix[:8] + b"\4" + LIMITS.prefix[9:]}, "hidden 4"),
        ({"prefix": LIMITS.prefix[:12] + b"76543210" + bytes(4)}, "fingerprint b'76543210'"),
        ({"num_rows": 9}, "9 rows"),
        ({"num_rows": 2**32 - 1}, "at most 8"),
        ({"num_routes": 17}, "17 routes"),
        ({"num_rows": 5}, "do not agree"),
        ({"num_routes": 5}, "do not agree"),
        ({"payload_bytes": 2**63}, "do not agree"),
        ({"queued_ns": 2**63}, "ns queued"),
        ({"computed_ns": 2**64 - 1}, "ns computed"),
        ({"num_rows": 8, "num_routes": 16, "payload_bytes": 48 + 128}, "bytes follow"),
    ],
)
def test_what_is_not_a_frame_of_this_link_is_refused(fields: dict[str, Any], complaint: str) -> None:
    """By name, and before anything is read beyond the header."""
    with pytest.raises(FrameError, match=complaint):
        header_of(changed(**fields))


@pytest.mark.parametrize("row", [-1, 3])
def test_a_route_to_a_row_that_is_not_there_is_refused(row: int) -> None:
    """It would read another request's rows, or fault."""
    region = written(replace(parcel(), route_rows=torch.tensor([0, 1, row, 2], dtype=torch.int32)))
    header = header_of(region)
    with pytest.raises(FrameError, match="outside 0 to 2"):
        frame.read_parcel(region, OFFSET, header, LIMITS)


@given(st.binary(max_size=400), st.sampled_from([0, 24, 28, 40, 80, 88, 96, 128]))
@example(bytes(400), 0)
def test_noise_is_refused_or_stays_within_its_bytes(noise: bytes, kept: int) -> None:
    """Whatever the bytes: FrameError, or tensors that lie within them and within the limits.

    The first `kept` bytes are those of a true frame, so that noise gets past the first checks.
    """
    valid = bytes(written(parcel()).view[OFFSET:])
    region = frame.Region(memoryview(bytearray((valid[:kept] + noise[kept:]).ljust(8, b"\0"))), LIMITS)
    size = len(region.view)
    try:
        header = frame.read_header(region, 0, size, LIMITS)
        if header.kind == frame.PARCEL:
            tensors = frame.read_parcel(region, 0, header, LIMITS)
        else:
            tensors = tuple(getattr(frame.read_answer(region, 0, header, LIMITS), "rows", ()))
    except FrameError:
        return
    assert frame.HEADER_BYTES + header.payload_bytes <= size
    assert header.num_rows <= LIMITS.rows_max
    assert header.num_routes <= LIMITS.routes_max
    assert sum(tensor.nbytes for tensor in tensors) <= size - frame.HEADER_BYTES
