"""The command `kdbench run` in a process of its own, which a test may kill, and what is on record in its results folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

# What differs between two runs of the same trainings: names, and how long things took on a machine that does other things too.
MEASURED = ("device_hours", "latency_ms_p50")
UNREPEATABLE = ("run_ids", "pareto", *MEASURED)
Moment = Callable[[Path], bool]  # of a results folder


def start(experiment: Path, results: Path | str, environment: dict[str, str] | None = None, *options: str) -> subprocess.Popen[bytes]:
    """In a process group of its own."""
    command = [sys.executable, "-m", "kdbench.cli", "run", str(experiment), "--results", str(results), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=os.environ | (environment or {}), process_group=0, **pipes)


def finish(experiment: Path, results: Path | str, environment: dict[str, str] | None = None, *options: str) -> str:
    """What the command said, which must succeed."""
    process = start(experiment, results, environment, *options)
    try:
        output = process.communicate(timeout=400)[0].decode()
    finally:
        process.kill()  # so that one that hangs ends with its test
    assert process.returncode == 0, output
    return output


def kill_when(experiment: Path, results: Path, moment: Moment) -> str:
    return kill_once(start(experiment, results), lambda: moment(results))


def kill_once(process: subprocess.Popen[bytes], it_is_time: Callable[[], bool]) -> str:
    """What the process had said when it was killed."""
    limit = time.monotonic() + 400
    try:
        while not it_is_time():
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < limit, "the moment never came"
            time.sleep(0.01)
    finally:
        process.kill()
    return process.communicate()[0].decode()


def records(results: Path) -> list[dict[str, Any]]:
    return [pq.ParquetFile(path).read().to_pylist()[0] for path in sorted((results / "v1").rglob("*.parquet"))]


def board(results: Path | str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "kdbench.cli", "leaderboard", "--format", "json", "--results", str(results)]
    boards = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["boards"]
    for row in (row for found in boards for row in found["rows"]):
        for key in UNREPEATABLE:
            row.pop(key)
        for key in ("pareto_sure", "pareto_off"):
            row[key] = [cost for cost in row[key] if cost not in MEASURED]
    return boards


def trials(results: Path) -> list[optuna.trial.FrozenTrial]:
    found = []
    for journal in sorted((results / "studies").glob("*.journal")):
        storage = JournalStorage(JournalFileBackend(str(journal)))
        for study in optuna.get_all_study_names(storage):
            found += optuna.load_study(study_name=study, storage=storage).trials
    return found


def in_teacher(results: Path) -> bool:
    """In this moment and the next two, what is named has begun and is not over."""
    return any((results / "checkpoints").rglob("*.pt")) and not records(results)


def in_search(results: Path) -> bool:
    # each trial that ends adds one line of this kind to its study's journal
    return any('"epochs"' in path.read_text() for path in (results / "studies").glob("*.journal"))


def in_finals(results: Path) -> bool:
    return sum(record["role"] == "final" for record in records(results)) >= 1
