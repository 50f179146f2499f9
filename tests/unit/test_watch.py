"""Promises of the watch over loops and threads: what hangs is named, what was only frozen is not."""

import threading

from cluster.loop_thread import LoopThread
from cluster.watch import TurnWatch


def test_what_has_not_turned_for_too_long_is_named_with_its_time() -> None:
    watch = TurnWatch({"loop": 5.0, "compute": 60.0})
    for second in range(7):
        hung = watch.look({"loop": 1, "compute": 1}, 100.0 + second)
        assert hung == ("loop has not turned for 6.0 s" if second == 6 else "")


def test_what_turns_may_take_as_long_as_it_likes_between_two_looks() -> None:
    watch = TurnWatch({"loop": 5.0})
    assert not any(watch.look({"loop": second // 5}, float(second)) for second in range(60))


def test_a_process_that_was_frozen_is_not_judged_by_the_time_it_was_away() -> None:
    """SIGSTOP and SIGCONT: the watch was away itself."""
    watch = TurnWatch({"loop": 5.0})
    watch.look({"loop": 7}, 0.0)
    assert watch.look({"loop": 7}, 100.0) == ""
    assert not any(watch.look({"loop": 7}, 100.0 + second) for second in range(6))
    assert watch.look({"loop": 7}, 106.0) == "loop has not turned for 6.0 s"


def test_a_blocked_loop_stops_counting_its_turns() -> None:
    thread, is_blocked, release = LoopThread("watched"), threading.Event(), threading.Event()
    before = thread.turns

    def block() -> None:
        is_blocked.set()
        release.wait()

    thread.loop.call_soon_threadsafe(block)
    assert is_blocked.wait(10)
    turns, watch = thread.turns, TurnWatch({"loop": 5.0})
    assert turns >= before
    assert [watch.look({"loop": thread.turns}, float(second)) for second in range(7)][-1]
    release.set()
    while thread.turns == turns:  # it turns again
        release.wait(0.01)
    thread.close(10)
