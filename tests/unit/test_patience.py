"""The deadline of an exchange is one of silence, has a total, and does not count while we stood still."""

from __future__ import annotations

import pytest

from router.config import RouterConfig
from router.transport.patience import PULSES, Patience


def test_who_is_silent_is_given_up_and_who_pulses_is_not() -> None:
    patience = Patience(timeout_s=2.0, total_s=60.0, now_s=100.0)
    for tenth in range(1, 21):
        patience.look(100.0 + tenth / 10)
    assert patience.left_s(heard_s=0.0) == pytest.approx(0.0)
    assert patience.left_s(heard_s=101.5) == pytest.approx(1.5)
    assert "2 s" in patience.late().detail


def test_pulses_do_not_help_beyond_the_total() -> None:
    patience = Patience(timeout_s=2.0, total_s=5.0, now_s=0.0)
    for tenth in range(51):
        patience.look(tenth / 10)
    assert patience.left_s(heard_s=5.0) <= 0
    assert "combine_total_s" in patience.late().detail


def test_after_a_halt_of_our_own_everyone_has_the_time_again() -> None:
    """What they sent meanwhile is still on its way through our own threads."""
    patience = Patience(timeout_s=2.0, total_s=5.0, now_s=0.0)
    patience.look(0.5)
    patience.look(30.0)
    assert patience.left_s(heard_s=0.4) == pytest.approx(2.0)


def test_a_look_comes_often_enough_to_tell_a_halt_from_a_wait() -> None:
    patience = Patience(timeout_s=2.0, total_s=60.0, now_s=0.0)
    assert patience.nap_s(1.9) == pytest.approx(0.5)
    assert patience.nap_s(0.1) == pytest.approx(0.1)
    assert patience.nap_s(-1.0) == 0.0
    assert PULSES >= 2


def test_a_total_below_the_silence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"combine_total_s: 1; must be at least combine_timeout_s, 2"):
        RouterConfig(combine_timeout_s=2.0, combine_total_s=1.0)
