"""Boards of students: one method's students under one protocol, paired by seed, with ranks as intervals and differences to a named one."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from kdbench.boards.board import Board, Row
from kdbench.boards.leaderboard import boards
from kdbench.boards.simultaneous import differences, spreads
from kdbench.records.store import ResultStore
from kdbench.report.rendering import render
from tests.console import Kdbench

# far apart, and two that nothing tells apart
VALUES = {"wide": [80.0, 80.6, 80.1], "middle": [75.0, 75.5, 75.2], "middling": [74.9, 75.6, 75.3], "narrow": [60.1, 60.4, 60.0]}
COSTS = {"wide": 4000, "middle": 2000, "middling": 3000, "narrow": 1000}


@pytest.fixture
def finals(make_record):
    """Final records of students by one method, from their test metrics, seeds 0, 1, ..."""

    def make(values: dict[str, list[float]], **fields: Any) -> list:
        return [
            make_record(
                **{"student": student, "seed": seed, "test_metric": value, "params_count": COSTS.get(student), "flops": 10_000, **fields}
            )
            for student, metrics in values.items()
            for seed, value in enumerate(metrics)
        ]

    return make


def only(found: list[Board]) -> Board:
    assert len(found) == 1
    return found[0]


def by_label(board: Board) -> dict[str, Row]:
    return {row.label: row for row in board.rows}


def test_students_of_one_method_are_ranked_by_intervals_that_hold_at_once(finals) -> None:
    board = only(boards(finals(VALUES), rows_by="student"))

    assert (board.method, board.student, board.rows_by, board.control) == ("kd", "", "student", None)
    assert [(r.label, r.rank, r.rank_high) for r in board.rows] == [("wide", 1, 1), ("middling", 2, 3), ("middle", 2, 3), ("narrow", 4, 4)]
    assert by_label(board)["wide"].mean == pytest.approx(sum(VALUES["wide"]) / 3)
    assert all((r.gain, r.gap_recovered, r.vs_control) == (None, None, None) for r in board.rows)
    assert board.findings == ("may be the best: wide",)
    assert any(
        "ranks hold all at once with 95%" in note and "pooled over 4 students (6 degrees of freedom)" in note for note in board.notes
    )
    assert not any("kd" in note or "undistilled" in note for note in board.notes)


def test_a_named_student_is_what_the_others_are_compared_with(finals) -> None:
    board = only(boards(finals(VALUES), rows_by="student", control="middle"))

    rows, order = by_label(board), [row.label for row in board.rows]
    block = [VALUES[label] for label in order]
    expected = differences(block, order.index("middle"), spreads(block))
    for place, label in enumerate(order):
        if label != "middle":
            row, said = rows[label], expected[place]
            assert row.shown_difference == pytest.approx((said.middle, said.low, said.high))
            assert row.over_control.p == pytest.approx(said.p)
            assert row.vs_control == pytest.approx(said.middle)
    assert rows["middle"].vs_control is None
    assert {label: row.verdict for label, row in rows.items()} == {"wide": 1, "middling": 0, "middle": 0, "narrow": -1}
    assert board.findings == ("may be the best: wide", "worse than middle: narrow", "better than middle: wide")
    assert any(note.startswith("no difference from middle was found") and note.endswith(": middling") for note in board.notes)
    assert board.detectable is not None
    assert any(note.startswith("a true difference from middle below") for note in board.notes)


def test_a_metric_where_lower_is_better_turns_ranks_and_differences(finals) -> None:
    board = only(boards(finals(VALUES, higher_is_better=False), rows_by="student", control="middle"))

    assert [row.label for row in board.rows] == ["narrow", "middle", "middling", "wide"]
    assert (board.rows[0].rank, board.rows[3].rank) == (1, 4)
    assert by_label(board)["narrow"].vs_control == pytest.approx(sum(VALUES["middle"]) / 3 - sum(VALUES["narrow"]) / 3)


def test_students_are_paired_by_their_seeds(finals, make_record) -> None:
    """Seeds that move all students alike do not count as error: the same values in another order of seeds tell nothing apart."""
    moved = {"a": [70.0, 75.0, 80.0], "b": [71.0, 76.1, 80.9]}
    swapped = {"a": [70.0, 75.0, 80.0], "b": [80.9, 71.0, 76.1]}

    assert [r.rank_high for r in only(boards(finals(moved), rows_by="student")).rows] == [1, 2]
    assert [r.rank_high for r in only(boards(finals(swapped), rows_by="student")).rows] == [2, 2]


def test_a_student_that_misses_a_seed_is_not_ranked_but_compared_over_those_it_has(finals) -> None:
    records = finals({**VALUES, "narrow": VALUES["narrow"][:2]})
    board = only(boards(records, rows_by="student", control="middle"))

    narrow = by_label(board)["narrow"]
    assert (board.rows[-1].label, narrow.rank, narrow.rank_high, narrow.seeds) == ("narrow", None, None, 2)
    assert narrow.vs_control == pytest.approx((60.1 - 75.0 + 60.4 - 75.5) / 2)
    assert narrow.over_control.low < narrow.vs_control < narrow.over_control.high
    assert "not ranked, not all of the 3 seeds that others have: narrow (2)" in board.notes
    assert [row.rank_high for row in board.rows[:3]] == [1, 3, 3]
    assert narrow.pareto == ()


@pytest.mark.parametrize("broken", [{"status": "failed", "test_metric": None}, {"test_metric": math.nan}])
def test_nothing_stands_for_a_failed_seed(finals, make_record, broken) -> None:
    records = [*finals({**VALUES, "narrow": VALUES["narrow"][:2]}), make_record(student="narrow", seed=2, **broken)]
    board = only(boards(records, rows_by="student"))

    narrow = by_label(board)["narrow"]
    assert (narrow.rank, narrow.seeds, narrow.failed) == (None, 2, 1)
    assert "failed seeds are left out: narrow (1)" in board.notes


def test_a_control_that_misses_seeds_or_is_missing_leaves_the_ranks_alone(finals) -> None:
    board = only(boards(finals({**VALUES, "narrow": VALUES["narrow"][:2]}), rows_by="student", control="narrow"))
    assert board.control is None
    assert all(row.vs_control is None for row in board.rows)
    assert "narrow misses seeds that others have: no differences are given" in board.notes

    assert "none is not on this board: no differences are given" in only(boards(finals(VALUES), rows_by="student", control="none")).notes


def test_the_seeds_that_most_students_have_are_compared(finals, make_record) -> None:
    """A student with the seeds 1, 2, 3 has as many as the others, but not theirs."""
    other = [make_record(student="other", seed=seed, test_metric=99.0 + seed) for seed in (1, 2, 3)]
    board = only(boards([*finals(VALUES), *other], rows_by="student"))

    assert by_label(board)["other"].rank is None
    assert by_label(board)["wide"].rank == 1


def test_one_seed_gives_all_students_all_ranks(finals) -> None:
    board = only(boards(finals({"a": [90.0], "b": [80.0]}), rows_by="student", control="b"))

    assert [(r.rank, r.rank_high) for r in board.rows] == [(1, 2), (1, 2)]
    assert (board.rows[0].vs_control, board.rows[0].vs_control_low, board.rows[0].verdict) == (10.0, None, 0)
    assert any("one seed tells nothing apart" in note for note in board.notes)


def test_each_method_protocol_and_teacher_has_a_board_of_its_own(finals) -> None:
    two = {"a": [90.0, 90.3], "b": [80.0, 80.2]}
    records = [
        *finals(two),
        *finals(two, method="none"),
        *finals(two, label="kd_hot"),
        *finals(two, protocol_hash="p2"),
        *finals(two, teacher="cifar_resnet20"),
        *finals({"a": [90.0, 90.3]}, method="nkd"),  # one student alone is no comparison
    ]
    found = boards(records, rows_by="student")

    assert sorted((b.method, b.protocol_hash, b.teacher) for b in found) == [
        ("kd", "p1", "cifar_resnet20"),
        ("kd", "p1", "cifar_resnet56"),
        ("kd", "p2", "cifar_resnet56"),
        ("kd_hot", "p1", "cifar_resnet56"),
        ("none", "p1", "cifar_resnet56"),
    ]


def test_costs_and_pareto_fronts_are_those_of_the_students(finals) -> None:
    rows = by_label(only(boards(finals(VALUES), rows_by="student")))

    assert {label: row.params_count for label, row in rows.items()} == COSTS
    assert {label for label, row in rows.items() if "params_count" in row.pareto} == {"wide", "middling", "middle", "narrow"} - (
        {"middling"} if rows["middling"].mean < rows["middle"].mean else set()
    )


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.fixture
def found(finals) -> list[Board]:
    return boards(finals(VALUES), rows_by="student", control="middle")


def test_the_terminal_and_markdown_show_ranks_as_intervals_and_costs(found) -> None:
    lines = render(found, "markdown").splitlines()
    assert lines[0] == "### classification on fashion_mnist: cifar_resnet56 -> students, by kd"
    assert lines[2] == "| rank | student | top1 [95%] | vs middle [all at once] | seeds | params | FLOPs | Pareto |"
    assert next(line for line in lines if "| wide |" in line).startswith("| 1 | wide | 80.23 [79.4")
    assert "| 2-3 | middling |" in "\n".join(lines)
    assert "- finding: worse than middle: narrow" in lines
    assert any("| method kd |" in line for line in lines)

    shown = render(found, "table", console=Console(width=160, color_system=None))
    assert all(word in shown for word in ("2-3", "middling", "4k", "vs middle", "students, by kd"))
    assert "vs middle [all" not in render(boards_without_control(found), "table", console=Console(width=160, color_system=None))


def boards_without_control(found: list[Board]) -> list[Board]:
    from dataclasses import replace

    return [replace(b, control=None, rows=tuple(replace(r, vs_control=None) for r in b.rows)) for b in found]


def test_json_and_csv_have_a_contract_of_their_own(found) -> None:
    data = json.loads(render(found, "json"))
    assert (data["boards"], data["across_pairs"]) == ([], [])
    [board] = data["students"]
    assert (board["method"], board["method_name"], board["control"]) == ("kd", "kd", "middle")
    assert not {"student", "undistilled"} & board.keys()
    second = board["rows"][1]
    assert (second["rank"], second["rank_high"], second["student"], second["params_count"]) == (2, 3, "middling", 3000)
    assert second["vs_control_low"] < 0 < second["vs_control_high"]
    assert not {"gain", "vs_kd", "method", "gap_recovered"} & second.keys()

    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert [(r["student"], r["rank"], r["rank_high"], r["method"], r["control"]) for r in rows[:2]] == [
        ("wide", "1", "1", "kd", "middle"),
        ("middling", "2", "3", "kd", "middle"),
    ]


def test_latex_has_students_ranks_and_costs(found) -> None:
    table = render(found, "latex")

    assert r"Student & top1 & Rank & vs.\ middle & Seeds & Parameters & FLOPs \\" in table
    line = next(line for line in table.splitlines() if line.startswith("wide$^{*}$ &"))
    assert r"\mathbf{80.23}" in line
    assert " & 2--3 & " in table
    assert "method kd" in table
    assert "Gain" not in table


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, finals) -> str:
    store = ResultStore(tmp_path)
    for record in [*finals(VALUES), *finals({"wide": VALUES["wide"], "narrow": VALUES["narrow"]}, method="none", label="alone")]:
        store.append(record)
    return str(tmp_path)


def students(kdbench: Kdbench, results: str, *options: str) -> list[dict[str, Any]]:
    ended = kdbench("leaderboard", "--results", results, "--by", "student", "--format", "json", *options)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["students"]


def test_filters_choose_boards_and_rows_whose_ranks_stay_those_of_the_whole(kdbench: Kdbench, results: str) -> None:
    assert [board["method"] for board in students(kdbench, results)] == ["alone", "kd"]
    assert [board["method"] for board in students(kdbench, results, "--method", "none")] == ["alone"]
    [board] = students(kdbench, results, "--method", "kd", "--student", "narrow", "--control", "wide")
    assert [(row["student"], row["rank"]) for row in board["rows"]] == [("narrow", 4)]
    assert board["rows"][0]["vs_control"] == pytest.approx(sum(VALUES["narrow"]) / 3 - sum(VALUES["wide"]) / 3)
    assert students(kdbench, results, "--task", "classification", "--experiment", "quick")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--by", "teacher"], "--by teacher: expected method or student"),
        (["--control", "wid"], "--control wid: no board has this method"),
        (["--by", "student", "--control", "wid"], "--control wid: no board has this student; did you mean 'wide'?"),
        (["--by", "student", "--student", "narow"], "--student narow: no board has this student; did you mean 'narrow'?"),
        (["--by", "student", "--method", "dkd"], "--method dkd: no two students have it"),
        (["--by", "student", "--data", "mnist"], "--data mnist: no result has this data"),
        (["--by", "student", "--html", "x.html"], "with --by student: the report has a section for students without --by"),
        (["--by", "student", "--serve"], "--serve is not supported with --by student"),
        (["--by", "student", "--site", "x"], "--site is not supported with --by student"),
        (["--by", "student", "--picture", "x.png"], "--picture is not supported with --by student: leave one of them out"),
        (["--by", "student", "--explain", "kd"], "--explain is not supported with --by student"),
        (["--by", "student", "--published"], "--published is not supported with --by student"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_together_is_refused_in_one_line(kdbench: Kdbench, results: str, options: list[str], error: str) -> None:
    ended = kdbench("leaderboard", "--results", results, *options)

    assert ended.code == 2
    assert error in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_folder_without_two_students_of_a_method_says_so(kdbench: Kdbench, tmp_path, finals) -> None:
    for record in finals({"wide": VALUES["wide"]}):
        ResultStore(tmp_path).append(record)
    ended = kdbench("leaderboard", "--results", str(tmp_path), "--by", "student")

    assert ended.code == 0
    assert "has final runs of two students under one protocol" in ended.err


def test_help_has_an_example(kdbench: Kdbench) -> None:
    assert "kdbench leaderboard --by student --control" in " ".join(kdbench("leaderboard", "--help").out.split())


def test_the_report_and_the_sites_index_show_students_side_by_side(kdbench: Kdbench, results: str, tmp_path) -> None:
    page, site = tmp_path / "report.html", tmp_path / "site"
    assert kdbench("leaderboard", "--results", results, "--html", str(page), "--site", str(site)).code == 0

    for text in (page.read_text(), (site / "index.html").read_text()):
        assert "Students side by side" in text
        section = text[text.index(">kd: fashion_mnist, cifar_resnet56 (94.00)<") :]
        assert section.index(">wide<") < section.index(">middling<") < section.index(">narrow<")
        assert 'data-value="2">2-3</td>' in section
        assert "may be the best: wide" in section
    alone = tmp_path / "alone.html"
    kdbench("leaderboard", "--results", results, "--student", "wide", "--html", str(alone))
    assert "Students side by side" not in alone.read_text()
    none = tmp_path / "none.html"
    kdbench("leaderboard", "--results", results, "--method", "alone", "--html", str(none))
    assert "alone: fashion_mnist" in none.read_text()
    assert "kd: fashion_mnist" not in none.read_text()


def test_a_student_has_the_latency_that_its_board_of_methods_shows(finals) -> None:
    """One number of one network: the median over all methods, as they deploy the same."""
    records = []
    for method, latency in (("none", 0.4), ("kd", 57.0), ("nkd", 0.3)):
        for student, factor in (("small", 1), ("large", 2)):
            of = finals({student: [90.0, 90.2]}, label=method, method=method, latency_ms_p50=factor * latency, flops=1000 * factor)
            records += [record.model_copy(update={"params_count": 100 * factor}) for record in of]
    shown = {board.student: {row.latency_ms_p50 for row in board.rows} for board in boards(records)}
    assert shown == {"small": {0.4}, "large": {0.8}}
    for board in boards(records, rows_by="student"):
        assert {row.label: row.latency_ms_p50 for row in board.rows} == {"small": 0.4, "large": 0.8}
