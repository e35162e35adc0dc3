"""A storage that refuses writes costs time, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from kdbench.records.store import ResultStore
from tests.console import Kdbench
from tests.object_storage import SECRET, ObjectStorage

TINY = {
    "name": "tiny",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 120, "test": 20, "target": "class"}, "val_size": 20},
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 50, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}
WHOLE = ["final kd", "final none", "teacher teacher"]


@pytest.fixture(autouse=True)
def open_again(object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the driver's own tries would only make the test longer
    yield
    object_storage.gate.refuses = lambda method, path: False


@pytest.fixture
def run(kdbench: Kdbench, bucket: str) -> Callable[..., object]:
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return lambda: kdbench("run", "tiny.yaml", "--results", bucket, "--no-mlflow")


def on_record(bucket: str) -> list[str]:
    return sorted(f"{record.role} {record.label}" for record in ResultStore(bucket).scan())


def refused_from(storage: ObjectStorage, path: str, seconds: float) -> list[str]:
    """Refuse all writes for so long, from the first one to such a path on; what was refused."""
    until, refused = [], []

    def refuses(method: str, target: str) -> bool:
        if path in target and method == "PUT" and not until:
            until.append(time.monotonic() + seconds)
        if method == "PUT" and until and time.monotonic() < until[0]:
            refused.append(target)
            return True
        return False

    storage.gate.refuses = refuses
    return refused


def test_a_run_waits_for_a_storage_that_refuses_its_records_for_a_while(
    run, bucket: str, object_storage: ObjectStorage, caplog: pytest.LogCaptureFixture
) -> None:
    refused = refused_from(object_storage, "/v1/", 3.0)
    ended = run()

    assert ended.code == 0, ended.err
    assert refused
    assert [record.message for record in caplog.records if "it is tried again for up to 600 s" in record.message]
    assert on_record(bucket) == WHOLE


def test_a_run_that_was_taken_over_before_it_puts_a_training_on_record_stops_in_one_line(
    run, bucket: str, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a while in which it was stopped: it does not know yet when it writes next."""
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "3600")
    taken = []

    def take_over(method: str, target: str) -> bool:
        if method == "PUT" and "/students/" in target and not taken:
            taken.append(target)
            object_storage.put(bucket, "locks/tiny.lease/00000002", b"{}")
        return False

    object_storage.gate.refuses = take_over
    ended = run()

    assert taken
    assert (ended.code, ended.err.count("\n")) == (1, 1), ended.err
    assert "tiny: another machine took this experiment over" in ended.err
    assert on_record(bucket) == ["teacher teacher"]
    object_storage.gate.refuses = lambda method, target: False
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "1")
    time.sleep(1)
    assert run().code == 0
    assert on_record(bucket) == WHOLE
    assert sorted({record.lease for record in ResultStore(bucket).scan()}) == [1, 3]


@pytest.mark.parametrize("path", ["/v1/", "/cache/", "/teachers/"])
def test_a_run_that_waited_too_long_says_so_in_one_line_and_the_same_command_goes_on(
    run, bucket: str, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("KDBENCH_STORAGE_PATIENCE", "0.6")
    refused_from(object_storage, path, 3600.0)
    ended = run()
    object_storage.gate.refuses = lambda method, target: False
    before = {record.run_id for record in ResultStore(bucket).scan()}

    assert ended.code == 1
    assert ended.err.startswith(f"kdbench: {bucket} refused for ")
    assert ended.err.endswith("run the same command again when the storage answers\n")
    assert ended.err.count("\n") == 1
    assert SECRET not in ended.err + ended.out
    assert run().code == 0
    assert on_record(bucket) == WHOLE
    assert before <= {record.run_id for record in ResultStore(bucket).scan()}


def test_the_other_commands_work_on_a_bucket(run, kdbench: Kdbench, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run().code == 0
    monkeypatch.setenv("KDBENCH_WORKING_COPIES", str(tmp_path / "another machine"))
    [board] = json.loads(kdbench("leaderboard", "--results", bucket, "--format", "json").out)["boards"]
    run_id = next(row["run_ids"][0] for row in board["rows"] if row["method"] == "kd")

    exported = kdbench("export", run_id, "--results", bucket)
    assert exported.code == 0, exported.err
    assert "largest difference 0.0e+00" in exported.out
    assert "tiny_cnn" in kdbench("cache", "ls", "--results", bucket).out
    assert kdbench("cache", "verify", "--results", bucket).code == 0
    assert kdbench("results", "compact", "--results", bucket).out == "3 records in 1 files, before in 3\n"
    assert json.loads(kdbench("leaderboard", "--results", bucket, "--format", "json").out)["boards"] == [board]
    assert kdbench("doctor", "--results", bucket).out.count(bucket) == 1
    monkeypatch.setenv("KDBENCH_RESULTS", bucket)
    assert run().code == 0
    assert on_record(bucket) == WHOLE


def test_a_run_seals_its_records_at_the_address_and_verify_names_one_that_is_gone(
    run: Callable[..., object], kdbench: Kdbench, bucket: str
) -> None:
    run()
    clean = kdbench("verify", "--results", bucket)
    assert clean.code == 0, clean
    assert (
        "3 with keys derived again (0 can't be), 3 with parameters counted in their weights (0 can't be), 3 as they were sealed"
        in clean.out
    )

    store = ResultStore(bucket)
    [path] = [path for path in store.record_paths() if "/kd/" in path]
    store.files.remove(path)
    ended = kdbench("verify", "--results", bucket)
    assert ended.code == 1
    assert "(kd, seed 0, student tiny_cnn) is missing: kdbench run sealed it, " in ended.out
