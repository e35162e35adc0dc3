"""What a run adds to the results folder: each finished unit once, in the store that counts and in MLflow, which shows it.

A record names its MLflow run. So that run is opened first, then the record is written, and then the run is, and is closed. Whatever is
killed in between, the store is right, and the next command makes MLflow agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kdbench.benchmark.watch import Watch
from kdbench.experiment import Experiment, Unit, to_yaml
from kdbench.records.environment import describe_environment
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.storage.layout import Layout
from kdbench.storage.lease import Lease
from kdbench.storage.working_copy import fetch
from kdbench.tracking import PROTOCOL_TAG, ROLE_TAG, RUN_TAG, Facts, LiveRun, NoTracker, Status, Tracker
from kdbench.training.outcome import code_of

# A training that takes longer is shown in MLflow while it runs; a shorter one is written in one go, which is much cheaper.
LIVE_AFTER_SECONDS = 10.0
_SHOWN = 5  # trainings that one line names
STATUSES: dict[str, Status] = {"ok": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


Parent = Callable[[], str | None]  # gives the MLflow run that others hang under, made when it is asked for


def no_parent() -> None:
    """Of a run that hangs under no other."""


class Ledger:
    """Store, tracker and watch of one run, and the count of what it did."""

    def __init__(self, experiment: Experiment, results: Path, watch: Watch, tracker: Tracker) -> None:
        self.layout = Layout(results)
        self.store = ResultStore(results)
        self.watch = watch
        self.tracker = tracker
        self.tracker.belongs_to(self.layout.location)
        self.lease: Lease | None = None  # of results at an address, while this run may write to them
        self.left_open: dict[str, str] = {}  # runs in MLflow that a killed command left, by key, and that no record names
        self.trained = 0
        self.found = 0
        self.failures: list[str] = []
        self._other_code: dict[str, dict[str, None]] = {}  # by module, the trainings that were found, in order
        self.held = ExitStack()  # what stays open until the run ends: Ray, once something has needed it
        self._context = {"config": to_yaml(experiment), **describe_environment()}
        self._curves: dict[str, list[dict[str, float]]] = {}
        self._live: dict[str, LiveRun] = {}
        self._untracked: dict[str, Callable[[], str | None]] = {}  # what MLflow lacks, or may lack, by key: how to write it
        self._missed: set[str] = set()  # of these, what it lacks for sure, as it could not be reached in this run

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str, parent: Parent = no_parent) -> None:
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
            self._live[key] = self.tracker.live(parent(), unit.title, key)
        for row in curve:
            self._live[key].log(_metrics(row), int(row["epoch"]))

    def resumed(self, unit: Unit, place: str) -> None:
        """Say how much of an interrupted training was kept."""
        self.watch.note(f"{unit.title}: goes on from {place}")

    def curve_of(self, unit: Unit) -> list[dict[str, float]]:
        """The epochs that were reported of a training that runs or was stopped."""
        return self._curves.get(_key(unit), [])

    def drop(self, unit: Unit) -> None:
        """A training that could not be finished leaves a failed run in MLflow, where it was shown at all."""
        self._curves.pop(_key(unit), None)
        live = self._live.pop(_key(unit), None)
        if live is not None:
            live.finish(Facts(status="FAILED"))

    def close(self) -> None:
        """What is still shown as running was stopped with the run; whoever goes on with it shows it anew."""
        while self._live:
            self._live.popitem()[1].finish(Facts(status="KILLED"))

    def found_again(self, unit: Unit, record: RunRecord, parent: Parent = no_parent) -> None:
        """Count a unit that an earlier run put on record. If MLflow could not be reached then, it is shown when this run ends."""
        self.found += 1
        self.compare_code(f"{unit.student.label} · {unit.method.label}", code_of(unit), record.code)
        if record.role != "teacher":
            self.watch.found(record)
        if record.mlflow_run_id is None:
            self._owe(unit, record, parent)

    def mend(self, experiment: str) -> None:
        """Close what killed commands left open in MLflow, with what the store knows of it. Nobody else runs this experiment now."""
        left = dict(self.tracker.left_open())
        for record in self.store.scan(experiment=experiment) if left else []:
            if record.mlflow_run_id is not None and left.pop(record.mlflow_run_id, None) is not None:
                self._complete(record.mlflow_run_id, record)
        for run_id, key in left.items():
            self.tracker.close_parent(run_id, "KILLED")
            self.left_open[key] = run_id

    def _complete(self, run_id: str, record: RunRecord) -> str | None:
        return self.tracker.complete(run_id, record.curve, self._facts(record))

    def compare_code(self, title: str, now: Mapping[str, str], then: Mapping[str, str] | None) -> None:
        """Remember which of the user's modules have other code now than what `title` was trained with. None: nobody knows with which."""
        if then is None:
            return
        for module in sorted(now.keys() | then.keys()):
            if now.get(module) != then.get(module):
                self._other_code.setdefault(module, {})[title] = None

    def tell_of_other_code(self) -> None:
        """One line on trainings and searches that were found although the user's code has changed since: code is in no key."""
        if not self._other_code:
            return
        modules = ", ".join(f"{module.rpartition('.')[2]}.py" for module in self._other_code)
        names = list(dict.fromkeys(name for names in self._other_code.values() for name in names))
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        self.watch.note(
            f"the code of {modules} has changed since these were trained, and they are shown as they were: {shown}; to train them again, "
            "raise the version of your method or task, give your model another label, or use another results folder"
        )

    def _owe(self, unit: Unit, record: RunRecord, parent: Parent) -> None:
        if not isinstance(self.tracker, NoTracker):
            self._untracked[_key(unit)] = partial(self._write, unit, record, parent)

    def catch_up(self) -> None:
        """Send what MLflow lacks, as it could not be reached when that ended. A key that it has by now is not written again."""
        if not self._untracked:
            return
        if self.tracker.answers():
            for key in list(self._untracked):
                if self._untracked[key]() is not None:
                    del self._untracked[key]
        if missed := self._missed & self._untracked.keys():
            self.watch.note(
                f"MLflow lacks {len(missed)} of the finished trainings, as it could not be reached; "
                "the same command sends those that are on record"
            )

    def append(self, unit: Unit, record: RunRecord, parent: Parent = no_parent, **facts: Any) -> RunRecord:
        """Put a finished unit on record. Raises RunFailed where another machine took this run over."""
        self.check_lease()  # whoever took over shows its trainings in MLflow itself
        live, shown = self._opened(unit, parent)
        number = self.lease.number if self.lease is not None else None
        record = record.model_copy(update={**self._context, **facts, "mlflow_run_id": live.run_id, "lease": number})
        self.check_lease()
        self.store.append(record)
        self._finish(unit, record, live, shown, parent)
        self._count(unit, record)
        return record

    def check_lease(self) -> None:
        """Raise RunFailed where another machine took this run over. Called before each write to the store's records and studies."""
        if self.lease is not None:
            self.lease.check()

    def keep_again(self, record: RunRecord, **facts: Any) -> RunRecord:
        """Put a finished training on record that has another record already. It was trained where and with what that one says."""
        record = record.model_copy(update={**facts, "lease": self.lease.number if self.lease is not None else None})
        self.check_lease()
        self.store.append(record)
        return record

    def keep_measured(self, record: RunRecord) -> RunRecord:
        """Put a finished training on record that was measured again, on data that lie where the experiment says now."""
        return self.keep_again(record, config=self._context["config"])

    def note_trial(self, unit: Unit, record: RunRecord, parent: Parent) -> None:
        """Show a trial, whose study is told of it next.

        Of a trial nothing is on record that it could be shown from later. A trial that was shown and not told is trained again, and its
        run is found.
        """
        live, shown = self._opened(unit, parent)
        self._finish(unit, record.model_copy(update=self._context), live, shown, parent)
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

    def _opened(self, unit: Unit, parent: Parent) -> tuple[LiveRun, set[float]]:
        """The MLflow run of a training that ended, and the epochs that were shown while it ran."""
        live = self._live.pop(_key(unit), None)
        if live is not None and live.run_id is not None:
            return live, {row["epoch"] for row in self.curve_of(unit)}
        return self.tracker.begin(parent(), unit.title, _key(unit)), set()

    def _finish(self, unit: Unit, record: RunRecord, live: LiveRun, shown: set[float], parent: Parent) -> None:
        """Write the record to its MLflow run and close that. What MLflow can't be told now is sent when this run of kdbench ends."""
        live.log_curve([row for row in record.curve if row["epoch"] not in shown])
        if live.finish(self._facts(record)) is not None:
            return
        key = _key(unit)
        self._missed.add(key)
        if live.run_id is None:
            self._owe(unit, record, parent)
        else:
            self._untracked[key] = partial(self._complete, live.run_id, record)

    def _write(self, unit: Unit, record: RunRecord, parent: Parent) -> str | None:
        curve = [_metrics(row, keep_epoch=True) for row in record.curve]
        return self.tracker.log_run(parent(), unit.title, _key(unit), curve, self._facts(record))

    def _facts(self, record: RunRecord) -> Facts:
        return Facts(
            params={**{f"recipe.{name}": value for name, value in record.recipe.items()}, **record.params, "seed": record.seed},
            metrics={name: value for name, value in _summary(record).items() if value is not None},
            tags={
                RUN_TAG: record.run_id,
                ROLE_TAG: record.role,
                "kdbench.method": record.label,
                "kdbench.student": record.student,
                "kdbench.status": record.status,
                "kdbench.failure": record.failure or "",
                PROTOCOL_TAG: record.protocol_hash,
            },
            status=STATUSES[record.status],
            artifacts=self._artifacts(record),
            texts={"experiment.yaml": record.config or ""} if record.role != "trial" else {},
        )


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
