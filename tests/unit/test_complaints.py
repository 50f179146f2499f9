"""What a door logs of strangers is bounded, and says how much it left out."""

from __future__ import annotations

import logging

import pytest

from router.transport.complaints import KINDS_MAX, TOLD_MAX, WINDOW_S, Complaints


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def complaints(clock: Clock, caplog: pytest.LogCaptureFixture) -> Complaints:
    return Complaints(logging.getLogger("door"), "here", clock)


def test_the_first_of_a_kind_are_told_and_the_rest_counted(
    complaints: Complaints, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        complaints.note(f"token: guess {number}")
    complaints.note("version: 2")
    assert len(caplog.messages) == TOLD_MAX + 1
    clock.now_s = WINDOW_S
    complaints.note("token: again")
    assert f"here: refused {100 - TOLD_MAX} more: token" in caplog.messages
    assert "here: refused: token: again" in caplog.messages


def test_however_many_kinds_there_are_the_log_is_bounded(
    complaints: Complaints, caplog: pytest.LogCaptureFixture
) -> None:
    """Should a stranger's words ever become a kind."""
    for number in range(10_000):
        complaints.note(f"{number}: what")
    assert len(caplog.messages) <= TOLD_MAX * (KINDS_MAX + 1)


def test_a_complaint_is_one_short_line(complaints: Complaints, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever wrote it cannot make it look like two, or like a long one."""
    complaints.note("dtype: a\nWARNING all is well \x1b[2J" + "x" * 10_000)
    [message] = caplog.messages
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 1000


def test_what_was_counted_is_told_at_the_end(complaints: Complaints, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(TOLD_MAX + 2):
        complaints.note("token: guess")
    complaints.close()
    complaints.close()
    assert caplog.messages[-1] == "here: refused 2 more: token"
