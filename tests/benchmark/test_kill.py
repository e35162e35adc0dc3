"""Killed means paused: `kill -9` of the driver in every phase, then the same command, gives the undisturbed board."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "kill.yaml"
# What differs between two runs of the same trainings: names, and how long things took on a machine that does other things too.
UNREPEATABLE = ("run_ids", "device_hours", "latency_ms_p50")


def start(results: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kdbench.cli", "run", str(EXPERIMENT), "--results", str(results)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(results: Path) -> str:
    process = start(results)
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    return output


def kill_when(results: Path, moment: Callable[[Path], bool]) -> None:
    process = start(results)
    limit = time.monotonic() + 200
    while not moment(results):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def records(results: Path) -> list[dict[str, Any]]:
    return [pq.ParquetFile(path).read().to_pylist()[0] for path in sorted((results / "v1").rglob("*.parquet"))]


def board(results: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "kdbench.cli", "leaderboard", "--format", "json", "--results", str(results)]
    boards = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["boards"]
    for row in (row for found in boards for row in found["rows"]):
        for key in UNREPEATABLE:
            row.pop(key)
    return boards


def trials(results: Path) -> list[optuna.trial.FrozenTrial]:
    found = []
    for journal in sorted((results / "studies").glob("*.journal")):
        storage = JournalStorage(JournalFileBackend(str(journal)))
        for study in optuna.get_all_study_names(storage):
            found += optuna.load_study(study_name=study, storage=storage).trials
    return found


def in_teacher(results: Path) -> bool:
    return any((results / "checkpoints" / "kill").glob("*.pt"))


def in_search(results: Path) -> bool:
    # each trial that ends adds one line of this kind to its study's journal
    return any('"epochs"' in path.read_text() for path in (results / "studies").glob("*.journal"))


def in_finals(results: Path) -> bool:
    return sum(record["role"] == "final" for record in records(results)) >= 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    finish(results)
    return results


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_killed_in_every_phase_ends_at_the_undisturbed_board_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    for moment in (in_teacher, in_search, in_finals):
        kill_when(tmp_path, moment)
    finish(tmp_path)
    assert board(tmp_path) == board(undisturbed)

    keys = [record["unit_key"] for record in records(tmp_path)]
    assert len(keys) == len(set(keys)), "a unit ran twice"
    assert sorted(keys) == sorted(record["unit_key"] for record in records(undisturbed))

    mine, theirs = trials(tmp_path), trials(undisturbed)
    assert len(mine) == 6
    assert {trial.state for trial in mine} == {TrialState.COMPLETE}
    assert sorted((t.number, str(t.params), t.value) for t in mine) == sorted((t.number, str(t.params), t.value) for t in theirs)
    assert not list((tmp_path / "checkpoints").rglob("*.*")), "a checkpoint of finished work is left"
    assert runs_in_mlflow(tmp_path) == runs_in_mlflow(undisturbed)


def runs_in_mlflow(results: Path) -> list[tuple[str, str]]:
    """Name and status of every run that MLflow shows."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("kill")
    runs = client.search_runs([experiment.experiment_id])
    return sorted((run.info.run_name, run.info.status) for run in runs)


@pytest.mark.slow
def test_a_finished_experiment_trains_nothing_again(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "v1").rglob("*.parquet")}
    asked = [(trial.number, trial.datetime_complete) for trial in trials(undisturbed)]
    output = finish(undisturbed)
    assert "trial" not in output.split("classification on")[0]
    assert "kd" in output.split("classification on")[1]
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "v1").rglob("*.parquet")} == before
    assert [(trial.number, trial.datetime_complete) for trial in trials(undisturbed)] == asked


@pytest.mark.slow
def test_without_a_search_no_ray_is_started_and_a_killed_run_ends_the_same(tmp_path: Path) -> None:
    text = "".join(line for line in EXPERIMENT.read_text().splitlines(keepends=True) if not line.startswith("search:"))
    config = tmp_path / "finals-only.yaml"
    config.write_text(text)
    command = [sys.executable, "-m", "kdbench.cli", "run", str(config), "--no-mlflow", "--results"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    no_ray = {**os.environ, "RAY_TMPDIR": "/nonexistent/so/ray/could/not/start"}
    subprocess.run([*command, str(whole)], check=True, capture_output=True, env=no_ray)
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "v1").exists() or not in_finals(killed):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    assert board(killed) == board(whole)
    assert len(records(killed)) == len(records(whole)) == 5
