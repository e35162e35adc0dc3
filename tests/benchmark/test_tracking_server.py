"""An MLflow server that stops to answer, or dies, in the middle of a run: trainings go on; what it missed is sent when it is back, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kdbench import tracking
from kdbench.benchmark import emptying
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tracking import MlflowTracker
from tests.training.gloo import free_port

EXPERIMENT = Experiment.model_validate(
    {
        "name": "away",
        "task": {"name": "classification", "data": "fashion_mnist", "val_size": 200, "transfer_size": 100},
        "teacher": {"model": "tiny_cnn", "recipe": {"epochs": 1, "batch_size": 500}},
        "students": [{"name": "tiny_cnn", "width": 2}],
        "methods": ["none", "kd"],
        "recipe": {"epochs": 2, "batch_size": 50, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "search": {"trials": 2, "sampler": "random", "scheduler": "none", "top_k": 1, "also": {"recipe.lr": {"low": 0.01, "high": 0.1}}},
        "seeds": 2,
        "control_seeds": 2,
    }
)


class Server:
    """`mlflow server` over one database, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.log = f"http://127.0.0.1:{free_port()}", folder / "log"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2]]
        self._command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, process_group=0)

    def wait(self) -> None:
        while True:
            assert self._process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        server.wait()
        yield server
    finally:
        server.signal(signal.SIGKILL)


class Watch(Unwatched):
    """Takes the server away with a signal when the first training has ended, and lets a stopped one go on, or not, when all have."""

    def __init__(self, server: Server, taken_by: signal.Signals = signal.SIGSTOP, comes_back_after: int = 0) -> None:
        self.server, self.taken_by, self.comes_back_after = server, taken_by, comes_back_after
        self.ended, self.notes = 0, list[str]()

    def finished(self, unit: Unit, record: RunRecord) -> None:
        self.ended += 1
        if self.ended == 1:
            self.server.signal(self.taken_by)
        if self.ended == self.comes_back_after:
            self.server.signal(signal.SIGCONT)

    def note(self, text: str) -> None:
        self.notes.append(text)


def shown(uri: str) -> list[tuple[str, str, bool, int]]:
    """Name, status, whether it is under another one, and epochs of every run."""
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("away").experiment_id])
    return sorted(
        (run.info.run_name, run.info.status, "mlflow.parentRunId" in run.data.tags, len(client.get_metric_history(run.info.run_id, "lr")))
        for run in runs
    )


@pytest.mark.slow
def test_what_a_server_missed_while_it_did_not_answer_is_sent_when_it_does_and_nothing_twice(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emptying, "needs_ray", lambda *_: False)
    for name, value in tracking.ENVIRONMENT.items():  # which a tracker would set for good
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    results, tracker = tmp_path / "results", partial(MlflowTracker, server.uri, "away")

    # It is away from the end of the teacher, the first of 9 trainings, to the end of the last.
    watch = Watch(server, comes_back_after=9)
    summary = run(EXPERIMENT, results, watch, tracker())
    assert (summary.failures, summary.trained) == ((), 9)
    assert not [note for note in watch.notes if "MLflow" in note]
    children = [f"{label} {what}" for label in ("kd", "none") for what in ("seed 0", "seed 1", "trial 0", "trial 1")]
    parents = [("kd · tiny_cnn", "FINISHED", False, 0), ("none · tiny_cnn", "FINISHED", False, 0)]
    teacher = ("teacher tiny_cnn", "FINISHED", False, 1)
    expected = [*parents, teacher, *((name, "FINISHED", True, 2) for name in children)]
    assert shown(server.uri) == sorted(expected)

    # It is killed, and is not there again until the run has ended.
    more = EXPERIMENT.model_copy(update={"seeds": 4, "control_seeds": 4})
    watch = Watch(server, taken_by=signal.SIGKILL)
    assert run(more, results, watch, tracker()).trained == 4
    assert watch.notes[-1] == (
        "MLflow lacks 3 of the finished trainings, as it could not be reached; the same command sends those that are on record"
    )
    server.start()
    server.wait()
    for _ in range(2):
        assert run(more, results, Watch(server), tracker()).trained == 0
        expected += [(f"{label} {seed}", "FINISHED", True, 2) for label in ("kd", "none") for seed in ("seed 2", "seed 3")]
        assert shown(server.uri) == sorted(set(expected))
    keys = [record.unit_key for record in ResultStore(results).scan()]
    assert len(keys) == len(set(keys)) == 9
