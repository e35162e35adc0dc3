"""What a search was worth, by its trials: the expected best of a random one, the running best of any other, and the report's figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scipy import stats as oracle

from kdbench.boards.tuning_curve import chance_of_being_ahead, expected_best, interval_of_the_median_best
from kdbench.records.folders import Folders
from kdbench.report.budgets import after_trials, budget
from kdbench.report.files import Report
from kdbench.report.searches import Search, State, Trial
from tests.report.conftest import write_board

VALUES = [78.0, 80.9, 63.5, 81.2, 79.4, 82.0, 75.1]


def study(values: list[float | None], states: dict[int, State] | None = None) -> Search:
    trials = tuple(Trial(number, (states or {}).get(number, "complete"), value, {}) for number, value in enumerate(values))
    return Search(trials, tuple(values), {}, None)


def test_of_a_random_search_the_default_comes_first_and_the_others_in_any_order() -> None:
    found = budget(1, "kd", [study([*VALUES])], "random", higher_is_better=True)
    assert found is not None
    assert found.expected
    assert found.curve.values == pytest.approx(expected_best(VALUES[1:], VALUES[0]))
    assert list(zip(found.low, found.high, strict=True)) == [interval_of_the_median_best(VALUES[1:], m) for m in range(1, 8)]


def test_of_any_other_search_the_best_so_far_is_shown_as_it_went() -> None:
    found = budget(1, "kd", [study([*VALUES])], "tpe", higher_is_better=True)
    assert found is not None
    assert found.curve.values == (78.0, 80.9, 80.9, 81.2, 81.2, 82.0, 82.0)
    assert set(found.low) == {None}


def test_of_three_searches_the_mean_has_students_interval() -> None:
    found = budget(1, "kd", [study([1.0, 3.0]), study([2.0, 2.0]), study([3.0, 1.0, 9.0])], "tpe", higher_is_better=True)
    assert found is not None
    assert found.curve.values == pytest.approx((2.0, 8 / 3))
    low, high = oracle.t.interval(0.95, 2, 2.0, oracle.sem([1.0, 2.0, 3.0]))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))


def test_where_less_is_better_the_curve_falls() -> None:
    found = budget(1, "kd", [study([3.0, 1.0, 2.0])], "tpe", higher_is_better=False)
    assert found is not None
    assert found.curve.values == (3.0, 1.0, 1.0)
    several = budget(1, "kd", [study([3.0]), study([4.0]), study([5.5])], "tpe", higher_is_better=False)
    assert several is not None
    assert several.low[0] is not None
    assert several.high[0] is not None
    assert several.low[0] < several.curve.values[0] < several.high[0]


def test_a_stopped_trial_counts_with_its_last_value_and_a_failed_one_does_not() -> None:
    found = budget(1, "kd", [study([5.0, 9.0, 7.0, None], {1: "failed", 2: "stopped", 3: "failed"})], "tpe", higher_is_better=True)
    assert found is not None
    assert found.curve.values == (5.0, 7.0)
    assert budget(1, "kd", [study([None], {0: "failed"})], "tpe", higher_is_better=True) is None


def test_the_table_ranks_the_methods_that_were_searched_so_long() -> None:
    long = budget(1, "kd", [study([1.0, 2.0, 3.0])], "tpe", higher_is_better=True)
    short = budget(2, "dkd", [study([2.0, 2.5])], "tpe", higher_is_better=True)
    assert long is not None
    assert short is not None
    counts, rows = after_trials([long, short], higher_is_better=True)
    assert counts == (1, 2, 3)
    assert [[cell and (cell.value, cell.rank) for cell in row] for row in rows] == [
        [(1.0, 2), (2.0, 2), (3.0, 1)],
        [(2.0, 1), (2.5, 1), None],
    ]


def test_the_chance_of_being_ahead_of_the_control_is_given_for_random_trials_alone() -> None:
    others = [80.0, 81.0, 79.0, 83.0, 60.0, 82.2, 70.0, 81.5]
    kd, dkd = (
        budget(number, label, [study([*values])], "random", higher_is_better=True)
        for number, (label, values) in enumerate((("kd", others), ("dkd", VALUES)))
    )
    assert kd is not None
    assert dkd is not None
    _, rows = after_trials([kd, dkd], higher_is_better=True, control="kd")
    assert [cell and cell.ahead for cell in rows[0]] == [None] * len(rows[0])
    chances = chance_of_being_ahead(VALUES, others)
    assert [cell and cell.ahead for cell in rows[1]][:3] == [chances[0], chances[1], chances[4]]
    by_tpe = budget(1, "dkd", [study([*VALUES])], "tpe", higher_is_better=True)
    assert by_tpe is not None
    _, rows = after_trials([kd, by_tpe], higher_is_better=True, control="kd")
    assert {cell and cell.ahead for cell in rows[1]} == {None}


def test_the_report_shows_what_the_searches_were_worth(tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd", "dkd"), seeds=2)
    html = Report(Folders([tmp_path])).write(tmp_path / "r.html").read_text()
    assert html.count("What the search was worth") == 1
    assert re.search(r'aria-label="validation accuracy by trial, \d methods"', html)
    write_board(tmp_path / "plain", ("none", "kd"), seeds=2, searched=False)
    assert "What the search was worth" not in Report(Folders([tmp_path / "plain"])).write(tmp_path / "p.html").read_text()
