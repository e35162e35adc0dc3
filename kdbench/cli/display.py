"""How a run shows itself: live bars on a terminal, one line a step where the output is a file or a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from kdbench.benchmark.watch import Phase
from kdbench.boards.board import Board, Row, verdict
from kdbench.boards.formatting import COLOURS, ranks
from kdbench.boards.leaderboard import boards
from kdbench.experiment import Unit
from kdbench.records.record import RunRecord

TITLES: dict[Phase, str] = {
    "teacher": "teacher",
    "cache": "teacher's outputs",
    "profile": "profiles",
    "search": "search trials",
    "check": "winners, fresh seed",
    "final": "final seeds",
}
# A log gets a line for an epoch only if this long has passed since the last: a long teacher shows life, a short trial does not flood.
_HEARTBEAT_SECONDS = 5.0
_ROOMY = 90  # characters of a terminal that has room for bars and for what is left beside what runs now
_LINES_BELOW_BARS = 3  # a board's title, its header and the line below it


class Display:
    """A `benchmark.watch.Watch` for people. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = _bars(console) if console.is_terminal else None
        self._finals: dict[str, RunRecord] = {}
        self._boards: list[Board] = []
        self._tasks: dict[Phase, Any] = {}
        self._running: dict[str, str] = {}
        self._shown = time.monotonic()
        self._counts: dict[Phase, tuple[int, int]] = {}
        self._best: dict[str, float] = {}
        self._begun: dict[Phase, tuple[float, int]] = {}
        self._screen = Live(console=console, get_renderable=self._shown_now, refresh_per_second=4, vertical_overflow="crop")

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._screen.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._boards = []  # whoever runs an experiment prints the whole board next
        if self._bars is not None:
            self._screen.stop()

    def progress(self, phase: Phase, done: int, total: int) -> None:
        before = self._counts.get(phase)
        self._counts[phase] = (done, total)
        if total == 0:
            return
        if before is None or done < before[0]:
            self._begun[phase] = (time.monotonic(), done)
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(TITLES[phase], total=total, now="")
            self._bars.update(self._tasks[phase], completed=done, total=total)
        elif phase == "cache" and done == total and (before is None or before[0] < total):
            self.console.print(f"{TITLES[phase]}: {total} predictions kept")

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str) -> None:
        value, epoch = metrics[f"val_{primary}"], int(metrics["epoch"])
        text = f"{unit.title}: epoch {epoch}/{unit.recipe.epochs}, val {primary} {value:.2f}"
        phase = _phase(unit)
        if self._bars is not None and phase in self._tasks:
            bars, task = self._bars, self._tasks[phase]
            if unit.role == "teacher":
                bars.update(task, completed=epoch, total=unit.recipe.epochs)
            self._running[unit.key] = text
            bars.update(task, now=text)
        elif time.monotonic() - self._shown > _HEARTBEAT_SECONDS:
            self._line(text + (self._teacher_left(unit, epoch, metrics["seconds"]) if unit.role == "teacher" else ""))

    def finished(self, unit: Unit, record: RunRecord) -> None:
        if unit.role == "teacher":
            return
        phase = _phase(unit)
        done, total = self._counts.get(phase, (0, 0))
        result = _result(record)
        best = self._keep_best(unit, record)
        place = f"{TITLES[phase]} {min(done + 1, total)}/{total}: {unit.title}: {result}{best}"
        self.found(record)
        if self._bars is not None:
            self._bars.update(self._tasks[phase], now=f"{unit.title}: {result}{best}")
        else:
            self._line(place + self._standing(record) + self._left(phase, done + 1, total))

    def found(self, record: RunRecord) -> None:
        if record.role == "final":
            self._finals[record.unit_key] = record
            self._boards = boards(self._finals.values())

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self._shown = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _shown_now(self) -> Group:
        """Bars, and below them the boards as they are so far, cut to the terminal's height."""
        if self._bars is None:
            return Group()
        room = self.console.height - len(self._tasks) - 1
        small: list[Group] = []
        for board in self._boards:
            lines = min(len(board.rows), room - _LINES_BELOW_BARS)
            if lines < 1:
                break
            small.append(_small_board(board, lines, self.console.width))
            room -= lines + _LINES_BELOW_BARS
        return Group(self._bars, *small)

    def _standing(self, record: RunRecord) -> str:
        """Where a method stands after one more final: `; kd so far 83.05 +-0.41 over 2 seeds, rank 1 of 3`."""
        if record.role != "final":
            return ""
        for board in self._boards:
            rows = [row for row in board.rows if row.label == record.label and record.run_id in row.run_ids]
            if rows:
                row, ranked = rows[0], sum(other.rank is not None for other in board.rows)
                rank = f", rank {ranks(row.rank, row.rank_high)} of {ranked}" if row.rank is not None else ""
                return f"; {row.label} so far {_mean(row, board)} over {row.seeds} seed{'' if row.seeds == 1 else 's'}{rank}"
        return ""

    def _keep_best(self, unit: Unit, record: RunRecord) -> str:
        if unit.role != "trial" or record.val_metric is None:
            return ""
        label, sign = unit.method.label, 1 if record.higher_is_better else -1
        best = max(sign * record.val_metric, self._best.get(label, float("-inf")))
        self._best[label] = best
        return f" (best {sign * best:.2f})"

    def _left(self, phase: Phase, done: int, total: int) -> str:
        started, first = self._begun.get(phase, (time.monotonic(), done))
        if done <= first or done >= total:
            return ""
        return f", about {_clock((time.monotonic() - started) / (done - first) * (total - done))} left in this step"

    def _teacher_left(self, unit: Unit, epoch: int, seconds: float) -> str:
        left = (unit.recipe.epochs - epoch) * seconds / epoch
        return f", about {_clock(left)} left in this step" if left >= 1 else ""


def _phase(unit: Unit) -> Phase:
    phases: dict[str, Phase] = {"teacher": "teacher", "trial": "search", "candidate": "check", "final": "final"}
    return phases[unit.role]


def _result(record: RunRecord) -> str:
    if record.status == "failed":
        return f"failed: {record.failure}"
    if record.status == "stopped":
        return f"stopped after {len(record.curve)} epochs"
    metric = f"val {record.primary} {record.val_metric:.2f}"
    return metric if record.test_metric is None else f"{metric}, test {record.test_metric:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _mean(row: Row, board: Board) -> str:
    """`83.05`, or `83.05 +-0.41` with half the width of the 95% interval."""
    if row.mean is None:
        return "-"
    figures = board.decimals
    return f"{row.mean:.{figures}f}" + ("" if row.high is None else f" ±{row.high - row.mean:.{figures}f}")


def _gain(row: Row, board: Board) -> Text:
    """The gain in points: green surely better, red surely worse."""
    gain, _, _ = row.shown_gain
    if gain is None:
        return Text("-")
    return Text(f"{gain:+.{board.decimals}f}", style=COLOURS[verdict(row.over_undistilled)])


def _small_board(board: Board, lines: int, width: int) -> Group:
    """The best `lines` methods so far; whole cells are left out before any is cut."""
    more = len(board.rows) - lines
    title = f"{board.teacher or 'no teacher'} -> {board.student}, so far" + (f" ({more} more)" if more else "")
    columns = [Column("rank", justify="right"), Column("method"), Column(board.primary, justify="right")]
    columns += [Column("gain", justify="right")] if width >= 45 else []
    columns += [Column("seeds", justify="right")] if width >= 55 else []
    for column in columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    table = Table(*columns, box=box.SIMPLE_HEAD if width >= 55 else None, pad_edge=False, show_edge=False)
    for row in board.rows[:lines]:
        rank = Text(ranks(row.rank, row.rank_high))
        cells = [rank, Text(row.label), Text(_mean(row, board)), _gain(row, board), Text(str(row.seeds))]
        table.add_row(*cells[: len(columns)], style="bold" if row.rank == 1 else "")
    return Group(Text(title, style="bold", no_wrap=True, overflow="ellipsis"), table)


class _Now(ProgressColumn):
    """What runs at this moment, and its metric so far."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("now", "")), no_wrap=True, overflow="ellipsis")


def _bars(console: Console) -> Progress:
    whole = Column(no_wrap=True, overflow="ellipsis")
    roomy = [BarColumn(bar_width=24)], [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    bar, times = roomy if console.width >= _ROOMY else ([], [])
    return Progress(
        TextColumn("[bold]{task.description}", table_column=whole),
        *bar,
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        *times,
        _Now(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=console,
        expand=True,
        auto_refresh=False,  # the screen that they are a part of does it
    )
