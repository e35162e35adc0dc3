"""Each row against each other: differences over common seeds, and marks that are those of the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from kdbench.boards.leaderboard import boards
from kdbench.report.pairwise import pairwise
from kdbench.report.rendering import render
from tests.boards.layouts import EVEN, EVEN_LABELS
from tests.console import Kdbench
from tests.report.conftest import write_board


@pytest.fixture
def board(make_record):
    values = dict(zip(EVEN_LABELS, EVEN, strict=True))
    records = [
        make_record(method=label, label=label, seed=seed, test_metric=value)
        for label, of in values.items()
        for seed, value in enumerate(of)
    ]
    return boards(records)[0]


def test_a_cell_is_the_difference_of_two_rows_and_is_marked_where_they_are_told_apart(board) -> None:
    titles, lines = pairwise(board)
    assert titles == ["method", "1", "2", "3", "4", "5", "6"]
    assert [line[0] for line in lines] == [f"{place} {row.label}" for place, row in enumerate(board.rows, start=1)]
    values = dict(zip(EVEN_LABELS, EVEN, strict=True))
    for row, line in zip(board.rows, lines, strict=True):
        for other, cell in zip(board.rows, line[1:], strict=True):
            if row is other:
                assert cell == ""
                continue
            ahead = fmean(a - b for a, b in zip(values[row.label], values[other.label], strict=True))
            mark = " ▲" if other.label in row.better_than else " ▼" if row.label in other.better_than else ""
            assert cell == f"{ahead:+.2f}{mark}"
    assert any(cell.endswith("▲") for line in lines for cell in line)
    assert any(cell[-1:].isdigit() for line in lines for cell in line[1:])


def test_markdown_has_a_table_of_pairs_where_it_is_asked_for(board) -> None:
    text = render([board], "markdown", with_pairs=True)
    assert "| method | 1 | 2 | 3 | 4 | 5 | 6 |" in text
    assert "▲" in text
    assert "| method | 1 | 2" not in render([board], "markdown")
    assert json.loads(render([board], "json"))["boards"][0]["rows"][0]["better_than"] == ["label_smoothing", "none", "tf_nkd"]


def test_the_command_prints_it_and_refuses_it_where_it_can_not_be(kdbench: Kdbench, tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd", "dkd"), seeds=2, searched=False)
    assert "▲ surely better" in kdbench("leaderboard", "--pairwise", "--results", str(tmp_path)).out
    ended = kdbench("leaderboard", "--pairwise", "--format", "csv", "--results", str(tmp_path))
    assert ended.code == 2
    assert "--pairwise is of boards that are printed as table or markdown" in ended.err


def test_controls_with_more_seeds_by_plan_are_no_exception(make_record) -> None:
    """The column `seeds` says `3 of 6` of nobody that has what it was meant to have."""
    plan = {"seeds": 3, "control_seeds": 6}
    records = [
        make_record(method=label, label=label, seed=seed, test_metric=80.0 + seed % 2 + len(label), plan=plan)
        for label, count in (("none", 6), ("kd", 6), ("dkd", 3), ("nkd", 2))
        for seed in range(count)
    ]
    [found] = boards(records)
    assert {row.label: (row.seeds, found.meant(row)) for row in found.rows} == {"none": (6, 6), "kd": (6, 6), "dkd": (3, 3), "nkd": (2, 3)}
    text = render([found], "markdown")
    assert "2 of 3" in text
    assert "3 of 6" not in text
