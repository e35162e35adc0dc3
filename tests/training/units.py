"""Small units to train in tests: two classes of generated shapes would be quicker still, but real images are what users have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.experiment import TeacherRef, Unit
from kdbench.models.build import ModelSpec
from kdbench.results.layout import Layout
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.checkpoint import save_weights
from kdbench.training.teacher import load_teacher
from kdbench.training.teacher_cache import build_cache

TASK = {"name": "classification", "data": "fashion_mnist", "transfer_size": 300}
STUDENT = {"name": "tests.training.units:smooth_net"}
TEACHER = {"name": "tiny_cnn", "width": 8}


class SmoothNet(nn.Module):
    """A few smooth layers without batch statistics: what differs between one worker and two is then the exchange of gradients alone."""

    def __init__(self, num_classes: int, in_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(in_channels, 6, 5, stride=4), nn.GELU(), nn.Dropout(dropout), nn.Flatten())
        self.head = nn.LazyLinear(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def smooth_net(num_classes: int, in_channels: int, dropout: float = 0.0) -> nn.Module:
    model = SmoothNet(num_classes, in_channels, dropout)
    model(torch.zeros(1, in_channels, 28, 28))
    return model


def unit(method: str | dict[str, Any] = "none", teacher: TeacherRef | None = None, **changes: Any) -> Unit:
    recipe = {"epochs": 2, "batch_size": 60, "lr": 0.1, "precision": "fp32", "memory_format": "contiguous"} | changes.pop("recipe", {})
    return Unit.model_validate(
        {
            "role": "final",
            "experiment": "test",
            "protocol_hash": "protocol",
            "split_hash": "split",
            "task": TASK,
            "student": STUDENT,
            "teacher": teacher,
            "method": method,
            "recipe": recipe,
            "seed": 0,
            "checkpoint_seconds": 1e9,
            **changes,
        }
    )


def saved_teacher(folder: Path, precision: str = "fp32", model: Mapping[str, Any] = TEACHER) -> TeacherRef:
    """An untrained but fixed teacher on disk."""
    torch.manual_seed(7)
    task = build_task(TaskSpec.model_validate(TASK))
    spec = ModelSpec.model_validate(model)
    weights = folder / "teacher.safetensors"
    sha = save_weights(task.build_model(spec).state_dict(), weights)
    return TeacherRef(model=spec, weights=weights, sha=sha, precision=precision)


def with_cache(ref: TeacherRef, unit_: Unit, folder: Path) -> TeacherRef:
    """The teacher with the cached outputs that the unit's views need."""
    task = build_task(unit_.task)
    device = torch.device("cpu")
    for _ in build_cache(folder, load_teacher(ref, task, device), ref, task.splits(), unit_.recipe, unit_.data_seed, device):
        pass
    return ref.model_copy(update={"cache": folder})


def layout(folder: Path) -> Layout:
    return Layout(folder)
