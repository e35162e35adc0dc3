"""From a board to MLflow and back, in its real pages; and students in its registry, which load and predict without kdbench.

One tiny real run, tracked and published, serves all tests: making MLflow's database and starting its server take seconds each.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.deploy.export import deployed
from kdbench.experiment import Experiment
from kdbench.records.folders import Folders
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.report.files import Report, publish
from kdbench.tracking import ENVIRONMENT, MlflowTracker, interface, tracking_uri
from tests.browser import look_at
from tests.console import Kdbench

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from selenium.webdriver import Chrome

PATIENCE = 60  # seconds for a page of MLflow
EXPERIMENT = {
    "name": "tiny",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 60, "test": 80, "target": "class"}, "val_size": 10},
    "students": [{"name": "cifar_resnet8", "width": 4}],
    "methods": ["none", "label_smoothing"],
    "recipe": {"epochs": 1, "batch_size": 10, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunRecord]]:
    folder = tmp_path_factory.mktemp("tracked")
    tracker = MlflowTracker(tracking_uri(folder), "tiny")
    for _ in range(2):  # the second finds all done, and publishes again
        assert run(Experiment.model_validate(EXPERIMENT), folder, Unwatched(), tracker).failures == ()
        publish(boards(ResultStore(folder).scan()), folder, "tiny", tracker)
    return folder, ResultStore(folder).scan(role="final")


@pytest.fixture
def client(results: tuple[Path, list[RunRecord]]) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(results[0]))


# --- tracking --------------------------------------------------------------------------------------------------------


def test_the_report_and_the_picture_are_artifacts_of_one_run_that_others_lead_to(
    results: tuple[Path, list[RunRecord]], client: MlflowClient
) -> None:
    folder, finals = results
    found = client.search_runs(["1"])
    (board,) = [r for r in found if r.info.run_name == "leaderboard"]
    assert board.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(board.info.run_id)} == {"tiny.html", "tiny.png"}
    kept = folder / "mlartifacts" / board.info.run_id / "artifacts" / "tiny.html"
    assert kept.read_bytes() == (folder / "boards" / "tiny.html").read_bytes()
    assert all(record.mlflow_run_id in kept.read_text() for record in finals)
    page = f"#/experiments/1/runs/{board.info.run_id}/artifacts/tiny.html"
    for record in finals:
        note = client.get_run(record.mlflow_run_id).data.tags["mlflow.note.content"]
        assert f"[leaderboard]({page}) of protocol `{record.protocol_hash}`" in note
        assert f"kdbench export {record.run_id}" in note


def test_a_password_of_the_tracking_server_does_not_get_into_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:8443/base/")
    assert interface(tmp_path).page("ab/c") == "https://mlflow.example:8443/base/#/runs/ab%2Fc"
    assert interface(tmp_path).start is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/mlflow")
    assert "secret" not in str(interface(tmp_path))


# --- the registry ----------------------------------------------------------------------------------------------------


def test_a_registered_student_loads_and_serves_a_prediction(
    kdbench: Kdbench, results: tuple[Path, list[RunRecord]], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import mlflow.pytorch
    from fastapi.testclient import TestClient
    from mlflow.pyfunc import scoring_server

    folder, (record, other) = results
    ended = kdbench("export", record.run_id, "--register", "small-student", "--results", folder)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"models:/small-student/1 is new, at {tracking_uri(folder)}\n")
    assert (
        "input: float32 images 3x32x32, any number of them, in [0, 1], which the graph normalises\noutput: 5 for each image\n" in ended.out
    )
    assert list(Path.cwd().iterdir()) == []

    network, images, _ = deployed(record, folder)
    with torch.no_grad():
        expected = network(images)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(tracking_uri(folder))
    try:
        loaded = mlflow.pytorch.load_model("models:/small-student/1")
        for count in (1, 7, 64):
            torch.testing.assert_close(loaded(images[:count]), expected[:count])
        served = mlflow.pyfunc.load_model("models:/small-student/1")
        answer = TestClient(scoring_server.init(served)).post("/invocations", json={"inputs": images[:3].tolist()})
        np.testing.assert_allclose(np.array(answer.json()["predictions"]), expected[:3].numpy(), rtol=1e-4, atol=1e-4)
    finally:
        mlflow.set_tracking_uri(None)

    (version,) = client.search_model_versions("name = 'small-student'")
    assert version.run_id == record.mlflow_run_id
    assert version.tags["kdbench.run_id"] == record.run_id
    (archive,) = folder.glob("mlartifacts/**/model/data/model.pt2")
    names = zipfile.ZipFile(archive).namelist()
    assert [name for name in names if name.endswith((".pkl", ".pickle"))] == []

    again = kdbench("export", record.run_id, "--register", "small-student", "--results", folder)
    assert again.out.startswith("models:/small-student/1 was registered before")
    second = kdbench("export", other.run_id, "--register", "small-student", "--results", folder)
    assert second.out.startswith("models:/small-student/2 is new")


def test_a_name_that_mlflow_refuses_is_said_in_one_line(kdbench: Kdbench, results: tuple[Path, list[RunRecord]]) -> None:
    folder, (record, _) = results
    ended = kdbench("export", record.run_id, "--register", "a/b:c", "--results", folder)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert "--register a/b:c: MLflow refuses it" in ended.err


def test_a_run_without_weights_or_a_graph_that_differs_is_not_registered(
    kdbench: Kdbench, results: tuple[Path, list[RunRecord]], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdbench.deploy import register

    folder, (record, _) = results
    served = register._traced
    monkeypatch.setattr(register, "_traced", lambda *given: served(*given) * 1.1)
    ended = kdbench("export", record.run_id, "--register", "wrong", "--results", folder)
    assert ended.code == 1
    assert "model wrong was not written: on 64 test samples its predictions differ" in ended.err
    gone = record.model_copy(update={"run_id": "01GONE", "unit_key": "gone", "artifacts_uri": "students/gone/student.safetensors"})
    ResultStore(folder).append(gone)
    ended = kdbench("export", "01GONE", "--register", "wrong", "--results", folder)
    assert ended.code == 2
    assert "are gone" in ended.err
    assert client.search_model_versions("name = 'wrong'") == []


def test_a_run_that_was_not_tracked_gets_an_mlflow_run_when_it_is_registered(
    kdbench: Kdbench, results: tuple[Path, list[RunRecord]], client: MlflowClient
) -> None:
    folder, (record, _) = results
    ResultStore(folder).append(record.model_copy(update={"run_id": "01UNTRACKED", "unit_key": "untracked", "mlflow_run_id": None}))
    for said in ("is new", "was registered before"):
        ended = kdbench("export", "01UNTRACKED", "--register", "untracked", "--results", folder)
        assert ended.out.startswith(f"models:/untracked/1 {said}"), ended.err
    (version,) = client.search_model_versions("name = 'untracked'")
    assert client.get_run(version.run_id).data.tags["kdbench.key"] == "registered/untracked"


# --- MLflow's own pages ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(results: tuple[Path, list[RunRecord]], chromium: Chrome) -> Iterator[str]:
    """The address of MLflow's server on the folder of `results`. After `chromium`: where that is missing, nothing is started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri(results[0]), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1"],
        env=os.environ | ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # ten processes for GenAI jobs
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 2 * PATIENCE
        while not _answers(f"{address}/health"):
            assert server.poll() is None, "MLflow's server ended"
            assert time.monotonic() < until, "MLflow's server does not answer"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it waits for the browser's open connections otherwise
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def found(driver: Chrome, selector: str) -> Any:
    """The first such element, once there is one."""
    until = time.monotonic() + PATIENCE
    while not (elements := driver.find_elements("css selector", selector)):
        assert time.monotonic() < until, f"no {selector} at {driver.current_url}: {driver.execute_script('return document.body.innerText')}"
        time.sleep(0.2)
    return elements[0]


def test_mlflows_page_shows_the_runs_nested_under_their_method(
    chromium: Chrome, pages: str, results: tuple[Path, list[RunRecord]], client: MlflowClient
) -> None:
    _, finals = results
    (record,) = [final for final in finals if final.label == "label_smoothing"]
    parent = client.get_run(record.mlflow_run_id).data.tags["mlflow.parentRunId"]
    look_at(chromium, width=1400, height=1000)
    chromium.get(f"{pages}/#/experiments/1/runs")
    assert "label_smoothing · cifar_resnet8" in found(chromium, f".ag-row[row-id='{parent}']").text
    child = f".ag-row[row-id='{record.mlflow_run_id}']"
    assert chromium.find_elements("css selector", child) == []
    chromium.execute_script("arguments[0].click()", found(chromium, f".ag-row[row-id='{parent}'] button"))
    assert "label_smoothing seed 0" in found(chromium, child).text


def test_one_click_leads_from_the_board_to_the_run_and_one_back(
    chromium: Chrome, pages: str, results: tuple[Path, list[RunRecord]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, finals = results
    record = finals[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", pages)
    look_at(chromium, width=1400, height=1000)
    chromium.get(Report(Folders([folder])).write(tmp_path / "report.html").as_uri())
    chromium.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    found(chromium, f"a[href$='{record.mlflow_run_id}']").click()
    link = found(chromium, "a[href$='/artifacts/tiny.html']")
    assert record.mlflow_run_id in chromium.current_url
    assert link.text == "leaderboard"
    before = chromium.current_window_handle
    link.click()  # MLflow opens links of a description in a tab of their own
    chromium.switch_to.window(next(handle for handle in chromium.window_handles if handle != before))
    chromium.switch_to.frame(found(chromium, "iframe"))
    try:
        assert found(chromium, "h1").text == "Leaderboard"
        assert len(chromium.find_elements("css selector", "table.board tbody tr")) == 2
    finally:
        chromium.close()
        chromium.switch_to.window(before)
