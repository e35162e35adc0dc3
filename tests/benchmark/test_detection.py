"""A detection experiment from its YAML to files that ship: every command that knows of predictions takes several tensors."""

from __future__ import annotations

from pathlib import Path

import mlflow.pytorch
import numpy as np
import onnxruntime
import pytest
import torch

from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.checkpoint import unpack_predictions
from tests.conftest import Kdbench

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray")]

EXPERIMENT = """
name: boxes
task: {name: detection, data: {name: shapes, target: boxes, size: 32, train: 60, test: 12}, val_size: 12, transfer_size: 24}
teacher: {model: {name: tiny_fcos, width: 6}, recipe: {epochs: 2}}
students: [{name: tiny_fcos, width: 4}]
methods: [none, kd, {name: mgd, student_taps: ["level:0"], teacher_taps: ["level:0"]}]
recipe: {epochs: 2, batch_size: 12, lr: 0.01, precision: fp32, memory_format: contiguous, augment: {crop: 2, flip: true}, views: 2}
search: {trials: 2, scheduler: none}
seeds: 2
"""


@pytest.fixture
def results(kdbench: Kdbench) -> tuple[Path, list[RunRecord]]:
    Path("boxes.yaml").write_text(EXPERIMENT)
    ended = kdbench("run", "boxes.yaml", "--results", "results")
    assert ended.code == 0, ended.err
    return Path("results").absolute(), ResultStore(Path("results")).scan()


def test_a_detection_is_searched_ranked_verified_and_exported(kdbench: Kdbench, results: tuple[Path, list[RunRecord]]) -> None:
    folder, records = results
    finals = [record for record in records if record.role == "final"]
    assert sorted((record.label, record.seed) for record in finals) == [(name, seed) for name in ("kd", "mgd", "none") for seed in (0, 1)]
    assert {record.agreement is None for record in finals if record.label != "none"} == {False}
    assert all(record.teacher_kl is None for record in finals)
    ranked = kdbench("leaderboard", "--results", folder)
    assert "detection on shapes: tiny_fcos -> tiny_fcos" in ranked.out
    assert "ap, higher is better" in ranked.out
    verified = kdbench("verify", "--results", folder)
    assert verified.code == 0, verified.out + verified.err
    again = kdbench("run", "boxes.yaml", "--results", folder)
    assert again.code == 0
    assert len(ResultStore(folder).scan()) == len(records)
    _exported(kdbench, folder, next(record for record in finals if record.label == "mgd"))


def _exported(kdbench: Kdbench, folder: Path, record: RunRecord) -> None:
    """The graph gives both tensors by name, for any number of images, and what the test part's predictions were made of."""
    assert kdbench("export", record.run_id, "--results", folder).code == 0
    written = kdbench("export", record.run_id, "--format", "onnx", "--output", "boxes.onnx", "--results", folder)
    assert written.code == 0, written.err
    assert "input: float32 images 3x32x32, any number of them" in written.out
    assert "output: logits 80x5, boxes 80x4 for each image" in written.out
    session = onnxruntime.InferenceSession("boxes.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "boxes"]
    task = build_task(TaskSpec.model_validate({"name": "detection", **_options()}))
    images = (task.splits().test.pixels.float() / 255).numpy()
    found = {name: torch.from_numpy(array) for name, array in zip(("logits", "boxes"), session.run(None, {"images": images}), strict=True)}
    assert record.predictions_uri is not None
    kept, _ = unpack_predictions((folder / record.predictions_uri).read_bytes())
    assert isinstance(kept, dict)
    best = task.kept(found)
    assert isinstance(best, dict)
    np.testing.assert_allclose(best["scores"].numpy(), kept["scores"].float().numpy(), atol=2e-3)
    registered = kdbench("export", record.run_id, "--register", "boxes", "--results", folder)
    assert registered.code == 0, registered.err
    mlflow.set_tracking_uri(registered.out.partition(", at ")[2].split("\n")[0])
    with torch.no_grad():
        served = mlflow.pytorch.load_model("models:/boxes/1")(torch.from_numpy(images))
    torch.testing.assert_close(served["boxes"], found["boxes"], rtol=1e-4, atol=1e-3)


def _options() -> dict[str, object]:
    data = {"name": "shapes", "target": "boxes", "size": 32, "train": 60, "test": 12}
    return {"data": data, "val_size": 12, "transfer_size": 24}
