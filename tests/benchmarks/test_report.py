"""Goals, rows and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.growth import exponent_row
from benchmarks.report import COLUMNS, Goal, PartTable, Row, at_least, at_most, cells, markdown, not_measured, put_into, write
from benchmarks.sweep import Timeline
from benchmarks.timing import Sample


def _table(*rows: Row) -> PartTable:
    return PartTable("a", "loops", rows, 12.0, "a machine", "python -m benchmarks --only a")


@pytest.mark.parametrize(
    ("goal", "values", "verdict"),
    [
        (at_least(8), (7.0, 8.0, 9.0), "met"),
        (at_least(8), (7.0, 7.9, 99.0), "NOT MET"),
        (at_most(1.05), (1.0, 1.05, 9.0), "met"),
        (at_most(1.05), (1.0, 1.06, 1.06), "NOT MET"),
        (None, (1.0,), ""),
    ],
)
def test_the_median_is_held_against_the_goal(goal: Goal | None, values: tuple[float, ...], verdict: str) -> None:
    assert Row("what", Sample(values), goal=goal).verdict == verdict


def test_what_could_not_be_measured_meets_no_goal_and_says_why() -> None:
    row = not_measured("peer", "pip could not fetch it", at_least(8))
    assert row.verdict == "not measured"
    assert cells(row) == ("peer", "-", "", "", "", ">= 8", "not measured", "pip could not fetch it")


def test_a_row_shows_median_range_and_how_many_values() -> None:
    shown = dict(zip(COLUMNS, cells(Row("what", Sample((1.0, 2.0, 4.0)), goal=at_most(3), wall=2.5, note="why")), strict=True))
    assert shown["median [min .. max]"] == "2 x [1 .. 4]"
    assert (shown["n"], shown["wall"], shown["goal"], shown[""], shown["note"]) == ("3", "2.5", "<= 3", "met", "why")


def test_a_lone_value_has_no_range() -> None:
    assert cells(Row("what", Sample((3.0,)), "s"))[1] == "3 s"


def test_a_markdown_table_stands_below_its_machine_and_command() -> None:
    text = markdown([_table(Row("a | b", Sample((1.0,)), goal=at_least(2)))])
    assert text.index("a machine") < text.index("`python -m benchmarks --only a`") < text.index("| what |")
    assert "| a / b | 1 x | 1 |  |  | >= 2 | NOT MET |  |" in text


def test_the_files_hold_every_single_value_and_the_verdict(tmp_path: Path) -> None:
    write([_table(Row("what", Sample((1.0, 3.0)), goal=at_least(2)))], tmp_path / "new")
    (part,) = json.loads((tmp_path / "new" / "bench.json").read_text())
    (row,) = part["rows"]
    assert row["value"]["values"] == [1.0, 3.0]
    assert (row["median"], row["verdict"], part["command"]) == (2.0, "met", "python -m benchmarks --only a")
    assert (tmp_path / "new" / "bench.md").read_text() == markdown([_table(Row("what", Sample((1.0, 3.0)), goal=at_least(2)))])


def test_a_page_gets_the_tables_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\n\n### a. loops\n\nold\n\n### b. other\n\nkept\n\n<!-- /tables -->\nafter\n")
    for _ in range(2):
        put_into(page, [_table(Row("what", Sample((1.0,))))])
    text = page.read_text()
    assert text.index("### a. loops") < text.index("| what | 1 x |") < text.index("### b. other\n\nkept\n")
    assert text.count("###") == 2
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| what | 1 x |") == 1


def test_exponents_are_fitted_round_by_round() -> None:
    linear, square = (10.0, 20.0, 40.0), (10.0, 40.0, 160.0)
    samples = [Sample(both) for both in zip(linear, square, strict=True)]
    row = exponent_row("growth", (1, 2, 4), samples)
    assert row.value is not None
    assert row.value.values == pytest.approx((1.0, 2.0))
    assert row.verdict == "NOT MET"


def test_a_sweep_goes_on_at_the_pace_of_its_last_trials() -> None:
    # The first trials wait for Ray: only the pace of the second half counts.
    timeline = Timeline(ends=(20.0, 21.0, 23.0, 25.0), total=27.0)
    assert timeline.extrapolated(4) == 27.0
    assert timeline.extrapolated(16) == pytest.approx(27 + 12 * 2)
