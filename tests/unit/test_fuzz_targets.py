"""A short slice of `make fuzz`, the same on every run: its targets hold, and would notice if they did not."""

from __future__ import annotations

import random

import pytest

from router.errors import FrameError
from router.transport import frame
from tests.fuzz.targets import TARGETS, read_frame

CASES = 400


@pytest.mark.parametrize("name", TARGETS)
def test_a_slice_of_mutations(name: str) -> None:
    """Seeds with bytes changed, cut and repeated, and noise."""
    target, chance = TARGETS[name], random.Random(name)
    for words in target.seeds:
        target.run(words)
    for _ in range(CASES):
        words = bytearray(chance.choice(target.seeds))
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(words))
            words[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        if chance.random() < 0.3:
            words = words[: chance.randrange(len(words) + 1)]
        if chance.random() < 0.1:
            words = bytearray(chance.randbytes(chance.randrange(600)))
        target.run(bytes(words * chance.choice((1, 1, 1, 2))))


def test_the_seeds_get_past_the_first_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the fuzzer would knock at a door that never opens."""
    read = []

    def note(_: frame.Region, __: int, header: frame.Header, ___: frame.FrameLimits) -> frame.ReadParcel:
        read.append(header.num_rows)
        raise FrameError("seen")

    monkeypatch.setattr(frame, "read_parcel", note)
    for words in TARGETS["frame"].seeds:
        read_frame(words)
    assert read == [3, 0, 8, 3, 2]


def test_a_parser_that_lets_too_much_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets judge, they do not only run."""
    monkeypatch.setattr(frame, "read_header", lambda region, offset, available, limits: unchecked(region, offset))
    monkeypatch.setattr(frame, "read_parcel", lambda region, offset, header, limits: ())
    words = bytearray(TARGETS["frame"].seeds[0])
    words[1 + 80] = 99  # rows
    with pytest.raises(AssertionError):
        read_frame(bytes(words))


def unchecked(region: frame.Region, offset: int) -> frame.Header:
    return frame.Header._make(frame._HEADER.unpack_from(region.view, offset))
