"""The simulator's promises: a hundred faulty histories in which nothing breaks, each the same whenever told."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.sim.run import Outcome, run
from cluster.sim.scenario import VERBS, Fault, Scenario, ScenarioError, Shape, drawn, parse
from cluster.sim.story import replay, summary

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios").glob("*.scenario"))
NUM_SEEDS, AT_ONCE = 100, 10

outcome = functools.cache(lambda seed: run(drawn(seed)))


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, AT_ONCE))
def test_no_fault_breaks_a_promise(first: int) -> None:
    """Of all that `cluster.sim.checks` looks at, after every event; and when all is healed everything comes to
    rest. `make soak` tries a thousand."""
    broken = [outcome(seed) for seed in range(first, first + AT_ONCE) if outcome(seed).broken]
    assert not broken, "\n".join(f"{summary(one)}\nagain: {replay(one)}" for one in broken)


def test_the_histories_are_eventful() -> None:
    """Else the test above would promise little."""
    all_of_them = [outcome(seed) for seed in range(NUM_SEEDS)]
    assert sum(one.lost for one in all_of_them) > NUM_SEEDS
    assert sum(one.restarts for one in all_of_them) > NUM_SEEDS / 4
    assert sum(one.tokens for one in all_of_them) > 50 * NUM_SEEDS
    assert {fault.verb for one in all_of_them for fault in one.scenario.faults} == VERBS.keys()


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_each_kind_of_incident_is_survived_as_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What happens, and when. Where a decision has changed on purpose: `python -m tests.scenarios.write`."""
    assert main(["simulate", "--scenario", str(path), "--trace"]) == 0
    assert capsys.readouterr().out == path.with_suffix(".golden").read_text()


def test_the_same_scenario_is_the_same_story_in_another_process() -> None:
    """Whatever the order of sets there."""
    path = next(path for path in SCENARIOS if path.stem == "two_schedulers")
    command = [sys.executable, "-m", "cluster.cli", "simulate", "--scenario", str(path), "--trace"]
    for_hashes = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    there = subprocess.run(command, env=os.environ | for_hashes, capture_output=True, text=True, check=True)
    assert there.stdout == path.with_suffix(".golden").read_text()


@pytest.mark.parametrize("seed", range(50))
def test_a_scenario_is_read_as_it_is_written(seed: int) -> None:
    assert parse(drawn(seed).text) == drawn(seed)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("at 3 explode expert-0", "accepted after the time: kill, freeze"),
        ("at 3 freeze expert-0", "at T freeze WORKER for S"),
        ("at -3 kill expert-0", "accepted: seconds from 0 on"),
        ("cluster attention=0", "attention is 0, accepted: 1 to 64"),
        ("cluster routers=2", "'routers=2', accepted: name=value"),
        ("requests count=many", "invalid literal"),
        ("please", "accepted: seed, heal, cluster, requests, at"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_what_is_accepted(line: str, says: str) -> None:
    with pytest.raises(ScenarioError, match=f"^line 2: .*{says}"):
        parse(f"# a comment\n{line}\n")


@pytest.mark.parametrize(
    "arguments", [["--seed", "-1"], ["--seeds", "9-3"], ["--seeds", "x"], ["--scenario", "/nowhere.scenario"]]
)
def test_what_cannot_be_simulated_is_refused_by_name(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_command_prints_a_scenario_to_be_changed_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--seed", "7", "--print"]) == 0
    assert parse(capsys.readouterr().out) == drawn(7)


def test_the_command_speaks_json_a_line_for_each_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--seeds", "3-4", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["seed"] for one in said] == [3, 4]
    assert not any(one["broken"] for one in said)


def test_a_broken_seed_says_how_to_see_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time to come to rest in is a promise that nobody keeps."""
    monkeypatch.setattr("cluster.sim.run.REST_S_MAX", 0.0)
    assert main(["simulate", "--seed", "3"]) == 1
    out, err = capsys.readouterr()
    assert "BROKEN" in out
    assert err == "again: expertmesh simulate --seed 3 --trace\n"


def test_without_faults_nobody_is_lost_and_nobody_waits_long() -> None:
    calm: Outcome = run(Scenario(1, Shape(attention=2, experts=3, replicas=2)))
    assert (calm.broken, calm.lost, calm.restarts) == ("", 0, 0)


def test_replicas_keep_the_gap_of_an_expert_loss_short() -> None:
    """Within a step: nobody waits for a reload."""
    loss = (Fault(3.0, "kill", "expert-1"),)
    calm, lossy = [run(Scenario(5, Shape(experts=3, replicas=2), faults=faults)) for faults in ((), loss)]
    assert not lossy.broken
    assert lossy.lost == 1
    assert lossy.worst_gap_s <= calm.worst_gap_s + 0.3
