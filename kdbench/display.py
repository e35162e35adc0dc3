"""How a run shows itself: live bars on a terminal, one line a step where the output is a file or a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdbench.benchmark.watch import Phase
from kdbench.experiment import Unit
from kdbench.results.record import RunRecord

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


class Display:
    """A `benchmark.watch.Watch` for people. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = _bars(console) if console.is_terminal else None
        self._tasks: dict[Phase, Any] = {}
        self._running: dict[str, str] = {}
        self._shown = time.monotonic()
        self._counts: dict[Phase, tuple[int, int]] = {}
        self._best: dict[str, float] = {}
        self._begun: dict[Phase, tuple[float, int]] = {}

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

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
        if self._bars is not None:
            self._bars.update(self._tasks[phase], now=f"{unit.title}: {result}{best}")
        else:
            self._line(place + self._left(phase, done + 1, total))

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self._shown = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

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


class _Now(ProgressColumn):
    """What runs at this moment, and its metric so far."""

    def render(self, task: Task) -> str:
        return str(task.fields.get("now", ""))


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _Now(),
        console=console,
    )
