"""Rows of results, the goals that they are held against, and the tables that people read."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Sample
from kdbench.records.environment import describe_environment


@dataclass(frozen=True)
class Goal:
    """A bound that a median is held against."""

    bound: float
    at_most: bool = False

    def met_by(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


def at_least(bound: float) -> Goal:
    return Goal(bound)


def at_most(bound: float) -> Goal:
    return Goal(bound, at_most=True)


@dataclass(frozen=True)
class Row:
    """One line of a part's table. `value` is None where it could not be measured, and `note` then says why.

    wall: the same ratio by wall clock, where `value` is by CPU seconds. note: what a reader has to know to believe the number.
    """

    what: str
    value: Sample | None
    unit: str = "x"
    goal: Goal | None = None
    wall: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.goal is None:
            return ""
        return "met" if self.goal.met_by(self.value.median) else "NOT MET"


def not_measured(what: str, why: str, goal: Goal | None = None) -> Row:
    return Row(what, None, goal=goal, note=why)


@dataclass(frozen=True)
class PartTable:
    """A part's rows, and under which circumstances they were measured."""

    key: str
    title: str
    rows: tuple[Row, ...]
    seconds: float
    machine: str
    command: str


COLUMNS = ("what", "median [min .. max]", "n", "95%", "wall", "goal", "", "note")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, one cell a column. The `95%` column is how well the median is known."""
    goal = str(row.goal) if row.goal else ""
    if row.value is None:
        return (row.what, "-", "", "", "", goal, row.verdict, row.note)
    value = row.value
    spread = f" [{number(value.low)} .. {number(value.high)}]" if len(value.values) > 1 else ""
    known = f"±{100 * value.resolution:.1f}%" if value.resolution < 10 else ""
    wall = number(row.wall) if row.wall is not None else ""
    return (row.what, f"{number(value.median)} {row.unit}{spread}", str(len(value.values)), known, wall, goal, row.verdict, row.note)


def number(value: float) -> str:
    """Three significant digits, more for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def print_table(table: PartTable, console: Console) -> None:
    """For a terminal."""
    shown = Table(title=f"{table.key}. {table.title}", title_justify="left", show_lines=False)
    for column in COLUMNS:
        shown.add_column(column, overflow="fold")
    for row in table.rows:
        style = {"NOT MET": "red", "met": "green", "not measured": "yellow"}.get(row.verdict)
        shown.add_row(*cells(row), style=style)
    console.print(f"[dim]{table.machine}\n{table.command}: {table.seconds:.0f} s[/dim]", highlight=False, soft_wrap=True)
    console.print(shown)


def markdown(tables: Sequence[PartTable]) -> str:
    """All tables, each below the machine and the command."""
    lines: list[str] = []
    for table in tables:
        lines += [
            f"### {table.key}. {table.title}",
            "",
            f"{table.machine}  ",
            f"`{table.command}`, {table.seconds:.0f} s for this part",
            "",
        ]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def as_data(tables: Iterable[PartTable]) -> list[dict[str, Any]]:
    """For JSON: every single value, with the verdicts."""
    return [
        {
            **{name: value for name, value in asdict(table).items() if name != "rows"},
            "environment": describe_environment(),
            "rows": [{**asdict(row), "median": row.value.median if row.value else None, "verdict": row.verdict} for row in table.rows],
        }
        for table in tables
    ]


def write(tables: Sequence[PartTable], folder: Path) -> None:
    """bench.json and bench.md, over what an earlier run left."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(as_data(tables), indent=1))
    (folder / "bench.md").write_text(markdown(tables))


DOCS_BEGIN, DOCS_END = "<!-- tables -->", "<!-- /tables -->"


def put_into(page: Path, tables: Sequence[PartTable]) -> None:
    """Put the tables between the page's two marks, each in the place of its part's older one; parts that were not measured now stay."""
    before, _, rest = page.read_text().partition(DOCS_BEGIN)
    old, _, after = rest.partition(DOCS_END)
    parts = {part.partition(".")[0]: f"### {part.strip()}\n" for part in old.split("### ")[1:]}
    parts |= {table.key: markdown([table]) for table in tables}
    page.write_text("\n".join([f"{before}{DOCS_BEGIN}\n", *parts.values(), f"{DOCS_END}{after}"]))


def describe_machine() -> str:
    """CPU, cores, threads used, the load before anything was measured, versions, time."""
    environment = describe_environment()
    versions = environment["versions"]
    commit = f"{(environment['git_commit'] or 'no commit')[:10]}{' with changes' if environment['git_dirty'] else ''}"
    return (
        f"{_cpu_name()}, {os.cpu_count()} cores, 1 torch thread a process, load {os.getloadavg()[0]:.1f} at the start; "
        f"python {versions['python']}, torch {versions['torch']}, ray {versions['ray']}, kdbench {versions['kdbench']} at {commit}; "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
