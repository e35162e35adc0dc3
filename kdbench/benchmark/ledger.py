"""What a run adds to the results folder: each finished unit once, in the store that counts and in MLflow, which shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdbench.benchmark.watch import Watch
from kdbench.experiment import Experiment, Unit, to_yaml
from kdbench.results.environment import describe_environment
from kdbench.results.layout import Layout
from kdbench.results.record import RunRecord
from kdbench.results.store import ResultStore
from kdbench.results.tracking import Tracker


class Ledger:
    """Store, tracker and watch of one run, and the count of what it did."""

    def __init__(self, experiment: Experiment, results: Path, watch: Watch, tracker: Tracker) -> None:
        self.layout = Layout(results)
        self.store = ResultStore(results)
        self.watch = watch
        self.tracker = tracker
        self.trained = 0
        self.found = 0
        self.failures: list[str] = []
        self._context = {"config": to_yaml(experiment), **describe_environment()}

    def keep(self, unit: Unit, record: RunRecord, parent: str | None = None, **facts: Any) -> RunRecord:
        """Put a finished unit on record. MLflow comes first, so that the record can name its run; the record is what counts."""
        record = record.model_copy(update={**self._context, **facts})
        record = record.model_copy(update={"mlflow_run_id": self.show(unit, record, parent)})
        self.store.append(record)
        self.trained += 1
        self.watch.finished(unit, record)
        return record

    def note_trial(self, unit: Unit, record: RunRecord, parent: str | None) -> None:
        """A trial is its study's to remember; MLflow and the watch are shown it."""
        self.show(unit, record.model_copy(update=self._context), parent)
        self.trained += 1
        self.watch.finished(unit, record)

    def show(self, unit: Unit, record: RunRecord, parent: str | None) -> str | None:
        """The record as an MLflow run; its id."""
        return self.tracker.log_record(record, unit.title, parent, self.layout.root)
