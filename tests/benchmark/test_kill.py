"""Killed means paused: `kill -9` of the driver in every phase, then the same command, gives the undisturbed board."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.cluster_utils import Cluster

from kdbench.records.record import from_table
from kdbench.storage.folder import Folder
from kdbench.storage.journals import fetch_journal, whole_journal
from kdbench.storage.layout import results_folder
from tests.object_storage import KEY, SECRET, ObjectStorage

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "kill.yaml"
# What differs between two runs of the same trainings: names, and how long things took on a machine that does other things too.
UNREPEATABLE = ("run_ids", "device_hours", "latency_ms_p50", "pareto")


def start(results: Path | str, environment: dict[str, str] | None = None, *options: str) -> subprocess.Popen[bytes]:
    """In a process group of its own."""
    command = [sys.executable, "-m", "kdbench.cli", "run", str(EXPERIMENT), "--results", str(results), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=os.environ | (environment or {}), process_group=0, **pipes)


def finish(results: Path | str, environment: dict[str, str] | None = None, *options: str) -> str:
    process = start(results, environment, *options)
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    return output


def kill_when(results: Path, moment: Callable[[Path], bool]) -> None:
    kill_once(start(results), lambda: moment(results))


def kill_once(process: subprocess.Popen[bytes], it_is_time: Callable[[], bool]) -> str:
    """What the process had said when it was killed."""
    limit = time.monotonic() + 200
    while not it_is_time():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.communicate()[0].decode()


def records(results: Path) -> list[dict[str, Any]]:
    return [pq.ParquetFile(path).read().to_pylist()[0] for path in sorted((results / "v1").rglob("*.parquet"))]


def board(results: Path | str) -> list[dict[str, Any]]:
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
@pytest.mark.timeout(600)
def test_a_driver_killed_on_one_machine_goes_on_from_the_bucket_on_another_and_on_a_cluster_that_shares_no_disk_with_it(
    undisturbed: Path, tmp_path: Path, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, one, other, nodes = object_storage.new_bucket(), tmp_path / "one", tmp_path / "other", tmp_path / "nodes"
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "4")

    def is_in_search() -> bool:
        return b'"epochs"' in object_storage.journals(bucket)

    said = kill_once(start(bucket, object_storage.environment(one)), is_in_search)
    done = [path for path in object_storage.objects(bucket) if path.startswith("v1/")]
    traces = everything(one)
    shutil.rmtree(one)
    for name, value in object_storage.environment(nodes).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        said += finish(bucket, object_storage.environment(other), "--set", f"runtime.address={cluster.address}")
    finally:
        cluster.shutdown()

    assert [path.name for path in nodes.rglob("model.safetensors")] == [], "the cached outputs were enough"
    assert list(nodes.rglob("logits.npy")), "the processes of the cluster had working copies of their own"
    assert board(bucket) == board(undisturbed)
    kept = object_storage.objects(bucket)
    assert not [path for path in kept if path.startswith(".ray-")], "what Tune noted down is left"
    copy = tmp_path / "downloaded"
    for path, content in kept.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(content)
    keys = [record["unit_key"] for record in records(copy)]
    assert set(done) <= kept.keys()
    assert sorted(keys) == sorted(record["unit_key"] for record in records(undisturbed)), "a unit ran twice, or is lost"
    for path in kept:
        if path.endswith(".journal"):
            fetch_journal(results_folder(bucket) / path)
    mine, theirs = trials(results_folder(bucket)), trials(undisturbed)
    assert sorted((t.number, str(t.params), t.value) for t in mine) == sorted((t.number, str(t.params), t.value) for t in theirs)
    assert not [path for path in kept if path.startswith("checkpoints/")], "a checkpoint of finished work is left"
    traces += everything(other) + everything(nodes) + said.encode() + b"".join(kept.values())
    assert not [secret for secret in (KEY, SECRET) if secret.encode() in traces]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_command_that_was_stopped_for_longer_than_a_lease_writes_nothing_more_when_it_goes_on(
    undisturbed: Path, tmp_path: Path, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, one, other = object_storage.new_bucket(), tmp_path / "one", tmp_path / "other"
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "4")
    stopped = start(bucket, object_storage.environment(one))
    limit = time.monotonic() + 200
    while b'"epochs"' not in object_storage.journals(bucket):
        assert stopped.poll() is None, stopped.communicate()[0].decode()
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGSTOP)
    try:
        finish(bucket, object_storage.environment(other))
        before = {path: content for path, content in object_storage.objects(bucket).items() if path.startswith(("v1/", "studies/"))}
    finally:
        os.killpg(stopped.pid, signal.SIGCONT)
    said = stopped.communicate(timeout=100)[0].decode()

    assert stopped.returncode == 1, said
    assert said.count("another machine took this experiment over") == 1
    assert "Traceback" not in said
    after = {path: content for path, content in object_storage.objects(bucket).items() if path.startswith(("v1/", "studies/"))}
    assert before.items() <= after.items(), "it wrote over what the other one wrote"
    late = after.keys() - before.keys()
    assert len(late) <= 1, "it may have been stopped between the question whether it was taken over and the write, but only once"
    for name, value in object_storage.environment(other).items():
        monkeypatch.setenv(name, value)
    assert board(bucket) == board(undisturbed)
    assert asked_and_told(after, tmp_path / "after") == asked_and_told(before, tmp_path / "before")
    kept = [
        from_table(pq.read_table(pa.BufferReader(content)), path)
        for path, content in after.items()
        if path.startswith("v1/") and path not in late
    ]
    assert sorted(record.unit_key for record in kept) == sorted(record["unit_key"] for record in records(undisturbed))
    assert {record.lease for record in kept} == {1, 2}


def asked_and_told(objects: dict[str, bytes], folder: Path) -> list[tuple[int, str, list[float] | None]]:
    """Number, state and values of every trial, as whoever puts the store's journals together in `folder` reads them."""
    files = Folder(folder)
    for path, content in objects.items():
        files.create(path, content)
    for path in [path for path in objects if path.endswith(".journal")]:
        files.replace(path, whole_journal(files, path))
    return sorted((trial.number, trial.state.name, trial.values) for trial in trials(folder))


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "/data/" not in str(path))


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
