"""Two rules of search on one pair: the boards stay apart, and each says where the other comes to another answer."""

from __future__ import annotations

from typing import Any

import pytest

from kdbench.boards.leaderboard import boards

SAME = {"none": 70.0, "kd": 80.0}


@pytest.fixture
def made(make_record):
    def make(protocol: str, values: dict[str, float], **fields: Any) -> list[Any]:
        fields = {"trials": 20, "sampler": "tpe", "protocol_hash": protocol} | fields
        return [
            make_record(method=label, label=label, seed=seed, test_metric=mean + 0.1 * (seed * len(label) % 3), **fields)
            for label, mean in values.items()
            for seed in range(3)
        ]

    return make


def findings(records: list[Any]) -> list[list[str]]:
    return [[line for line in board.findings if line.startswith("another rule")] for board in boards(records)]


def test_a_method_that_is_better_by_one_rule_and_worse_by_the_other_is_named_on_both_boards(made) -> None:
    by_trials = made("a" * 16, {**SAME, "dear": 85.0})
    by_hours = made("b" * 16, {**SAME, "dear": 75.0}, search_budget={"device_hours": 0.5}, trials=3)
    said = "another rule of search, {}, comes to another answer against kd (board {}): dear ({} here, {} there)"
    assert findings(by_trials + by_hours) == [
        [said.format("0.5 device-hours a method", "b" * 8, "better", "worse")],
        [said.format("20 trials a method", "a" * 8, "worse", "better")],
    ]


def test_rules_that_agree_and_boards_that_differ_otherwise_say_nothing(made) -> None:
    dear = {**SAME, "dear": 85.0}
    by_trials = made("a" * 16, dear)
    agreeing = made("b" * 16, dear, search_budget={"device_hours": 0.5})
    assert findings(by_trials + agreeing) == [[], []]
    other_recipe = made("c" * 16, {**SAME, "dear": 75.0}, search_budget={"device_hours": 0.5}, recipe={"epochs": 9, "lr": 0.1})
    assert findings(by_trials + other_recipe) == [[], []]
    same_rule = made("d" * 16, {**SAME, "dear": 75.0})
    assert findings(by_trials + same_rule) == [[], []]


def test_the_first_note_says_what_the_budget_paid_for(made) -> None:
    records = made("b" * 16, SAME, search_budget={"epochs": 200.0}, trials=3, scheduler="none")
    assert boards(records)[0].notes[0] == "3 seeds a method; search: 200 epochs a method (none, tpe), which are trials: kd 3, none 3"


def test_boards_of_one_budget_are_of_one_family_however_many_trials_it_paid_for(made) -> None:
    budget = {"device_hours": 0.5}
    found = boards(
        made("a" * 16, SAME, search_budget=budget, trials=3) + made("b" * 16, SAME, search_budget=budget, trials=7, student="other")
    )
    assert len({board.family for board in found}) == 1
