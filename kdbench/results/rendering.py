"""Boards as text: a table for the terminal, Markdown, CSV and JSON. Numbers are rounded here and nowhere else."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdbench.catalogue import nearest
from kdbench.errors import UserError
from kdbench.results.leaderboard import UNDISTILLED, Board, Row
from kdbench.results.published import PublishedFigure
from kdbench.results.record import RunRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMATS = ("table", "markdown", "csv", "json")
UNKNOWN = "-"
NUMBERS = ("gain", "gain_low", "gain_high", "gap_recovered", "vs_kd", "vs_kd_low", "vs_kd_high")


@dataclass(frozen=True)
class Column:
    """One column of a printed board; where space is short, the highest `expendable` goes first."""

    title: str
    cell: Callable[[Row], str]
    expendable: int = 0
    style: Callable[[Row], str] = lambda _: ""


def render(boards: Sequence[Board], format: str = "table", *, with_published: bool = False, console: Console | None = None) -> str:
    """The boards as text in one of FORMATS. A table fits `console` (default: this terminal) and has its colours.

    `with_published` adds the papers' own figures in a section of their own, in tables and Markdown. JSON and CSV keep full precision.
    Raises UserError for an unknown format.
    """
    if format == "table":
        return _terminal(boards, with_published, console)
    if format == "markdown":
        return "\n\n".join(_markdown(board, with_published) for board in boards) + "\n"
    if format == "csv":
        return _csv(boards)
    if format == "json":
        return json.dumps({"boards": [board_data(board) for board in boards]}, indent=2, allow_nan=False) + "\n"
    check_format(format)
    raise AssertionError(f"{format} is in FORMATS and not rendered")


def check_format(format: str) -> None:
    """Raise UserError for a format that is none of FORMATS."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}{nearest(format, FORMATS)}")


def nothing_to_rank(location: str, records: Sequence[RunRecord]) -> str:
    """What to tell a person whose results folder gives no board."""
    if not records:
        return f"no results in {location}: start with `kdbench run experiments/quickstart.yaml`, or name another folder with --results DIR"
    counts = Counter(record.role for record in records)
    held = ", ".join(f"{count} {role}" for role, count in sorted(counts.items()))
    return f"no final run to rank in {location} (it holds {held}): `kdbench run EXPERIMENT.yaml` continues where it stopped"


def board_data(board: Board) -> dict[str, Any]:
    """One board as plain data for JSON: null where a number is unknown, never nan."""
    return {
        "protocol_hash": board.protocol_hash,
        "task": board.task,
        "data": board.data,
        "teacher": {"name": board.teacher, "metric": _finite(board.teacher_metric), "sha": board.teacher_sha},
        "student": board.student,
        "primary": board.primary,
        "higher_is_better": board.higher_is_better,
        "rows": [row_data(row) for row in board.rows],
        "findings": list(board.findings),
        "notes": list(board.notes),
    }


def row_data(row: Row) -> dict[str, Any]:
    """One row as plain data; `method` is its label on the board, `method_name` its name in the catalogue."""
    return {
        "rank": row.rank,
        "method": row.label,
        "method_name": row.method,
        **{name: _finite(getattr(row, name)) for name in ("mean", "low", "high", *NUMBERS)},
        "seeds": row.seeds,
        "failed": row.failed,
        "params": _finite(dict(row.params)),
        "trials": row.trials,
        "params_count": row.params_count,
        "flops": row.flops,
        "latency_ms_p50": _finite(row.latency_ms_p50),
        "device_hours": _finite(row.device_hours),
        "run_ids": list(row.run_ids),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _columns(board: Board) -> list[Column]:
    digits = _digits(board)
    seeds = max(row.seeds for row in board.rows)
    shown = [
        Column("rank", lambda r: UNKNOWN if r.rank is None else str(r.rank), style=lambda r: "bold" if r.rank == 1 else ""),
        Column("method", lambda r: r.label, style=lambda r: "bold" if r.rank == 1 else "dim" if r.rank is None else ""),
        Column(f"{board.primary} [95%]", lambda r: _interval(r.mean, r.low, r.high, f".{digits}f")),
        Column(
            "gain [95%]",
            lambda r: _interval(r.gain, r.gain_low, r.gain_high, f"+.{digits}f"),
            2,
            lambda r: _verdict(r.gain_low, r.gain_high),
        ),
        Column(
            "vs kd [95%]",
            lambda r: _interval(r.vs_kd, r.vs_kd_low, r.vs_kd_high, f"+.{digits}f"),
            3,
            lambda r: _verdict(r.vs_kd_low, r.vs_kd_high),
        ),
        Column("gap", lambda r: UNKNOWN if r.gap_recovered is None else f"{r.gap_recovered:.0%}", 5),
        Column("seeds", lambda r: _seeds(r, seeds), 4, lambda r: "yellow" if r.failed or r.seeds < seeds else ""),
        Column("device-h", lambda r: _short(r.device_hours), 6),
        Column("ms", lambda r: _short(r.latency_ms_p50), 7),
        Column("params", lambda r: _scaled(r.params_count), 8),
        Column("FLOPs", lambda r: _scaled(r.flops), 9),
        Column("tuned", _tuned, 10),
    ]
    return [column for column in shown if column.expendable < 4 or any(column.cell(row) != UNKNOWN for row in board.rows)]


def _digits(board: Board) -> int:
    """Percent and points have two decimals; a metric that lives below 2, such as an error or a loss, needs four."""
    return 2 if any(abs(row.mean) >= 2 for row in board.rows if row.mean is not None) else 4


def _interval(middle: float | None, low: float | None, high: float | None, spec: str) -> str:
    if middle is None:
        return UNKNOWN
    return f"{middle:{spec}}" if low is None or high is None else f"{middle:{spec}} [{low:{spec}}, {high:{spec}}]"


def _verdict(low: float | None, high: float | None) -> str:
    """Green: surely better. Red: surely worse. No colour: can't be told."""
    if low is None or high is None:
        return ""
    return "green" if low > 0 else "red" if high < 0 else ""


def _seeds(row: Row, wanted: int) -> str:
    counted = str(row.seeds) if row.seeds == wanted else f"{row.seeds} of {wanted}"
    return f"{counted} ({row.failed} failed)" if row.failed else counted


def _short(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tuned(row: Row) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in row.params.items() if name in row.searched) or UNKNOWN


def _scaled(count: int | None) -> str:
    """1234567 as 1.23M."""
    if count is None:
        return UNKNOWN
    power = min((len(str(abs(count))) - 1) // 3, 4)
    return f"{count / 1000**power:.3g}{['', 'k', 'M', 'G', 'T'][power]}"


def _title(board: Board) -> str:
    return f"{board.task} on {board.data}: {board.teacher or 'no teacher'} -> {board.student}"


def _below(board: Board) -> list[str]:
    """What stands under a board: the protocol and the teacher, then what was found."""
    digits = _digits(board)
    teacher = (
        "no teacher"
        if board.teacher is None
        else f"teacher {board.teacher} {UNKNOWN if board.teacher_metric is None else f'{board.teacher_metric:.{digits}f}'}"
    )
    direction = "higher" if board.higher_is_better else "lower"
    protocol = (
        f"protocol {board.protocol_hash} | {teacher} | student {board.student} | {board.data} | {board.primary}, {direction} is better"
    )
    return [protocol, *board.notes, *(f"finding: {finding}" for finding in board.findings)]


def _published_lines(board: Board) -> list[str]:
    return [_published_line(figure) for figure in board.published]


def _published_line(figure: PublishedFigure) -> str:
    change = "" if figure.points is None else f" ({figure.points:+.2f})"
    before, after = (UNKNOWN if value is None else f"{value:.2f}" for value in (figure.before, figure.distilled))
    protocol = f" ({figure.protocol})" if figure.protocol else ""
    pair = f"{figure.teacher or 'no teacher'} -> {figure.student}"
    return f"{figure.method}: {pair}, {figure.data} {figure.metric} {before} -> {after}{change}, {figure.citation}{protocol}"


def _terminal(boards: Sequence[Board], with_published: bool, console: Console | None) -> str:
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    with console.capture() as captured:
        for board in boards:
            console.print(f"[bold]{escape(_title(board))}[/bold]", highlight=False)
            console.print(_fitting_table(board, console))
            for line in _below(board):
                console.print(
                    escape(line), style="yellow" if line.startswith("finding: does not") or "DIFFER" in line else "dim", highlight=False
                )
            if with_published and board.published:
                console.print("published (other protocols, not ranked)", style="bold", highlight=False)
                for line in _published_lines(board):
                    console.print(f"  {escape(line)}", style="dim", highlight=False)
            console.print()
    return captured.get()


def _fitting_table(board: Board, console: Console) -> Table:
    """The table with as many columns as the terminal has room for."""
    columns = _columns(board)
    while (table := _table(board, columns)).__rich_measure__(console, console.options.update(max_width=10_000)).maximum > console.width:
        expendable = max(column.expendable for column in columns)
        if expendable == 0:
            break
        columns = [column for column in columns if column.expendable < expendable]
    return table


def _table(board: Board, columns: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="left" if column.title in ("method", "tuned") else "right", overflow="fold")
    for row in board.rows:
        table.add_row(
            *(Text(column.cell(row), style=column.style(row)) for column in columns), style="dim" if row.method == UNDISTILLED else ""
        )
    return table


def _markdown(board: Board, with_published: bool) -> str:
    columns = _columns(board)
    rows = [[column.title for column in columns], ["---"] * len(columns), *([column.cell(row) for column in columns] for row in board.rows)]
    lines = [f"### {_title(board)}", "", *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), ""]
    lines += [f"- {line}" for line in _below(board)]
    if with_published and board.published:
        lines += ["", "Published (other protocols, not ranked):", "", *(f"- {line}" for line in _published_lines(board))]
    return "\n".join(lines)


def _csv(boards: Sequence[Board]) -> str:
    """One line a row, the board's own facts repeated on each; dictionaries as JSON, run ids separated by spaces."""
    out = io.StringIO()
    writer = None
    for board in boards:
        facts = board_data(board)
        own = {name: facts[name] for name in ("protocol_hash", "task", "data", "student", "primary", "higher_is_better")}
        own |= {f"teacher_{name}" if name != "name" else "teacher": value for name, value in facts["teacher"].items()}
        for row in facts["rows"]:
            line = {**own, **row, "params": json.dumps(row["params"]), "run_ids": " ".join(row["run_ids"])}
            if writer is None:
                writer = csv.DictWriter(out, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    return out.getvalue()
