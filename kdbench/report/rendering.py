"""Boards as text: a table for the terminal, Markdown, CSV, JSON and LaTeX, and what several pairs say together."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kdbench.boards.board import COSTS, Board, Estimate, Row, RowsBy, verdict
from kdbench.boards.formatting import COLOURS, UNKNOWN, finite, interval, ranks, scaled, short, together_data
from kdbench.boards.published import PublishedFigure
from kdbench.boards.summary import THRESHOLDS, Summary, SummaryRow
from kdbench.catalogue import nearest
from kdbench.errors import UserError
from kdbench.records.plan import CONTROL, UNDISTILLED
from kdbench.records.record import RunRecord
from kdbench.report.latex import latex
from kdbench.report.pairwise import TITLE, pairwise

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JSON_VERSION = 2  # goes up where a key changes its meaning
FORMATS = ("table", "markdown", "latex", "csv", "json")
_COST_TITLES = {"latency_ms_p50": "ms", "params_count": "params", "device_hours": "device-h"}
_WORDS = ("method", "student", "tuned", "Pareto")  # columns of text, on the left
_WELCOME = ("finding: better", "finding: may be the best")
_ENDS = ("", "_low", "_high", "_p")
_FRONTS = ("pareto", "pareto_sure", "pareto_off")


@dataclass(frozen=True)
class Column:
    """One column of a printed board or summary; where space is short, the highest `expendable` goes first."""

    title: str
    cell: Callable[[Any], str]
    expendable: int = 0
    style: Callable[[Any], str] = lambda _: ""


def render(
    boards: Sequence[Board],
    format: str = "table",
    *,
    across: Sequence[Summary] = (),
    with_published: bool = False,
    with_pairs: bool = False,
    console: Console | None = None,
) -> str:
    """The boards as text in one of FORMATS. A table fits `console` (default: this terminal) and has its colours.

    `across`: summaries over several boards, which stand below these, in tables, Markdown and JSON. `with_published` adds the papers'
    own figures in a section of their own, in tables and Markdown, and `with_pairs` each row against each other. JSON and CSV keep full
    precision. Raises UserError for an unknown format.
    """
    if format == "table":
        return _terminal(boards, across, with_published, with_pairs, console)
    if format == "markdown":
        return "\n\n".join([*(_markdown(board, with_published, with_pairs) for board in boards), *map(_summary_markdown, across)]) + "\n"
    if format == "latex":
        return latex(boards)
    if format == "csv":
        return _csv(boards)
    if format == "json":
        return json.dumps(content_data(boards, across), indent=2, allow_nan=False) + "\n"
    check_format(format)
    raise AssertionError(f"{format} is in FORMATS and not rendered")


def check_format(format: str) -> None:
    """Raise UserError for a format that is none of FORMATS."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}{nearest(format, FORMATS)}")


def nothing_to_rank(location: str, records: Sequence[RunRecord], rows_by: RowsBy = "method") -> str:
    """What to tell a person whose results folder gives no board."""
    if not records:
        return f"no results in {location}: start with `kdbench run experiments/quickstart.yaml`, or name another folder with --results DIR"
    counts = Counter(record.role for record in records)
    if rows_by == "student" and counts["final"]:
        return (
            f"no method in {location} has final runs of two students under one protocol: list several under `students:` in one experiment"
        )
    held = ", ".join(f"{count} {role}" for role, count in sorted(counts.items()))
    return f"no final run to rank in {location} (it holds {held}): `kdbench run EXPERIMENT.yaml` continues where it stopped"


def content_data(boards: Sequence[Board], across: Sequence[Summary]) -> dict[str, Any]:
    """All that JSON holds. Boards of students are never among boards of methods: their rows have other keys."""
    return {
        "schema_version": JSON_VERSION,
        "boards": [board_data(board) for board in boards if board.rows_by == "method"],
        "across_pairs": [summary_data(summary) for summary in across],
        "students": [board_data(board) for board in boards if board.rows_by == "student"],
    }


def board_data(board: Board) -> dict[str, Any]:
    """One board as plain data for JSON: null where a number is unknown, never nan. Of students, `method` stands for the student."""
    of_methods = board.rows_by == "method"
    return {
        "protocol_hash": board.protocol_hash,
        "family": board.family,
        "task": board.task,
        "data": board.data,
        "teacher": {"name": board.teacher, "metric": finite(board.teacher_metric), "sha": board.teacher_sha},
        **({"student": board.student} if of_methods else {"method": board.method, "method_name": board.rows[0].method}),
        "primary": board.primary,
        "higher_is_better": board.higher_is_better,
        **({"undistilled": board.undistilled} if of_methods else {}),
        "control": board.control,
        "detectable": finite(board.detectable),
        "plan": None if board.plan is None else board.plan.model_dump(mode="json", exclude_defaults=True),
        **_searches_data(board),
        "beside": [
            {
                "kind": row.kind,
                "method": row.label,
                "mean": finite(row.mean),
                "seeds": row.seeds,
                **{name: finite(value) for name, value in zip(("ahead", "ahead_low", "ahead_high"), row.ahead, strict=True)},
                "params": finite(dict(row.params)),
            }
            for row in board.beside
        ],
        **_errors_data(board),
        "rows": [row_data(row) if of_methods else student_row_data(row) for row in board.rows],
        "findings": list(board.findings),
        "notes": list(board.notes),
    }


def row_data(row: Row) -> dict[str, Any]:
    """One row as plain data; `method` is its label on the board, `method_name` its name in the catalogue."""
    return {
        "rank": row.rank,
        "rank_high": row.rank_high,
        "method": row.label,
        "method_name": row.method,
        **{name: finite(getattr(row, name)) for name in ("mean", "low", "high", "gain", "gain_low", "gain_high")},
        **together_data("gain", row.over_undistilled),
        **{name: finite(getattr(row, name)) for name in ("gap_recovered", "gap_low", "gap_high")},
        **{f"vs_kd{end}": finite(getattr(row, f"vs_control{end}")) for end in _ENDS},
        **together_data("vs_kd", row.over_control),
        "vs_kd_samples": finite(row.moved_by_samples),
        **_runs_and_costs(row),
    }


def student_row_data(row: Row) -> dict[str, Any]:
    """One row of a board of students as plain data."""
    return {
        "rank": row.rank,
        "rank_high": row.rank_high,
        "student": row.label,
        **{name: finite(getattr(row, name)) for name in ("mean", "low", "high")},
        **{name.replace("_all", ""): value for name, value in together_data("vs_control", row.over_control).items()},
        "vs_control_samples": finite(row.moved_by_samples),
        **_runs_and_costs(row),
    }


def _searches_data(board: Board) -> dict[str, Any]:
    """How much a value varies, as standard deviations; null for one search a method, and between seeds where a search has one final."""
    variances = board.searches or ()
    names = ("sd_between_searches", "sd_between_seeds") if len(variances) != 1 else ("sd_of_searches_and_seeds",)
    found = dict(zip(names, map(math.sqrt, variances), strict=False))
    return {name: finite(found.get(name)) for name in ("sd_between_searches", "sd_between_seeds", "sd_of_searches_and_seeds")}


def _errors_data(board: Board) -> dict[str, Any]:
    """What the intervals that hold all at once rest on; null where nothing is told apart."""
    errors = board.errors
    columns = (("gain", board.undistilled), ("vs_kd" if board.rows_by == "method" else "vs_control", board.control))
    return {
        "pool": None if errors is None else finite(errors.pool),
        "df": None if errors is None else errors.df,
        "uneven": None if errors is None else errors.uneven,
        "wide": None if errors is None else list(errors.wide),
        "families": {} if errors is None else {name: errors.comparisons for name, there in columns if there is not None},
    }


def _runs_and_costs(row: Row) -> dict[str, Any]:
    return {
        "values": {str(seed): finite(value) for seed, value in row.values.items()},
        "seeds": row.seeds,
        "looked": row.looked or None,
        "undecided": row.undecided,
        "failed": row.failed,
        "params": finite(dict(row.params)),
        "trials": row.trials,
        "params_count": row.params_count,
        "flops": row.flops,
        "latency_ms_p50": finite(row.latency_ms_p50),
        "device_hours": finite(row.device_hours),
        **{name: list(getattr(row, name)) for name in _FRONTS},
        "better_than": sorted(row.better_than),
        "run_ids": list(row.run_ids),
    }


def summary_data(summary: Summary) -> dict[str, Any]:
    """What several pairs say together, as plain data; `profile` maps thresholds to shares."""
    return {
        "family": summary.family,
        "task": summary.task,
        "primary": summary.primary,
        "pairs": [asdict(pair) for pair in summary.pairs],
        "rows": [
            {
                "method": row.label,
                "method_name": row.method,
                "gap_recovered": finite(row.gap_recovered),
                "gap_low": finite(row.gap_low),
                "gap_high": finite(row.gap_high),
                "probability_of_improvement": finite(row.probability_of_improvement),
                "profile": None if row.profile is None else {str(t): share for t, share in zip(THRESHOLDS, row.profile, strict=True)},
                "average_rank": finite(row.average_rank),
            }
            for row in summary.rows
        ],
        "p_value": finite(summary.p_value),
        "critical_difference": finite(summary.critical_difference),
        "notes": list(summary.notes),
    }


def _columns(board: Board) -> list[Column]:
    decimals = board.decimals
    shown = [
        Column("rank", lambda r: ranks(r.rank, r.rank_high), style=lambda r: "bold" if r.rank == 1 else ""),
        Column(board.rows_by, lambda r: r.label, style=lambda r: "bold" if r.rank == 1 else "dim" if r.rank is None else ""),
        Column(f"{board.primary} [95%]", lambda r: interval(r.mean, r.low, r.high, f".{decimals}f")),
        Column(
            "gain [all at once]",
            lambda r: _signed(r.shown_gain, decimals),
            2,
            lambda r: COLOURS[verdict(r.over_undistilled)],
        ),
        Column(
            f"vs {board.control or CONTROL} [all at once]",
            lambda r: _signed(r.shown_difference, decimals),
            3,
            lambda r: COLOURS[r.verdict],
        ),
        Column("gap", lambda r: UNKNOWN if r.gap_recovered is None else f"{r.gap_recovered:z.0%}", 5),
        Column("seeds", lambda r: _seeds(r, board.meant(r)), 4, lambda r: "yellow" if r.failed or r.seeds < board.meant(r) else ""),
        Column("device-h", lambda r: short(r.device_hours), 6),
        Column("ms", lambda r: short(r.latency_ms_p50), 7),
        Column("params", lambda r: scaled(r.params_count), 8),
        Column("FLOPs", lambda r: scaled(r.flops), 9),
        Column("tuned", _tuned, 10),
        Column("Pareto", pareto_text, 11),
    ]
    always = 4 if board.rows_by == "method" else 1
    return [column for column in shown if column.expendable < always or any(column.cell(row) != UNKNOWN for row in board.rows)]


def _signed(shown: Estimate, decimals: int) -> str:
    return interval(*shown, f"+.{decimals}f")


def pareto_text(row: Row) -> str:
    """The costs for which the row is surely (●) or maybe (○) on the front, as the columns are called."""
    if row.rank is None:
        return UNKNOWN
    known = [cost for cost in COSTS if getattr(row, cost) is not None and cost not in row.pareto_off]
    return ", ".join(f"{'●' if cost in row.pareto_sure else '○'} {_COST_TITLES[cost]}" for cost in known) or UNKNOWN


def _summary_columns(summary: Summary) -> list[Column]:
    shown = [
        Column("method", lambda r: r.label),
        Column("gap, IQM [95%]", lambda r: interval(r.gap_recovered, r.gap_low, r.gap_high, "z.0%"), style=_gap_verdict),
        Column("P(better than kd)", lambda r: short(r.probability_of_improvement), 1),
        Column("average rank", lambda r: UNKNOWN if r.average_rank is None else f"{r.average_rank:.2f}", 2),
        *(Column(f"gap > {threshold:.0%}", partial(_share_above, place), 3) for place, threshold in enumerate(THRESHOLDS)),
    ]
    return [column for column in shown if column.expendable == 0 or any(column.cell(row) != UNKNOWN for row in summary.rows)]


def _share_above(place: int, row: SummaryRow) -> str:
    return UNKNOWN if row.profile is None else f"{row.profile[place]:.0%}"


def _gap_verdict(row: SummaryRow) -> str:
    """Green: surely better. Red: surely worse. No colour: can't be told."""
    if row.gap_low is None or row.gap_high is None:
        return ""
    return "green" if row.gap_low > 0 else "red" if row.gap_high < 0 else ""


def _seeds(row: Row, wanted: int) -> str:
    counted = str(row.seeds) if row.seeds >= wanted else f"{row.seeds} of {wanted}"
    return f"{counted} ({row.failed} failed)" if row.failed else counted


def _tuned(row: Row) -> str:
    return ", ".join(f"{name}={short(value)}" for name, value in row.params.items() if name in row.searched) or UNKNOWN


def _summary_title(summary: Summary) -> str:
    pairs = ", ".join(f"{pair.teacher or 'no teacher'} -> {pair.student} on {pair.data}" for pair in summary.pairs)
    return f"{summary.task} across {len(summary.pairs)} pairs: {pairs}"


def _below(board: Board) -> list[str]:
    """What stands under a board: the protocol and the teacher, then what was found."""
    decimals = board.decimals
    teacher = (
        "no teacher"
        if board.teacher is None
        else f"teacher {board.teacher} {UNKNOWN if board.teacher_metric is None else f'{board.teacher_metric:.{decimals}f}'}"
    )
    direction = "higher" if board.higher_is_better else "lower"
    shared = f"student {board.student}" if board.rows_by == "method" else f"method {board.method}"
    protocol = f"protocol {board.protocol_hash} | {teacher} | {shared} | {board.data} | {board.primary}, {direction} is better"
    return [protocol, *board.notes, *(f"finding: {finding}" for finding in board.findings)]


def _warns(line: str) -> bool:
    """Whether a line below the board says that something is not as one would wish it."""
    return "DIFFER" in line or (line.startswith("finding: ") and not line.startswith(_WELCOME))


def _published_lines(board: Board) -> list[str]:
    return [_published_line(figure) for figure in board.published]


def _published_line(figure: PublishedFigure) -> str:
    change = "" if figure.points is None else f" ({figure.points:+.2f})"
    before, after = (UNKNOWN if value is None else f"{value:.2f}" for value in (figure.before, figure.distilled))
    protocol = f" ({figure.protocol})" if figure.protocol else ""
    pair = f"{figure.teacher or 'no teacher'} -> {figure.student}"
    return f"{figure.method}: {pair}, {figure.data} {figure.metric} {before} -> {after}{change}, {figure.citation}{protocol}"


def _terminal(boards: Sequence[Board], across: Sequence[Summary], with_published: bool, with_pairs: bool, console: Console | None) -> str:
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    with console.capture() as captured:
        for board in boards:
            console.print(f"[bold]{escape(board.title)}[/bold]", highlight=False)
            console.print(_fitting_table(_columns(board), board.rows, console, dim=_undistilled(board)))
            for line in _below(board):
                console.print(escape(line), style="yellow" if _warns(line) else "dim", highlight=False)
            if with_pairs:
                console.print(TITLE, style="bold", highlight=False)
                console.print(_pairs_table(board))
            if with_published and board.published:
                console.print("published (other protocols, not ranked)", style="bold", highlight=False)
                for line in _published_lines(board):
                    console.print(f"  {escape(line)}", style="dim", highlight=False)
            console.print()
        for summary in across:
            console.print(f"[bold]{escape(_summary_title(summary))}[/bold]", highlight=False)
            console.print(_fitting_table(_summary_columns(summary), summary.rows, console))
            for line in summary.notes:
                console.print(escape(line), style="dim", highlight=False)
            console.print()
    return captured.get()


def _pairs_table(board: Board) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    titles, lines = pairwise(board)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(cell, style="green" if cell.endswith("▲") else "red" if cell.endswith("▼") else "") for cell in line))
    return table


def _undistilled(board: Board) -> str | None:
    """The method whose rows stand back among others."""
    return UNDISTILLED if board.rows_by == "method" else None


def _fitting_table(columns: Sequence[Column], rows: Sequence[Row | SummaryRow], console: Console, dim: str | None = UNDISTILLED) -> Table:
    """The table with as many columns as the terminal has room for. dim: the method whose rows stand back."""
    while (table := _table(columns, rows, dim)).__rich_measure__(console, console.options.update(max_width=10_000)).maximum > console.width:
        expendable = max(column.expendable for column in columns)
        if expendable == 0:
            break
        columns = [column for column in columns if column.expendable < expendable]
    return table


def _table(columns: Sequence[Column], rows: Sequence[Row | SummaryRow], dim: str | None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.title), justify="left" if column.title in _WORDS else "right", overflow="fold")
    for row in rows:
        cells = (Text(column.cell(row), style=column.style(row)) for column in columns)
        table.add_row(*cells, style="dim" if row.method == dim else "")
    return table


def _markdown(board: Board, with_published: bool, with_pairs: bool) -> str:
    lines = [f"### {board.title}", "", *_markdown_table(_columns(board), board.rows), ""]
    lines += [f"- {line}" for line in _below(board)]
    if with_pairs:
        titles, rows = pairwise(board)
        lines += ["", f"{TITLE}:", "", *_markdown_lines([titles, ["---"] * len(titles), *rows])]
    if with_published and board.published:
        lines += ["", "Published (other protocols, not ranked):", "", *(f"- {line}" for line in _published_lines(board))]
    return "\n".join(lines)


def _summary_markdown(summary: Summary) -> str:
    table = _markdown_table(_summary_columns(summary), summary.rows)
    return "\n".join([f"### {_summary_title(summary)}", "", *table, "", *(f"- {line}" for line in summary.notes)])


def _markdown_table(columns: Sequence[Column], rows: Sequence[Row | SummaryRow]) -> list[str]:
    cells = [[column.title for column in columns], ["---"] * len(columns), *([column.cell(row) for column in columns] for row in rows)]
    return _markdown_lines(cells)


def _markdown_lines(cells: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]


def _csv(boards: Sequence[Board]) -> str:
    """One line a row, the board's own facts repeated on each; dictionaries as JSON, run ids separated by spaces."""
    out = io.StringIO()
    writer = None
    for board in boards:
        facts = board_data(board)
        shared = ("student",) if board.rows_by == "method" else ("method", "method_name", "control")
        own = {name: facts[name] for name in ("protocol_hash", "task", "data", *shared, "primary", "higher_is_better", "family")}
        own |= {f"teacher_{name}" if name != "name" else "teacher": value for name, value in facts["teacher"].items()}
        for row in facts["rows"]:
            as_text = {name: json.dumps(row[name]) for name in ("params", "values")}
            line = {**own, **row, **as_text, **{name: " ".join(row[name]) for name in (*_FRONTS, "better_than", "run_ids")}}
            if writer is None:
                writer = csv.DictWriter(out, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    return out.getvalue()
