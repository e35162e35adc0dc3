"""MLflow shows what was stored, once a key, whatever was killed before; and where it can't, training goes on.

One database serves all tests: making one takes seconds. Three processes make it at once, which is a test of its own.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdbench import tracking
from kdbench.tracking import Facts, MlflowTracker, NoTracker, metric_name, tracking_uri

WRITER = """
import sys
from kdbench.tracking import MlflowTracker
uri, who = sys.argv[1:]
tracker = MlflowTracker(uri, "together")
parent = tracker.parent("parent " + who, "parent-" + who, {})
for number in range(5):
    assert tracker.log_run(parent, f"run {number}", f"{who}-{number}", curve=[{"epoch": e, "loss": 1 / (e + 1)} for e in range(20)])
tracker.close_parent(parent)
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A results folder whose database three processes made and wrote to at the same time."""
    folder = tmp_path_factory.mktemp("results")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    uri = f"sqlite:///{folder}/mlflow.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, uri, who], env=environment, stderr=subprocess.PIPE, text=True) for who in "abc"
    ]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    return folder


@pytest.fixture(autouse=True)
def own_environment(monkeypatch) -> None:
    """What tracking sets as defaults is set by the test instead, so that it ends with it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tracker(folder, request) -> MlflowTracker:
    """A tracker in an experiment of the test's own."""
    return MlflowTracker(tracking_uri(folder), request.node.name)


@pytest.fixture
def client(folder):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def runs(client, experiment: str) -> list:
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["attributes.start_time ASC"])


def test_three_processes_in_a_new_database_lose_nothing(folder, client) -> None:
    found = runs(client, "together")

    assert {run.data.tags["kdbench.key"] for run in found} == {f"{w}-{n}" for w in "abc" for n in range(5)} | {f"parent-{w}" for w in "abc"}
    assert all(run.info.status == "FINISHED" for run in found)
    for run in found:
        if "parent" not in run.info.run_name:
            assert len(client.get_metric_history(run.info.run_id, "loss")) == 20


def test_a_finished_training_reads_back_whole(tracker, client, folder, tmp_path) -> None:
    (tmp_path / "student.safetensors").write_bytes(b"weights")
    parent = tracker.parent("quick", "experiment", {"kdbench.experiment": "quick"})

    run_id = tracker.log_run(
        parent,
        "kd seed 0",
        "unit-1",
        [{"epoch": 1, "loss": 0.5, "val/top1": 80.0}, {"epoch": 2, "loss": 0.25, "val/top1": 85.0}],
        Facts(
            params={"temperature": 2.0, "taps": ["stage:-1"], "long": "x" * 10_000},
            metrics={"recall@5": 99.0, "a=b": math.nan, "rate": math.inf},
            tags={"kdbench.role": "final"},
            artifacts=[tmp_path / "student.safetensors"],
            texts={"config.yaml": "name: quick\n"},
        ),
    )
    tracker.close_parent(parent)

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "kd seed 0"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["kdbench.role"] == "final"
    assert run.data.tags["kdbench.infinite"] == "rate"
    assert run.data.params["temperature"] == "2.0"
    assert run.data.params["taps"] == "['stage:-1']"
    assert len(run.data.params["long"]) == 6000
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "val/top1")] == [(1, 80.0), (2, 85.0)]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "recall_5")] == [(2, 99.0)]
    assert math.isnan(run.data.metrics["a_b"])
    assert math.isnan(run.data.metrics["rate"])
    assert {file.path for file in client.list_artifacts(run_id)} == {"student.safetensors", "config.yaml"}
    assert (folder / "mlartifacts" / run_id / "artifacts" / "config.yaml").read_text() == "name: quick\n"
    assert client.get_run(parent).info.status == "FINISHED"


def test_a_finished_run_is_not_written_twice(tracker, client, request) -> None:
    first = tracker.log_run(None, "run", "unit", facts=Facts(metrics={"top1": 1.0}))

    assert tracker.log_run(None, "run", "unit", facts=Facts(metrics={"top1": 2.0})) == first
    assert [run.data.metrics for run in runs(client, request.node.name)] == [{"top1": 1.0}]


def test_what_a_killed_process_left_open_is_replaced(tracker, client, folder, request) -> None:
    parent = tracker.parent("experiment", "parent", {})
    left = tracker.live(parent, "run", "unit")
    left.log({"loss": 9.0}, 1)  # the process is killed here

    restarted = MlflowTracker(tracking_uri(folder), request.node.name)
    assert restarted.parent("experiment", "parent", {}) == parent
    run_id = restarted.log_run(parent, "run", "unit", curve=[{"epoch": 1, "loss": 0.5}])

    found = runs(client, request.node.name)
    assert [(run.info.run_id, run.info.status) for run in found] == [(parent, "RUNNING"), (run_id, "FINISHED")]
    assert run_id != left.run_id
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == [0.5]


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_ends_as_it_ended(tracker, client, status) -> None:
    assert client.get_run(tracker.log_run(None, "run", status, facts=Facts(status=status))).info.status == status


def test_a_closed_parent_opens_again_with_its_experiment(tracker, client) -> None:
    parent = tracker.parent("experiment", "it's", {})
    tracker.close_parent(parent, "FAILED")

    assert tracker.parent("experiment", "it's", {}) == parent
    assert client.get_run(parent).info.status == "RUNNING"


def test_a_live_run_sends_at_most_every_ten_seconds_and_the_rest_at_the_end(tracker, client, monkeypatch) -> None:
    now = 1e6
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    run = tracker.live(None, "run", "live")

    def stored() -> int:
        return len(client.get_metric_history(run.run_id, "loss"))

    run.log({"loss": 1.0}, 1)
    assert stored() == 0
    now += 11
    run.log({"loss": 0.5}, 2)
    assert stored() == 2
    run.log({"loss": 0.25}, 3)
    assert stored() == 2
    assert run.finish() == run.run_id
    assert stored() == 3
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_more_than_one_call_can_take_is_split(tracker, client) -> None:
    curve = [{"epoch": epoch, "loss": float(epoch), "lr": 0.1} for epoch in range(900)]
    facts = Facts(params={f"p{n}": n for n in range(250)}, tags={f"t{n}": "x" for n in range(120)})
    run_id = tracker.log_run(None, "run", "big", curve, facts)

    run = client.get_run(run_id)
    assert len(client.get_metric_history(run_id, "loss")) == 900
    assert len(run.data.params) == 250
    assert {f"t{n}" for n in range(120)} <= run.data.tags.keys()


def test_a_missing_artifact_is_a_warning_and_the_run_still_ends(tracker, client, tmp_path, caplog) -> None:
    run_id = tracker.log_run(None, "run", "lost", facts=Facts(metrics={"top1": 1.0}, artifacts=[tmp_path / "nowhere"]))

    assert client.get_run(run_id).info.status == "FINISHED"
    assert "nowhere" in caplog.text


def test_a_deleted_experiment_is_restored(tracker, client, folder, request) -> None:
    tracker.log_run(None, "run", "before")
    client.delete_experiment(client.get_experiment_by_name(request.node.name).experiment_id)

    assert MlflowTracker(tracking_uri(folder), request.node.name).log_run(None, "run", "after") is not None


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db", "bogus://x"])
def test_an_unreachable_mlflow_warns_once_and_training_goes_on(uri, caplog, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MlflowTracker(uri, "x")

    with caplog.at_level(logging.WARNING, "kdbench"):
        assert tracker.parent("p", "k", {}) is None
        tracker.close_parent(None)
        assert tracker.log_run(None, "run", "k", curve=[{"epoch": 1, "loss": 1.0}]) is None
        live = tracker.live(None, "run", "k")
        live.log({"loss": 1.0}, 1)
        assert live.finish() is None
        assert not tracker.answers()

    assert len([r for r in caplog.records if r.name.startswith("kdbench")]) == 1
    assert uri in caplog.text


def test_what_a_live_run_logged_while_mlflow_was_away_is_sent_when_it_is_back(tracker, client, monkeypatch) -> None:
    now = 1e6
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    run = tracker.live(None, "run", "away")
    connection, tracker._connection = tracker._connection, None
    with monkeypatch.context() as away:
        away.setattr(tracking, "_connect", lambda *_: 1 / 0)
        for epoch in (1, 2):
            now += 11
            run.log({"loss": 1 / epoch}, epoch)
    assert tracker.silent
    now += 11
    run.log({"loss": 0.25}, 3)
    assert client.get_metric_history(run.run_id, "loss") == []
    assert run.finish(Facts(params={"p": 1})) is None  # it would have a gap
    assert client.get_run(run.run_id).info.status == "RUNNING"

    tracker._connection = connection
    assert tracker.answers()
    assert run.finish(Facts(params={"p": 1})) == run.run_id
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "loss")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert client.get_run(run.run_id).data.params == {"p": "1"}


def test_a_server_that_comes_back_is_used_again(tracker, monkeypatch) -> None:
    now = 1e6
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    assert tracker.attempt(lambda *_: 1 / 0) is None
    assert tracker.attempt(lambda *_: "quiet") is None
    now += 301

    assert tracker.attempt(lambda *_: "again") == "again"


def test_no_tracker_takes_every_call() -> None:
    tracker = NoTracker()
    live = tracker.live(None, "run", "k")
    live.log({"loss": 1.0}, 1)

    assert tracker.parent("p", "k", {}) is None
    assert not tracker.answers()
    assert tracker.log_run(None, "run", "k", curve=[{"epoch": 1, "loss": 1.0}], facts=Facts(status="FAILED")) is None
    assert live.finish(Facts(status="KILLED", metrics={"a": 1.0})) is None


def test_the_address_is_the_variable_or_a_database_in_the_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("results") == f"sqlite:///{tmp_path}/results/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri("results") == "http://server:5000"


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [("val/top1", "val/top1"), ("a=b@c", "a_b_c"), ("/x//../y", "x/y"), ("", "_"), ("n" * 300, "n" * 250), ("mIoU %", "mIoU _")],
)
def test_names_are_made_acceptable(name, cleaned) -> None:
    assert metric_name(name) == cleaned


def test_records_and_boards_import_neither_torch_nor_pandas_nor_mlflow() -> None:
    modules = ["records.store", "boards.leaderboard", "boards.published", "report.rendering", "tracking"]
    code = f"import sys; {'; '.join(f'import kdbench.{m}' for m in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert {"torch", "pandas", "mlflow", "ray", "rich", "scipy"} & set(loaded) == set()
