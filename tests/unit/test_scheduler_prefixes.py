"""Promises of placing by prefix: where most is cached, unless waiting there costs more; hints are only hints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attention_workers import prefix_names
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import FinishRequested, Running, Submitted
from cluster.scheduler.prefixes import Prefixes, hints_of
from tests.unit.scheduler_peers import MODEL, submission
from tests.unit.scheduler_story import LIMITS, W0, W1, G, Story, attempt, siblings

ROOMY = replace(LIMITS, prefix_cache=True, blocks_total=1024, model_len_max=4096)


def story(*workers, **kw) -> Story:
    return Story(*(workers or (W0, W1)), limits=ROOMY, **kw)


def hints(num_tokens: int, salt: str = "", first: int = 0) -> list[int]:
    """Of a prompt of consecutive tokens."""
    names: list[bytes] = []
    prefix_names.follow(names, range(first, first + num_tokens), 16, prefix_names.root(MODEL, salt))
    return [prefix_names.hint(name) for name in names]


def ask(told: Story, name: str, num_prompt: int, first: int = 0, salt: str = "") -> None:
    asked = submission(name, num_prompt)
    told.tell(Submitted(G, replace(asked, prompt=tuple(range(first, first + num_prompt)), cache_salt=salt)))


def done(told: Story, worker, name: str, **said) -> None:
    told.report(worker, prompts_done=(attempt(name),), **said)


def test_a_request_goes_where_most_of_its_prompt_is_cached() -> None:
    """Though another is as free, or a little freer."""
    told = story()
    told.report(W1, kept=hints(320))
    told.report(W0, kept=hints(64))
    ask(told, "a", 330)
    assert told.started(told.round()) == {W1: ["a"]}
    done(told, W1, "a")
    ask(told, "b", 330)
    assert told.started(told.round()) == {W1: ["b"]}


def test_siblings_go_where_the_first_computes_their_prompt() -> None:
    """Together, to one of two workers that are both free; a short prompt is not worth the company."""
    told = story()
    told.submit("long", num_prompt=800, siblings=siblings(4))
    assert [len(names) for names in told.started(told.round()).values()] == [4]
    told = story()
    told.submit("short", num_prompt=5, siblings=siblings(4))
    assert sorted(len(names) for names in told.started(told.round()).values()) == [2, 2]


def test_a_prompt_that_is_scored_is_not_expected_to_skip_what_is_cached() -> None:
    """It computes all of it wherever it is: so it goes where the wait is shorter."""
    for score_from, expected in ((0, W1), (1, W0)):
        told = story()
        told.report(W1, kept=hints(320))
        told.report(W0, kept=())
        ask(told, "before", 16, first=5000)
        told.report(W0, num_paused=1)
        assert told.started(told.round()) == {W1: ["before"]}
        told.report(W0, num_paused=0)
        asked = replace(submission("a", 330), prompt=tuple(range(330)))
        (sibling,) = asked.siblings
        told.tell(Submitted(G, replace(asked, siblings=(replace(sibling, score_from=score_from),))))
        assert told.started(told.round()) == {expected: ["a"]}


def test_a_request_does_not_wait_longer_than_its_prefix_saves() -> None:
    """512 tokens saved are not worth 2,000 that are computed there before it."""
    told = story()
    told.report(W1, kept=hints(512))
    told.report(W0, kept=())
    ask(told, "before", 2000, first=5000)
    told.report(W0, num_paused=1)
    assert told.started(told.round()) == {W1: ["before"]}
    told.report(W0, num_paused=0)
    ask(told, "a", 520)
    assert told.started(told.round()) == {W0: ["a"]}
    done(told, W1, "before")
    ask(told, "b", 520)
    ask(told, "c", 40, first=9000)
    assert told.started(told.round())[W1][0] == "b"


def test_requests_that_begin_alike_follow_the_first_before_it_has_said_anything() -> None:
    """In one burst; those of another prefix go elsewhere."""
    told = story()
    for number in range(4):
        ask(told, f"a{number}", 650)
        ask(told, f"b{number}", 650, first=7000)
    started = told.started(told.round())
    assert {name[0] for name in started[W0]} != {name[0] for name in started[W1]}
    assert sorted(map(len, started.values())) == [4, 4]
    assert all(len({name[0] for name in names}) == 1 for names in started.values())


def test_where_nothing_is_known_the_least_loaded_is_chosen() -> None:
    told = story()
    for number in range(4):
        ask(told, f"r{number}", 100, first=1000 * number)
    assert told.started(told.round()) == {W0: ["r0", "r2"], W1: ["r1", "r3"]}


def test_a_worker_without_a_prefix_cache_is_expected_to_have_nothing() -> None:
    told = Story(W0, W1, limits=replace(ROOMY, prefix_cache=False))
    for number in range(4):
        ask(told, f"r{number}", 320)
    assert told.started(told.round()) == {W0: ["r0", "r2"], W1: ["r1", "r3"]}


def test_salts_are_placed_apart() -> None:
    told = story()
    told.report(W1, kept=hints(320, salt="mine"))
    ask(told, "a", 330)
    assert told.started(told.round()) == {W0: ["a"]}
    done(told, W0, "a")
    told.report(W0, evicted=hints(320))
    ask(told, "b", 330, salt="mine")
    assert told.started(told.round()) == {W1: ["b"]}


def test_what_was_evicted_is_expected_no_more() -> None:
    told = story()
    told.report(W1, kept=hints(320))
    told.report(W1, evicted=hints(320)[5:])
    told.report(W0, kept=hints(160))
    ask(told, "a", 330)
    assert told.started(told.round()) == {W0: ["a"]}


def test_a_new_scheduler_learns_what_its_workers_have() -> None:
    """From the answer to its first plan; a state that was not asked for changes nothing."""
    told = story(term=2)
    told.report(W1, kept=hints(320), state=())
    ask(told, "a", 330)
    assert told.started(told.round()) == {W1: ["a"]}
    told.report(W1, kept=hints(64), state=(Running(attempt("a"), 330, True, 0, 1),))
    assert told.scheduler.snapshot()["worker/attention-1/prefix_hints"] == 4


def test_a_wrong_hint_costs_nothing_but_time() -> None:
    """All that a worker claims may be false: its sequence runs there all the same, and ends."""
    told = story()
    told.report(W1, kept=hints(640))
    ask(told, "a", 650)
    assert told.started(told.round()) == {W1: ["a"]}
    done(told, W1, "a", evicted=hints(640))
    told.tell(FinishRequested(G, attempt("a")))
    told.round()
    told.complete(W1, attempt("a"))
    assert told.scheduler.snapshot()["running"] == 0


@pytest.mark.parametrize("num_known", [0, 1, 7, 20])
def test_a_match_is_what_is_there_from_the_beginning(num_known: int) -> None:
    known = Prefixes(100)
    known.expect(hints(320)[:num_known])
    assert known.matched(hints(320)) == num_known
    assert known.matched(hints(16 * 5)) == min(num_known, 5)
    assert known.matched(hints(320, first=1)) == 0


def test_hints_are_bounded_and_the_longest_unused_is_forgotten() -> None:
    known = Prefixes(10)
    known.expect(range(10))
    known.expect([0])
    known.expect([99])
    assert len(known) == 10
    assert known.matched([0]) == known.matched([99]) == 1
    assert known.matched([1]) == 0
    bounded = story(config=SchedulerConfig(prefix_hints_max=8))
    bounded.report(W1, kept=hints(640))
    assert bounded.scheduler.snapshot()["worker/attention-1/prefix_hints"] == 8


def test_the_scheduler_calls_blocks_what_workers_do() -> None:
    """One hash of fingerprint, salt and tokens, wherever it is computed; and kept for a submission."""
    asked = replace(submission("a", 100), cache_salt="s")
    assert hints_of(asked, 16) == hints(100, salt="s")
    assert hints_of(asked, 16) is hints_of(asked, 16)
