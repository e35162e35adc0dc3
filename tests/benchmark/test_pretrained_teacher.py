"""A teacher with timm's weights as they are: kept in a file, measured, never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment
from kdbench.records.store import ResultStore

EXPERIMENT: dict[str, Any] = {
    "name": "given",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 64, "test": 32, "target": "class"}, "val_size": 16},
    "teacher": {"model": {"name": "test_resnet", "pretrained": True}, "weights": "pretrained"},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 16, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}


def test_a_pretrained_teacher_is_measured_as_it_is_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **keys: create(*args, **keys | {"pretrained": False}))  # no network here
    experiment = Experiment.model_validate(EXPERIMENT)
    first = run(experiment, tmp_path, Unwatched())
    again = run(experiment, tmp_path, Unwatched())
    assert (first.trained, again.trained) == (3, 0)  # a teacher that is measured counts as one
    assert len(list((tmp_path / "teachers").rglob("*.safetensors"))) == 1
    records = ResultStore(tmp_path).scan()
    assert len({record.teacher_sha for record in records if record.method == "kd"}) == 1
    (teacher,) = [record for record in records if record.role == "teacher"]
    assert not teacher.curve
