"""One short training of a method as a user would start it, watched: what it moves, and what it must leave alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench.methods.base import Progress
from kdbench.training import loop
from kdbench.training.loop import Training, prepare
from kdbench.training.precision import autocast
from kdbench.training.session import LocalSession
from kdbench.training.teacher import LiveTeacher
from tests.training.units import layout, saved_teacher, unit

STUDENT = {"name": "tiny_cnn", "width": 6}


def check_training(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """Train two epochs on the method's defaults.

    Losses stay finite, every weight of the method moves, the method's own terms reach the student's first layer, the teacher is as it was,
    and the file has a plain student's keys.
    """
    runs: list[tuple[Training, dict[str, Tensor]]] = []

    def watched(*args: Any) -> Training:
        run = prepare(*args)
        runs.append((run, copied(run.distiller.method)))
        return run

    monkeypatch.setattr(loop, "prepare", watched)
    asked = unit({"name": method}, saved_teacher(folder), student=STUDENT)
    record = loop.fit(asked, LocalSession(), layout(folder))
    ((run, before),) = runs
    assert len(record.curve) == 2
    assert all(math.isfinite(value) for row in record.curve for value in row.values())
    assert all(not torch.equal(before[name], weight) for name, weight in run.distiller.method.named_parameters())
    assert load_file(layout(folder).student(asked.key)).keys() == run.task.build_model(asked.student).state_dict().keys()
    if isinstance(run.teacher, LiveTeacher):
        assert not run.teacher.model.training
        original = load_file(saved_teacher(folder).weights)
        assert all(torch.equal(value, original[name]) for name, value in run.teacher.model.state_dict().items())
    reached = torch.autograd.grad(own_loss(run), list(run.distiller.student.layer1.parameters()))
    assert all(gradient.isfinite().all() and gradient.count_nonzero() for gradient in reached)
    return run


def own_loss(run: Training) -> Tensor:
    """What the method adds to the task's loss, for the first batch of a training that is over."""
    batch = next(iter(run.loader.batches(0)))
    teacher = run.teacher(batch) if run.teacher is not None else None
    terms = run.distiller(batch, teacher, Progress(1.0, 5, 10), autocast("fp32", batch.inputs.device))
    return terms["total"] - terms["cross_entropy"]


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
