"""What a run adds to the results folder: each finished unit once, in the store that counts and in MLflow, which shows it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kdbench.benchmark.watch import Watch
from kdbench.experiment import Experiment, Unit, to_yaml
from kdbench.results.environment import describe_environment
from kdbench.results.layout import Layout
from kdbench.results.record import RunRecord
from kdbench.results.store import ResultStore
from kdbench.results.tracking import PROTOCOL_TAG, ROLE_TAG, RUN_TAG, LiveRun, NoTracker, Status, Tracker
from kdbench.results.working_copy import fetch

# A training that takes longer is shown in MLflow while it runs; a shorter one is written in one go, which is much cheaper.
LIVE_AFTER_SECONDS = 10.0
STATUSES: dict[str, Status] = {"ok": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


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
        self.held = ExitStack()  # what stays open until the run ends: Ray, once something has needed it
        self._context = {"config": to_yaml(experiment), **describe_environment()}
        self._curves: dict[str, list[dict[str, float]]] = {}
        self._live: dict[str, LiveRun] = {}

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str, parent: str | None = None) -> None:
        """Show an epoch of a training that runs."""
        self.watch.epoch(unit, metrics, primary)
        key = _key(unit)
        curve = self._curves.setdefault(key, [])
        if curve and metrics["epoch"] <= curve[-1]["epoch"]:  # its process died, and another one begins where the last checkpoint was
            return
        curve.append(dict(metrics))
        if metrics["seconds"] < LIVE_AFTER_SECONDS:
            return
        if key in self._live:
            curve = curve[-1:]
        else:
            self._live[key] = self.tracker.live(parent, unit.title, key)
        for row in curve:
            self._live[key].log(_metrics(row), int(row["epoch"]))

    def curve_of(self, unit: Unit) -> list[dict[str, float]]:
        """The epochs that were reported of a training that runs or was stopped."""
        return self._curves.get(_key(unit), [])

    def recall(self, record: RunRecord) -> None:
        """Count a training of a student that the store has already."""
        self.found += 1
        self.watch.found(record)

    def drop(self, unit: Unit) -> None:
        """A training that could not be finished leaves a failed run in MLflow, where it was shown at all."""
        self._curves.pop(_key(unit), None)
        live = self._live.pop(_key(unit), None)
        if live is not None:
            live.finish("FAILED")

    def close(self) -> None:
        """What is still shown as running was stopped with the run; whoever goes on with it shows it anew."""
        while self._live:
            self._live.popitem()[1].finish("KILLED")

    def keep(self, unit: Unit, record: RunRecord, parent: str | None = None, **facts: Any) -> RunRecord:
        """Put a finished unit on record. MLflow comes first, so that the record can name its run; the record is what counts."""
        record = record.model_copy(update={**self._context, **facts})
        record = record.model_copy(update={"mlflow_run_id": self._show(unit, record, parent)})
        self.store.append(record)
        self._count(unit, record)
        return record

    def note_trial(self, unit: Unit, record: RunRecord, parent: str | None) -> None:
        """A trial is its study's to remember; MLflow and the watch are shown it."""
        self._show(unit, record.model_copy(update=self._context), parent)
        self._count(unit, record)

    def _count(self, unit: Unit, record: RunRecord) -> None:
        self.trained += 1
        self._curves.pop(_key(unit), None)
        self.watch.finished(unit, record)

    def _artifacts(self, record: RunRecord) -> list[Path]:
        """A training on another node left its weights in the store; they are fetched for MLflow alone, where there is one."""
        if record.artifacts_uri is None or isinstance(self.tracker, NoTracker):
            return []
        return [fetch(self.layout.root / record.artifacts_uri)]

    def _show(self, unit: Unit, record: RunRecord, parent: str | None) -> str | None:
        """The record as an MLflow run; its id."""
        what: dict[str, Any] = {
            "params": {**{f"recipe.{name}": value for name, value in record.recipe.items()}, **record.params, "seed": record.seed},
            "metrics": {name: value for name, value in _summary(record).items() if value is not None},
            "tags": {
                RUN_TAG: record.run_id,
                ROLE_TAG: record.role,
                "kdbench.method": record.label,
                "kdbench.student": record.student,
                "kdbench.status": record.status,
                "kdbench.failure": record.failure or "",
                PROTOCOL_TAG: record.protocol_hash,
            },
            "status": STATUSES[record.status],
            "artifacts": self._artifacts(record),
            "texts": {"experiment.yaml": record.config or ""} if record.role != "trial" else {},
        }
        live = self._live.pop(_key(unit), None)
        if live is not None:
            shown = {row["epoch"] for row in self.curve_of(unit)}
            for row in record.curve:  # epochs of an earlier process, before it was killed
                if row["epoch"] not in shown:
                    live.log(_metrics(row), int(row["epoch"]))
            return live.finish(**what)
        return self.tracker.log_run(parent, unit.title, _key(unit), curve=[_metrics(row, keep_epoch=True) for row in record.curve], **what)


def _key(unit: Unit) -> str:
    """Trials of one study may meet at the same point; their numbers keep them apart."""
    return unit.key if unit.number is None else f"{unit.key}/{unit.number}"


def _metrics(row: Mapping[str, float], keep_epoch: bool = False) -> dict[str, float]:
    return {name: value for name, value in row.items() if keep_epoch or name != "epoch"}


def _summary(record: RunRecord) -> dict[str, float | None]:
    return {
        "val_metric": record.val_metric,
        "test_metric": record.test_metric,
        "train_seconds": record.train_seconds,
        "agreement": record.agreement,
        **{f"test_{name}": value for name, value in record.metrics.items()},
    }
