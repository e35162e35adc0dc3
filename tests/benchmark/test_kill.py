"""What else becomes of a run whose command is killed or stopped; `test_tasks.py` kills it in every phase, on every task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdbench.records.record import from_table
from kdbench.storage.folder import Folder
from kdbench.storage.journals import whole_journal
from tests.drivers import board, finish, in_finals, records, start, trials
from tests.object_storage import ObjectStorage

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "kill.yaml"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    finish(EXPERIMENT, results)
    return results


@pytest.mark.nodes
@pytest.mark.timeout(600)
def test_a_command_that_was_stopped_for_longer_than_a_lease_writes_nothing_more_when_it_goes_on(
    undisturbed: Path, tmp_path: Path, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, one, other = object_storage.new_bucket(), tmp_path / "one", tmp_path / "other"
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "4")
    stopped = start(EXPERIMENT, bucket, object_storage.environment(one))
    limit = time.monotonic() + 200
    while b'"epochs"' not in object_storage.journals(bucket):
        assert stopped.poll() is None, stopped.communicate()[0].decode()
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGSTOP)
    try:
        finish(EXPERIMENT, bucket, object_storage.environment(other))
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
