"""Tasks of several tensors from their YAML to files that ship: every command that knows of inputs or predictions takes several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlflow.pytorch
import onnxruntime
import pytest
import torch

from kdbench.data.columns import Columns, named, several
from kdbench.data.loader import in_order
from kdbench.experiment import Experiment
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tasks.build import build_task
from kdbench.training.checkpoint import unpack_predictions
from kdbench.yaml12 import load
from tests.conftest import Kdbench

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray")]

RECIPE = "{epochs: 2, batch_size: 12, lr: 0.01, precision: fp32, memory_format: contiguous, augment: {crop: 2}, views: 2}"


class Case(NamedTuple):
    """An experiment, and what its board, its exported graph and its records say. kept: a stored tensor that follows from the graph."""

    experiment: str
    board: str
    primary: str
    inputs: str
    outputs: str
    kept: str


CASES = {
    "detection": Case(
        f"""
name: boxes
task: {{name: detection, data: {{name: shapes, target: boxes, size: 32, train: 60, test: 12}}, val_size: 12, transfer_size: 24}}
teacher: {{model: {{name: tiny_fcos, width: 6}}, recipe: {{epochs: 2}}}}
students: [{{name: tiny_fcos, width: 4}}]
methods: [none, kd, {{name: mgd, student_taps: ["level:0"], teacher_taps: ["level:0"]}}]
recipe: {RECIPE}
search: {{trials: 2, scheduler: none}}
seeds: 2
""",
        "detection on shapes: tiny_fcos -> tiny_fcos",
        "ap, higher is better",
        "input: float32 images 3x32x32, any number of them, in [0, 1]",
        "output: logits 80x5, boxes 80x4 for each image",
        "scores",
    ),
    "image_text": Case(
        f"""
name: captions
task: {{name: image_text, data: {{name: shapes, target: caption, size: 32, train: 60, test: 12}}, val_size: 12, transfer_size: 24}}
teacher: {{model: {{name: tiny_towers, width: 12}}, recipe: {{epochs: 2}}}}
students: [{{name: tiny_towers, width: 8, depth: 1}}]
methods: [none, kd, {{name: fitnet, student_taps: [image.blocks.0], teacher_taps: [image.blocks.0]}}]
recipe: {RECIPE}
search: {{trials: 2, scheduler: none}}
seeds: 2
""",
        "image_text on shapes: tiny_towers -> tiny_towers",
        "recall_at_1, higher is better",
        "input: float32 image 3x32x32, any number of them, in [0, 1], which the graph normalises; int64 tokens 13, any number of them",
        "output: image 32, text 32 for each image",
        "text",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_is_searched_ranked_verified_and_exported(kdbench: Kdbench, name: str) -> None:
    case = CASES[name]
    Path("experiment.yaml").write_text(case.experiment)
    planned = kdbench("run", "experiment.yaml", "--dry-run")
    assert planned.code == 0, planned.err
    ended = kdbench("run", "experiment.yaml", "--results", "results")
    assert ended.code == 0, ended.err
    folder = Path("results").absolute()
    records = ResultStore(folder).scan()
    finals = [record for record in records if record.role == "final"]
    assert len(finals) == 6
    assert [record.agreement for record in finals if record.agreement is None] == []
    ranked = kdbench("leaderboard", "--results", folder)
    assert case.board in ranked.out
    assert case.primary in ranked.out
    verified = kdbench("verify", "--results", folder)
    assert verified.code == 0, verified.out + verified.err
    again = kdbench("run", "experiment.yaml", "--results", folder)
    assert again.code == 0
    assert len(ResultStore(folder).scan()) == len(records)
    _exported(kdbench, folder, next(record for record in finals if record.label not in ("none", "kd")), case)


def _exported(kdbench: Kdbench, folder: Path, record: RunRecord, case: Case) -> None:
    """The graph takes and gives every tensor by name, for any number of samples; the stored predictions follow from what it gives."""
    assert kdbench("export", record.run_id, "--results", folder).code == 0
    written = kdbench("export", record.run_id, "--format", "onnx", "--output", "network.onnx", "--results", folder)
    assert written.code == 0, written.err
    assert case.inputs in written.out
    assert case.outputs in written.out
    task = build_task(Experiment.model_validate(load(case.experiment)).task)
    inputs: Columns = next(in_order(task.splits().test, 100)).inputs
    session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in named(inputs, "images").items()})
    found: dict[str, Any] = {
        name: torch.from_numpy(array) for name, array in zip((name.removesuffix("_output") for name in names), arrays, strict=True)
    }
    assert record.predictions_uri is not None
    stored, _ = unpack_predictions((folder / record.predictions_uri).read_bytes())
    kept = several(task.kept(found))[case.kept]
    torch.testing.assert_close(kept, several(stored)[case.kept].float(), atol=2e-3, rtol=2e-3)
    registered = kdbench("export", record.run_id, "--register", "network", "--results", folder)
    if isinstance(inputs, dict):
        assert registered.code == 2
        assert "MLflow traces networks of one input, this one has image, tokens; use --format onnx" in registered.err
        return
    assert registered.code == 0, registered.err
    mlflow.set_tracking_uri(registered.out.partition(", at ")[2].split("\n")[0])
    with torch.no_grad():
        served = mlflow.pytorch.load_model("models:/network/1")(inputs)
    for key, tensor in found.items():
        torch.testing.assert_close(served[key], tensor, rtol=1e-4, atol=1e-3)
