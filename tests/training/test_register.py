"""A student in MLflow's registry is loaded by those who have no kdbench, without unpickling, and predicts what it predicted here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment
from kdbench.results.record import RunRecord
from kdbench.results.store import ResultStore
from kdbench.results.tracking import MlflowTracker, tracking_uri
from kdbench.training.export import deployed
from tests.console import Kdbench

EXPERIMENT = {
    "name": "tiny",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 60, "test": 80, "target": "class"}, "val_size": 10},
    "students": [{"name": "cifar_resnet8", "width": 4}],
    "methods": ["none", "label_smoothing"],
    "recipe": {"epochs": 1, "batch_size": 10, "precision": "fp32", "memory_format": "contiguous"},
    "seeds": 1,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunRecord]]:
    folder = tmp_path_factory.mktemp("tracked")
    assert run(Experiment.model_validate(EXPERIMENT), folder, Unwatched(), MlflowTracker(tracking_uri(folder), "tiny")).failures == ()
    return folder, ResultStore(folder).scan(role="final")


def test_a_registered_student_loads_and_serves_a_prediction(
    kdbench: Kdbench, results: tuple[Path, list[RunRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import mlflow.pytorch
    from fastapi.testclient import TestClient
    from mlflow import MlflowClient
    from mlflow.pyfunc import scoring_server

    folder, (record, other) = results
    ended = kdbench("export", record.run_id, "--register", "small-student", "--results", folder)
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"models:/small-student/1 is new, at {tracking_uri(folder)}\n")
    assert "input: float32 images 3x32x32 in [0, 1], any number of them\noutput: 5 for each image\n" in ended.out
    assert list(Path.cwd().iterdir()) == []

    network, images, _ = deployed(record, folder)
    with torch.no_grad():
        expected = network(images)
    mlflow.set_tracking_uri(tracking_uri(folder))
    try:
        loaded = mlflow.pytorch.load_model("models:/small-student/1")
        for count in (1, 7, 64):
            torch.testing.assert_close(loaded(images[:count]), expected[:count])
        served = mlflow.pyfunc.load_model("models:/small-student/1")
        client = TestClient(scoring_server.init(served))
        answer = client.post("/invocations", json={"inputs": images[:3].tolist()})
        np.testing.assert_allclose(np.array(answer.json()["predictions"]), expected[:3].numpy(), rtol=1e-4, atol=1e-4)
    finally:
        mlflow.set_tracking_uri(None)

    (version,) = MlflowClient(tracking_uri(folder)).search_model_versions("name = 'small-student'")
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
    kdbench: Kdbench, results: tuple[Path, list[RunRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from kdbench.training import register

    folder, (record, _) = results
    loaded = register._loaded
    monkeypatch.setattr(register, "_loaded", lambda *given: loaded(*given) * 1.1)
    ended = kdbench("export", record.run_id, "--register", "wrong", "--results", folder)
    assert ended.code == 1
    assert "model wrong was not written: on 64 test images its predictions differ" in ended.err
    gone = record.model_copy(update={"run_id": "01GONE", "unit_key": "gone", "artifacts_uri": "students/gone/student.safetensors"})
    ResultStore(folder).append(gone)
    ended = kdbench("export", "01GONE", "--register", "wrong", "--results", folder)
    assert ended.code == 2
    assert "are gone" in ended.err
    assert MlflowClient(tracking_uri(folder)).search_model_versions("name = 'wrong'") == []


def test_a_run_that_was_not_tracked_gets_an_mlflow_run_when_it_is_registered(
    kdbench: Kdbench, results: tuple[Path, list[RunRecord]]
) -> None:
    from mlflow import MlflowClient

    folder, (record, _) = results
    ResultStore(folder).append(record.model_copy(update={"run_id": "01UNTRACKED", "unit_key": "untracked", "mlflow_run_id": None}))
    for said in ("is new", "was registered before"):
        ended = kdbench("export", "01UNTRACKED", "--register", "untracked", "--results", folder)
        assert ended.out.startswith(f"models:/untracked/1 {said}"), ended.err
    client = MlflowClient(tracking_uri(folder))
    (version,) = client.search_model_versions("name = 'untracked'")
    assert client.get_run(version.run_id).data.tags["kdbench.key"] == "registered/untracked"
