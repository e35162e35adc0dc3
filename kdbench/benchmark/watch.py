"""Who is told how a run goes: a progress display, a log, a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from kdbench.experiment import Unit
from kdbench.records.record import RunRecord

Phase = Literal["teacher", "cache", "profile", "search", "check", "final"]


class Watch(Protocol):
    """Told of every step. `done` and `total` count trainings, but for the cache, which counts images."""

    def progress(self, phase: Phase, done: int, total: int) -> None:
        """How far one phase is."""
        ...

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str) -> None:
        """An epoch of a training is over. metrics: its row of the curve; primary: the task's metric, as `val_NAME` there."""
        ...

    def finished(self, unit: Unit, record: RunRecord) -> None:
        """A training has ended, well or not, and is on record unless it was a trial."""
        ...

    def found(self, record: RunRecord) -> None:
        """A training that an earlier run finished."""
        ...

    def note(self, text: str) -> None:
        """A line for people."""
        ...


class Unwatched:
    """Nobody looks."""

    def progress(self, phase: Phase, done: int, total: int) -> None:
        pass

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str) -> None:
        pass

    def finished(self, unit: Unit, record: RunRecord) -> None:
        pass

    def found(self, record: RunRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass
