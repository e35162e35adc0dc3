"""Boards print in full where there is room, in part where there is not, and never as nan."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from rich.console import Console

from kdbench.boards.leaderboard import boards
from kdbench.boards.published import load_published
from kdbench.boards.summary import of_methods, summaries
from kdbench.errors import RunFailed, UserError
from kdbench.report.picture import draw
from kdbench.report.rendering import FORMATS, nothing_to_rank, render

CONTRACT = {
    "rank",
    "method",
    "mean",
    "low",
    "high",
    "gain",
    "gain_low",
    "gain_high",
    "gap_recovered",
    "vs_kd",
    "vs_kd_low",
    "vs_kd_high",
    "seeds",
    "failed",
    "params",
    "run_ids",
}


@pytest.fixture
def found(make_record):
    values = {"none": [90.0, 90.123456789], "kd": [91.0, 91.1], "nkd": [91.9, 92.2]}
    cost = {"params_count": 78042, "flops": 25_300_000, "latency_ms_p50": 1.234, "device_hours": 0.5, "trials": 8}
    params = {"temperature": 2.0, "odd": math.inf}
    records = [
        make_record(
            method=method, seed=seed, test_metric=value, params=params, space=dict.fromkeys(params), protocol_hash="0123abc", **cost
        )
        for method, metrics in values.items()
        for seed, value in enumerate(metrics)
    ]
    return boards(records, load_published())


def text(found, width: int, **options) -> str:
    return render(found, "table", console=Console(width=width, color_system=None), **options)


def test_json_keeps_its_contract_and_full_precision(found) -> None:
    data = json.loads(render(found, "json"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))

    board = data["boards"][0]
    assert {"protocol_hash", "task", "data", "teacher", "student", "rows"} <= board.keys()
    assert board["teacher"]["name"] == "cifar_resnet56"
    assert board["teacher"]["metric"] == 94.0
    assert all(row.keys() >= CONTRACT for row in board["rows"])
    assert [row["method"] for row in board["rows"]] == ["nkd", "kd", "none"]
    assert board["rows"][2]["mean"] == (90.0 + 90.123456789) / 2
    assert board["rows"][0]["params"] == {"temperature": 2.0, "odd": None}
    assert board["rows"][1]["vs_kd"] is None
    assert all(isinstance(run, str) for row in board["rows"] for run in row["run_ids"])


def test_no_board_is_an_empty_list_in_json() -> None:
    assert json.loads(render([], "json")) == {"schema_version": 2, "boards": [], "across_pairs": [], "students": []}


def below_of(lines: list[str]) -> str:
    return "\n".join(lines)


def test_csv_reads_back_row_by_row(found) -> None:
    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))

    assert [row["method"] for row in rows] == ["nkd", "kd", "none"]
    assert float(rows[2]["mean"]) == (90.0 + 90.123456789) / 2
    assert (rows[0]["teacher"], rows[0]["teacher_metric"], rows[1]["vs_kd"]) == ("cifar_resnet56", "94.0", "")
    assert json.loads(rows[0]["params"])["temperature"] == 2.0


def test_markdown_is_a_table_with_rounded_numbers_and_the_protocol_below(found) -> None:
    lines = render(found, "markdown").splitlines()

    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 3
    kd = next(line for line in table if "| kd |" in line)
    assert "| 91.05 [90.41, 91.69] |" in kd
    assert "| +0.99 [" in kd
    assert "| 2 | kd |" in below_of(lines)
    below = "\n".join(lines)
    assert "protocol 0123abc | teacher cifar_resnet56 94.00 | student cifar_resnet8 | fashion_mnist | top1, higher is better" in below
    assert "- finding: better than kd, each as tuned here: nkd" in below


def test_a_share_of_the_gap_that_rounds_to_zero_has_no_sign(make_record) -> None:
    values = {"none": [90.0, 90.0], "kd": [89.99, 89.99]}
    records = [make_record(method=m, seed=s, test_metric=v) for m, by in values.items() for s, v in enumerate(by)]

    assert "| 0% |" in next(line for line in render(boards(records), "markdown").splitlines() if "| kd |" in line)


def test_a_wide_terminal_shows_everything(found) -> None:
    shown = text(found, 200)

    assert all(
        word in shown
        for word in (
            "gap",
            "78k",
            "25.3M",
            "1.23",
            "temperature=2",
            "gain [all at once]",
            "vs kd [all at once]",
            "protocol 0123abc",
            "94.00",
            "8 trials a method",
        )
    )


@pytest.mark.parametrize("width", [120, 100, 80, 60])
def test_a_narrower_terminal_drops_the_least_important_columns_and_nothing_wraps(found, width) -> None:
    table = [line for line in text(found, width).splitlines() if "[9" in line]

    assert len(table) == 3  # one line a method
    assert all(len(line) <= width for line in table)
    header = text(found, width).splitlines()
    assert any("rank" in line and "top1" in line for line in header)
    assert ("tuned" in "".join(header[:4])) is (width >= 200)


def test_colours_say_surely_better_and_surely_worse(make_record) -> None:
    values = {"none": [90.0, 90.1, 90.2], "kd": [91.0, 91.12, 91.2], "at": [90.02, 90.1, 90.21]}
    records = [make_record(method=m, seed=s, test_metric=v) for m, by in values.items() for s, v in enumerate(by)]
    [board] = boards(records)
    shown = render([board], "table", console=Console(width=200, force_terminal=True, color_system="standard"))

    cells = {row.label: [f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]" for middle, low, high in (row.shown_gain, row.shown_difference) if low]
             for row in board.rows}  # fmt: skip
    assert f"\x1b[32m{cells['kd'][0]}" in shown
    assert f"31m{cells['none'][0]}" in shown
    assert f"m{cells['at'][0]}" not in shown  # its interval holds 0
    assert f" {cells['at'][0]}" in shown


def test_published_figures_are_a_section_of_their_own_when_asked(found) -> None:
    for plain, asked in [
        (text(found, 120), text(found, 120, with_published=True)),
        (render(found, "markdown"), render(found, "markdown", with_published=True)),
    ]:
        assert "published" not in plain.lower()
        assert "other protocols, not ranked" in asked
        assert "nkd: resnet34 -> resnet18, ImageNet-1k top1 69.90 -> 71.96 (+2.06)" in asked
        assert "tf_nkd" not in asked


def test_a_row_that_is_incomplete_or_failed_shows_it(make_record) -> None:
    records = [
        *(make_record(method="none", seed=seed) for seed in range(3)),
        make_record(method="kd", seed=0, status="failed", test_metric=None),
        make_record(method="kd", seed=1),
        make_record(method="nkd", seed=0, status="failed", test_metric=None),
        *(make_record(method="at", seed=seed) for seed in range(3)),
    ]
    lines = {line.split(" | ")[1]: line for line in render(boards(records), "markdown").splitlines() if line.startswith("| - |")}

    assert set(lines) == {"kd", "nkd"}
    assert "| 90.00 | +0.00 |" in lines["kd"]  # seeds that agree exactly have no interval
    assert "2 of 3 (1 failed)" in lines["kd"]
    assert lines["nkd"].startswith("| - | nkd | - | - | - |")
    assert "0 of 3 (1 failed)" in lines["nkd"]


def test_a_metric_below_two_has_four_decimals(make_record) -> None:
    records = [make_record(test_metric=0.01234, teacher_metric=0.01, primary="rmse", higher_is_better=False)]

    assert "| 0.0123 |" in render(boards(records), "markdown")


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'jsn'; did you mean 'json'"):
        render([], "jsn")
    assert FORMATS == ("table", "markdown", "latex", "csv", "json")


def test_an_empty_folder_says_how_to_start_and_an_unfinished_one_how_to_go_on(make_record) -> None:
    assert "kdbench run experiments/quickstart.yaml" in nothing_to_rank("results", [])
    unfinished = nothing_to_rank("results", [make_record(role="teacher"), make_record(role="candidate")])
    assert "1 candidate, 1 teacher" in unfinished
    assert "continues" in unfinished


def test_the_picture_is_drawn_for_boards_with_a_gain_and_refuses_other_names(found, tmp_path) -> None:
    draw(found, tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")
    draw(found, tmp_path / "board.svg")
    assert "<svg" in (tmp_path / "board.svg").read_text()
    with pytest.raises(UserError, match=r"must end in one of \.png"):
        draw(found, tmp_path / "board.jpg")
    with pytest.raises(UserError, match="nothing to draw"):
        draw([], tmp_path / "none.png")
    with pytest.raises(RunFailed, match="could not be written"):
        draw(found, tmp_path / "board.png" / "folder.png")


def test_the_picture_names_the_undistilled_students_own_mean(make_record, tmp_path) -> None:
    """A row that shares no seed with it has no gain either, and its mean stood there."""
    values = {"none": {0: 90.0, 1: 90.2}, "kd": {0: 91.0, 1: 91.3}, "nkd": {5: 95.0, 6: 95.5}}
    found = boards(make_record(method=m, seed=seed, test_metric=value) for m, by in values.items() for seed, value in by.items())
    draw(found, tmp_path / "board.svg")

    assert "undistilled 90.10" in (tmp_path / "board.svg").read_text()


# --- several pairs together ------------------------------------------------------------------------------------------


@pytest.fixture
def family(make_record):
    """Two pairs with the same recipe."""
    values = {"none": [90.0, 90.2, 90.1], "kd": [91.0, 91.3, 91.1], "nkd": [92.0, 92.3, 92.0]}
    return boards(
        make_record(method=method, seed=seed, test_metric=value, student=student, protocol_hash=f"p-{student}")
        for student in ("small", "large")
        for method, metrics in values.items()
        for seed, value in enumerate(metrics)
    )


def test_a_summary_stands_below_the_boards_in_tables_markdown_and_json(family) -> None:
    across = summaries(family)
    shown, markdown = text(family, 200, across=across), render(family, "markdown", across=across)
    title = "classification across 2 pairs: cifar_resnet56 -> large on fashion_mnist, cifar_resnet56 -> small on fashion_mnist"
    assert title in shown
    assert f"### {title}" in markdown
    [nkd] = [line for line in markdown.splitlines() if line.startswith("| nkd |")]
    assert nkd.count("%") == 8  # the interquartile mean with its interval, and five shares
    assert "2 pairs; the interval is for new seeds on these pairs, not for new pairs" in shown
    [summary] = json.loads(render(family, "json", across=across))["across_pairs"]
    assert [row["method"] for row in summary["rows"]] == ["nkd", "kd", "none"]
    assert summary["rows"][0]["gap_recovered"] == across[0].rows[0].gap_recovered
    assert summary["rows"][0]["profile"] == {"0.0": 1.0, "0.25": 1.0, "0.5": 2 / 3, "0.75": 0.0, "1.0": 0.0}
    assert summary["rows"][0]["probability_of_improvement"] == 1.0
    assert [pair["student"] for pair in summary["pairs"]] == ["large", "small"]


def test_a_summary_fits_a_narrow_terminal(family) -> None:
    lines = text([], 70, across=summaries(family)).splitlines()
    table = [line for line in lines if "%" in line]

    assert len(table) == 3  # the titles, nkd and kd
    assert all(len(line) <= 70 for line in table)


def test_one_methods_rows_keep_the_figures_of_the_whole(family) -> None:
    [summary], [board, _] = of_methods(summaries(family), ["nkd"]), of_methods(family, ["nkd"])

    assert [row.label for row in summary.rows] == [row.label for row in board.rows] == ["nkd"]
    assert summary.rows[0].gap_recovered == summaries(family)[0].rows[0].gap_recovered
    assert of_methods(family, ["nothing"]) == []


# --- LaTeX -----------------------------------------------------------------------------------------------------------


def test_latex_is_a_booktabs_table_with_intervals(found) -> None:
    table = render(found, "latex")

    assert r"\usepackage{booktabs}" in table.splitlines()[0]
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert rows[0] == r"Method & top1 & Rank & Gain & vs.\ kd & Gap & Seeds \\"
    assert len({row.count("&") for row in rows}) == 1
    middle, low, high = found[0].rows[1].shown_gain
    interval = rf"${middle:+.2f}\;{{\scriptstyle[{low:+.2f},\,{high:+.2f}]}}$"
    assert rows[2].startswith(rf"kd & $91.05\;{{\scriptstyle[90.41,\,91.69]}}$ & 2 & {interval} & -- & ")
    assert rows[2].endswith(" & 2 " + 2 * chr(92))
    assert r"\mathbf{92.05}" in rows[1]
    assert [table.count(f"\\{word}") for word in ("toprule", "midrule", "bottomrule", "begin{table}", "end{table}")] == [1] * 5
    assert table.count("{") == table.count("}")


def test_latex_escapes_names_and_marks_what_beats_kd(make_record) -> None:
    values = {"none": [90.0, 90.1, 90.2], "kd": [91.0, 91.1, 91.2], r"my_{50%} & $\#^~": [92.0, 92.1, 92.21]}
    records = [
        make_record(method="none" if label == "none" else "kd" if label == "kd" else "nkd", label=label, seed=seed, test_metric=value)
        for label, metrics in values.items()
        for seed, value in enumerate(metrics)
    ]
    table = render(boards(records), "latex")

    assert r"my\_\{50\%\} \& \$\textbackslash{}\#\textasciicircum{}\textasciitilde{}$^{*}$ & " in table
    assert r"$^{*}$: better than kd: the interval leaves out 0." in table
    assert r"kd & $91.10" in table


def test_latex_of_a_failed_seed_and_of_unknown_figures(make_record) -> None:
    table = render(boards([make_record(status="failed", test_metric=None)]), "latex")

    assert "kd & --" in table
    assert "0 (1 failed)" in table
