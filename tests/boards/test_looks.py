"""Seeds until decided: which rows are looked at again, with how many seeds, at which level, and what the board says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from kdbench.boards.finals import Finals
from kdbench.boards.leaderboard import boards, seeds_still_wanted
from kdbench.boards.simultaneous import differences, spreads
from kdbench.boards.standings import Scale, standings
from kdbench.records.plan import Plan, control_of, doubled
from kdbench.records.record import RunRecord

PLAN = Plan(seeds=3, control_seeds=3, looks=(3, 6, 12))
VALUES: dict[str, list[float]] = {
    "none": [80.1, 80.3, 79.8, 80.2, 80.0, 79.9],
    "kd": [84.0, 84.3, 83.9, 84.2, 83.8, 84.1],
    "far": [89.0, 89.2, 88.9],
    "worse": [81.0, 81.3, 80.9],
    "near": [84.2, 84.6, 84.1, 84.5, 84.1, 84.3],
    "equal": [84.1, 84.2, 84.0, 84.1, 84.0, 84.1],
}

Make = Callable[[Mapping[str, list[float]], Plan], list[RunRecord]]


@pytest.fixture
def made(make_record: Callable[..., RunRecord]) -> Make:
    """The finals of all labels, seeds 0, 1, ..., each with the plan."""

    def make(values: Mapping[str, list[float]], plan: Plan) -> list[RunRecord]:
        told = plan.model_dump(mode="json", exclude_defaults=True)
        return [
            make_record(method=label, label=label, seed=seed, test_metric=value, plan=told)
            for label, of in values.items()
            for seed, value in enumerate(of)
        ]

    return make


def first(seeds: int) -> dict[str, list[float]]:
    return {label: values[:seeds] for label, values in VALUES.items()}


def test_the_looks_double_up_to_the_last() -> None:
    assert (doubled(3, 12), doubled(3, 10), doubled(3, 6), doubled(4, 4)) == ((3, 6, 12), (3, 6, 10), (3, 6), (4,))
    assert [round(1 - level, 4) for level in PLAN.levels] == [0.01, 0.015, 0.025]
    assert Plan(seeds=3, control_seeds=6).levels == ()


def test_rows_that_are_told_apart_from_kd_get_no_more_seeds(made: Make) -> None:
    assert seeds_still_wanted(made(first(3), PLAN), PLAN, {"kd", "none"}) == {"near": 6, "equal": 6, "kd": 6, "none": 6}
    assert seeds_still_wanted(made(VALUES, PLAN), PLAN, {"kd", "none"}) == {"equal": 12, "kd": 12, "none": 12}


def test_a_lead_that_does_not_matter_needs_no_more_seeds(made: Make) -> None:
    """`equal` is surely not better by 0.4 after three seeds; whether it is better at all is not known, and not asked."""
    matters = PLAN.model_copy(update={"matters": 0.4})
    wanted = seeds_still_wanted(made(first(3), matters), matters, {"kd", "none"})
    assert "equal" not in wanted
    assert "near" in wanted


def test_nobody_is_looked_at_again_before_all_have_the_seeds_of_the_look(made: Make) -> None:
    values = {**VALUES, "equal": VALUES["equal"][:5]}
    [board] = boards(made(values, PLAN))
    looked = {row.label: (row.looked, row.undecided) for row in board.rows}
    assert looked == {
        "none": (3, False),
        "kd": (3, False),
        "far": (3, False),
        "worse": (3, False),
        "near": (3, True),
        "equal": (3, True),
    }
    assert any("not decided yet: near, equal (the same command goes on)" in note for note in board.notes)


def test_a_row_prints_the_interval_of_its_last_look(made: Make) -> None:
    """At the level of that look, from the rows that were looked at with it, for all comparisons of the first look."""
    [board] = boards(made(VALUES, PLAN))
    rows = {row.label: row for row in board.rows}
    assert {label: row.looked for label, row in rows.items()} == {"none": 6, "kd": 6, "far": 3, "worse": 3, "near": 6, "equal": 6}

    at_three = np.array([VALUES[label][:3] for label in VALUES])
    at_six = np.array([VALUES[label] for label in ("near", "equal", "kd", "none")])
    for label, block, names, level in (
        ("far", at_three, [*VALUES], 0.99),
        ("worse", at_three, [*VALUES], 0.99),
        ("near", at_six, ["near", "equal", "kd", "none"], 0.985),
        ("none", at_six, ["near", "equal", "kd", "none"], 0.985),
    ):
        found = spreads(block)
        assert found is not None
        for control, shown in (("kd", rows[label].over_control), ("none", rows[label].over_undistilled)):
            if label == control:
                continue
            expected = differences(block, names.index(control), found, level=level, comparisons=5)[names.index(label)]
            assert shown is not None
            assert (shown.low, shown.high, shown.p) == pytest.approx((expected.low, expected.high, expected.p))
    assert (rows["far"].verdict, rows["near"].verdict, rows["worse"].verdict, rows["equal"].verdict) == (1, 1, -1, 0)


def test_ranks_are_of_the_seeds_that_all_rows_have(made: Make) -> None:
    ranks = [{row.label: (row.rank, row.rank_high) for row in boards(made(values, PLAN))[0].rows} for values in (first(3), VALUES)]
    assert ranks[0] == ranks[1]


def test_the_board_says_who_was_decided_when(made: Make) -> None:
    [board] = boards(made(VALUES, PLAN))
    said = (
        "decided at 3 (99%), 6 (98.5%) or 12 seeds (97.5%): far, worse at 3; near at 6; not decided yet: equal "
        "(the same command goes on); ranks are of the first 3 seeds"
    )
    assert said == next(note for note in board.notes if note.startswith("decided"))
    assert board.notes[0] == "3 seeds a method, and more until it is decided, up to 12; no search, parameters as configured"
    assert not any("added after a look" in note for note in board.notes)


def test_seeds_that_were_planned_only_after_others_had_been_seen_are_told(made: Make, make_record: Callable[..., RunRecord]) -> None:
    fixed, more = Plan(seeds=3, control_seeds=3), Plan(seeds=4, control_seeds=4)
    records = made({label: values[:3] for label, values in VALUES.items() if label != "near"}, fixed)
    told = more.model_dump(mode="json", exclude_defaults=True)
    added = [make_record(method="far", label="far", seed=3, test_metric=89.1, plan=told)]
    assert not any("added after a look" in note for note in boards(records)[0].notes)
    assert "seeds were added after a look, and the 95% do not hold: far" in boards(records + added)[0].notes


def test_a_board_counts_on_the_seeds_of_its_plan(made: Make) -> None:
    """A killed run knows from its first final how many there will be: who has more so far is not ahead of the others."""
    plan = Plan(seeds=3, control_seeds=6)
    [board] = boards(made({"none": VALUES["none"], "kd": VALUES["kd"][:2], "far": VALUES["far"][:1]}, plan))
    assert {row.label: row.rank for row in board.rows} == {"none": 1, "kd": None, "far": None}
    assert board.notes[0].startswith("3 seeds a method")


def test_equal_rows_are_seldom_told_apart_in_all_looks_together(make_record: Callable[..., RunRecord]) -> None:
    """200 boards of 12 equal rows: the chance of any false verdict is 2.7% by the simulation behind the procedure, here at most 5%."""
    draws = np.random.default_rng(5)
    labels = ["none", "kd", *(f"m{number}" for number in range(10))]
    records = {label: make_record(method=label, label=label) for label in labels}
    false = 0
    for _ in range(200):
        values = draws.normal(80, 1, (12, 12)) + draws.normal(0, 0.6, 12)
        groups = [
            Finals(label, dict.fromkeys(range(12), records[label]), 0, 1.0, 1, dict(enumerate(row.tolist())))
            for label, row in zip(labels, values, strict=True)
        ]
        options: dict[str, Any] = {"undistilled": groups[0], "control": groups[1], "teacher": None, "scale": Scale()}
        found = standings(groups, rows_by="method", plan=PLAN, **options)
        false += any(one.over_control is not None and one.over_control.low * one.over_control.high > 0 for one in found.rows.values())
    assert false <= 10


def test_a_control_is_the_row_of_that_label_or_the_only_one_of_that_method() -> None:
    assert control_of([("kd", "kd"), ("kd hot", "kd")], "kd") == "kd"
    assert control_of([("mine", "kd"), ("none", "none")], "kd") == "mine"
    assert control_of([("a", "kd"), ("b", "kd")], "kd") is None
    assert control_of([], "kd") is None


def test_a_row_whose_failed_seed_nothing_stands_for_is_not_waited_for(made: Make) -> None:
    """Without `none`, a failed seed is missing: the row stays where it was looked at, and asks for no more seeds for ever."""
    failed = {"status": "failed", "failure": "nan", "test_metric": None}
    records = [
        record.model_copy(update=failed) if (record.label, record.seed) == ("equal", 4) else record
        for record in made({label: values for label, values in VALUES.items() if label != "none"}, PLAN)
    ]
    assert "equal" not in seeds_still_wanted(records, PLAN, {"kd"})
    assert not any("goes on" in note for note in boards(records)[0].notes)


def test_a_plan_that_was_changed_after_a_look_is_told_beside_the_looks(made: Make) -> None:
    fixed = Plan(seeds=3, control_seeds=3)
    records = made(first(3), fixed) + [record for record in made(VALUES, PLAN) if record.seed > 2]
    notes = boards(records)[0].notes
    assert any(note.startswith("decided at 3") for note in notes)
    assert any(note.startswith("seeds were added after a look") for note in notes)


def test_with_another_control_what_is_missed_is_of_the_first_seeds(made: Make) -> None:
    [board] = boards(made(VALUES, PLAN), control="near")
    assert not any("with 12 seeds, a true difference" in note for note in board.notes)
