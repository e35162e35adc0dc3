"""A command killed between what it writes to the store and what it writes to MLflow: the next one makes MLflow agree with the store."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kdbench import tracking
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.deploy.leftovers import left_behind
from kdbench.experiment import Experiment
from kdbench.records.store import ResultStore
from kdbench.tracking import MlflowTracker, tracking_uri

REPOSITORY = Path(__file__).parents[2]
PARTS: dict[str, Any] = {
    "task": {"name": "classification", "data": {"name": "shapes", "train": 60, "test": 20, "target": "class"}, "val_size": 20},
    "students": [{"name": "tiny_cnn", "width": 2}],
    "methods": ["none"],
    "recipe": {"epochs": 2, "batch_size": 20, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 2,
    "control_seeds": 2,
}
WHOLE = [("none seed 0", "FINISHED", 2), ("none seed 1", "FINISHED", 2), ("none · tiny_cnn", "FINISHED", 0)]
KILLED_AFTER_APPEND = """
import json, os, signal, sys
from pathlib import Path
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment
from kdbench.records.store import ResultStore
from kdbench.tracking import MlflowTracker

append = ResultStore.append

def append_and_die(store, record):
    append(store, record)
    os.kill(os.getpid(), signal.SIGKILL)

ResultStore.append = append_and_die
of, folder, uri = Experiment.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
run(of, folder, Unwatched(), MlflowTracker(uri, of.name))
"""


class Killed(BaseException):
    """The process is gone: it closes nothing any more."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Making one takes seconds, so that all tests share it; each has an experiment of its own there."""
    return tracking_uri(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def of(request: pytest.FixtureRequest) -> Experiment:
    return Experiment.model_validate(PARTS | {"name": re.sub("[^a-z0-9]+", "-", request.node.name).strip("-")[-60:].strip("-")})


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tracking.ENVIRONMENT.items():  # which a tracker would set for good
        monkeypatch.setenv(name, value)


def shown(uri: str, of: Experiment) -> list[tuple[str, str, int]]:
    """Name, status and epochs of every run."""
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name(of.name).experiment_id])
    return sorted((run.info.run_name, run.info.status, len(client.get_metric_history(run.info.run_id, "lr"))) for run in runs)


def go_on(uri: str, of: Experiment, folder: Path) -> int:
    return run(of, folder, Unwatched(), MlflowTracker(uri, of.name)).trained


def named(folder: Path) -> set[str | None]:
    return {record.mlflow_run_id for record in ResultStore(folder).scan()}


def before(action: Callable[..., Any], die: Callable[[], None]) -> Callable[..., Any]:
    def instead(*arguments: Any, **options: Any) -> Any:
        die()
        return action(*arguments, **options)

    return instead


def after(action: Callable[..., Any], die: Callable[[], None]) -> Callable[..., Any]:
    def instead(*arguments: Any, **options: Any) -> Any:
        answer = action(*arguments, **options)
        die()
        return answer

    return instead


# Where the process dies, of the first final; and how many finals the next command trains.
POINTS = {
    "before its record is written": (ResultStore, "append", before, 2),
    "before its run has anything": (ResultStore, "append", after, 1),
    "before its run has its artifacts": (tracking, "_send_batch", after, 1),
    "before its run is closed": (tracking, "_send_text", after, 1),
    "after its run is closed": (tracking, "_close", after, 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_command_killed_at_any_point_of_a_record_is_made_good_by_the_next(
    database: str, of: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    place, name, when, left = POINTS[point]
    with monkeypatch.context() as here:

        def die() -> None:
            here.setattr(MlflowTracker, "attempt", lambda *_, **__: None)
            raise Killed

        here.setattr(place, name, when(getattr(place, name), die))
        with pytest.raises(Killed):
            go_on(database, of, tmp_path)
    assert "RUNNING" in {status for _, status, _ in shown(database, of)}

    assert go_on(database, of, tmp_path) == left
    assert shown(database, of) == WHOLE
    client = MlflowClient(tracking_uri=database)
    for record in ResultStore(tmp_path).scan():
        found = client.get_run(record.mlflow_run_id or "")
        assert found.data.tags["kdbench.run_id"] == record.run_id
        assert found.data.metrics["test_metric"] == record.test_metric
    assert go_on(database, of, tmp_path) == 0
    assert shown(database, of) == WHOLE
    assert len(named(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [2, 1])
def test_the_next_command_mends_what_sigkill_left_in_mlflow_though_it_has_nothing_to_do_there(
    database: str, of: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """Either all is on record, or the experiment was changed and its runs hang under another parent."""
    of = of.model_copy(update={"seeds": 1, "control_seeds": 1})
    command = [sys.executable, "-c", KILLED_AFTER_APPEND, of.model_dump_json(), str(tmp_path), database]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [status for _, status, _ in shown(database, of)] == ["RUNNING"] * 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    [line] = left_behind(tmp_path)
    assert line.startswith(f"MLflow at {database} shows 2 runs of experiment {of.name} as running")
    [record] = ResultStore(tmp_path).scan()

    changed = of.model_copy(update={"recipe": of.recipe.model_copy(update={"epochs": epochs})})
    assert go_on(database, changed, tmp_path) == (epochs == 1)
    old = [("none seed 0", "FINISHED", 2), ("none · tiny_cnn", "FINISHED" if epochs == 2 else "KILLED", 0)]
    new = [] if epochs == 2 else [("none seed 0", "FINISHED", 1), ("none · tiny_cnn", "FINISHED", 0)]
    assert shown(database, of) == sorted([*old, *new])
    assert MlflowClient(tracking_uri=database).get_run(record.mlflow_run_id or "").data.metrics["test_metric"] == record.test_metric
    assert left_behind(tmp_path) == []
