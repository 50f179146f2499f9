"""A slice of `make fuzz` over sockets: both doors stand, and the run would notice if they did not."""

from __future__ import annotations

import random

import pytest

from gateway.errors import Refusal
from gateway.validate import Validator
from tests.fuzz import sockets

CASES = 400


async def test_a_slice_over_sockets() -> None:
    answered = await sockets.run(CASES, 1)
    assert answered["HTTP 200"] > 10
    assert answered["HTTP 400"] > 50
    assert answered["gRPC OK"] > 20
    assert answered["gRPC INVALID_ARGUMENT"] > 50


async def test_a_door_that_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of many clients, with the seed of its case."""

    def broken(*_: object) -> None:
        raise random.choice((ValueError("a bug"), Refusal("a fault")))

    monkeypatch.setattr(Validator, "detokenised", broken)
    with pytest.raises(BaseExceptionGroup) as found:
        await sockets.run(CASES, 1)
    assert all("case of seed" in error.__notes__[0] for error in found.value.exceptions)
