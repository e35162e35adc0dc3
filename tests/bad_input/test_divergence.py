"""Trainings that diverge: on record where the board needs them, one line where the run can't go on."""

from __future__ import annotations

import json

import pytest

from kdbench.benchmark import emptying
from tests.bad_input.tiny_experiment import assert_one_line, results, run
from tests.console import Kdbench

WILD = {"lr": 1e4, "weight_decay": 1e4, "batch_size": 20}  # ten steps, each of which makes the weights 10^8 times as large


def test_a_teacher_that_diverges_ends_the_run(kdbench: Kdbench) -> None:
    ended = run(kdbench, {f"teacher.recipe.{name}": value for name, value in WILD.items()})
    assert_one_line(ended, 1, "teacher tiny_cnn: the loss became nan in epoch 1 of 1 (lr 10000); lower teacher.recipe.lr")
    assert results() == []


def test_a_final_that_diverges_is_on_record_as_failed_and_the_board_says_so(kdbench: Kdbench) -> None:
    ended = run(kdbench, {"methods": ["none", {"name": "kd", "kd_weight": 1e30}]})
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "kdbench: 1 of the trainings could not be finished:",
        "  kd seed 0: the loss became nan in epoch 1 of 1 (lr 0.1)",
    ]
    assert results() == ["final kd failed", "final none ok", "teacher teacher ok"]
    [board] = json.loads(kdbench("leaderboard", "--results", "results", "--format", "json").out)["boards"]
    rows = {row["method"]: row for row in board["rows"]}
    assert {name: (row["seeds"], row["failed"]) for name, row in rows.items()} == {"none": (1, 0), "kd": (0, 1)}
    assert rows["kd"]["mean"] is rows["kd"]["rank"] is None  # no seed of it finished, so nothing of it was measured
    assert "1 failed" in kdbench("leaderboard", "--results", "results").out


def test_a_failed_final_is_not_trained_again_and_the_exit_code_stays(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = {f"recipe.{name}": value for name, value in WILD.items()} | {"teacher.recipe": {"lr": 0.1, "weight_decay": 0.0}}
    first = run(kdbench, wild)
    monkeypatch.setattr(emptying, "run_here", lambda *_: pytest.fail("something was trained again"))
    again = run(kdbench, wild)
    assert (again.code, again.err) == (first.code, first.err)
