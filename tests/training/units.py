"""Small units to train in tests: two classes of generated shapes would be quicker still, but real images are what users have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.experiment import CacheOptions, TeacherRef, Unit
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.cells import CellReading
from kdbench.records.record import RunRecord
from kdbench.storage.layout import Layout
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.cache.build import Builder, build_here
from kdbench.training.cache.outputs import CacheSpec
from kdbench.training.checkpoint import save_weights
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession, State
from tests.each_task import EACH_TASK, RECIPE

TASK = {"name": "classification", "data": "fashion_mnist", "transfer_size": 300}
STUDENT = {"name": "tests.training.units:smooth_net"}
PIXELS = {"name": "segmentation", "data": {"name": "shapes", "train": 160, "test": 40, "size": 16}, "val_size": 40}
# crops and erased rectangles bring in pixels that count nowhere, many in one image and few in the next
PIXEL_RECIPE = {"precision": "fp64", "batch_size": 20, "augment": {"crop": 6, "erase": 0.5}}
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


def dense_net(num_classes: int, in_channels: int) -> nn.Module:
    """Logits for each pixel, without batch statistics."""
    return nn.Sequential(nn.Conv2d(in_channels, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, num_classes, 3, padding=1))


def yes_or_no_net(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """A logit for each class, without batch statistics."""
    features = nn.Sequential(nn.Conv2d(in_channels, 6, 5, stride=4), nn.GELU(), nn.Flatten())
    return nn.Sequential(features, nn.Linear(6 * ((image_size - 5) // 4 + 1) ** 2, num_classes))


class PlainDetector(nn.Module):
    """Raw levels of strides 4 and 8, without batch statistics."""

    level_modules = ("fine", "coarse")

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.reading = CellReading(num_classes, (4, 8))
        self.fine, self.coarse = nn.Conv2d(in_channels, 8, 4, stride=4), nn.Conv2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(8, num_classes + 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = torch.nn.functional.gelu(self.fine(images))
        return {"level:0": self.head(fine), "level:1": self.head(self.coarse(fine))}


class PairNet(nn.Module):
    """Embeddings of an image and of its words; with dropout and batch statistics where asked."""

    def __init__(self, in_channels: int, image_size: int, vocabulary: int, dropout: float = 0.0, batch_statistics: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(6) if batch_statistics else nn.Identity()
        self.image = nn.Sequential(nn.Conv2d(in_channels, 6, 8, stride=8), norm, nn.GELU(), nn.Dropout(dropout), nn.Flatten())
        self.image_head = nn.Linear(6 * (image_size // 8) ** 2, 8)
        self.words, self.dropout, self.text_head = nn.Embedding(vocabulary, 8), nn.Dropout(dropout), nn.Linear(8, 8)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        words = self.dropout(self.words(inputs["tokens"]).mean(1))
        return {"image": self.image_head(self.image(inputs["image"])), "text": self.text_head(words)}


def unit(method: str | dict[str, Any] = "none", teacher: TeacherRef | None = None, **changes: Any) -> Unit:
    recipe = {"epochs": 2, "batch_size": 60, "lr": 0.1, "precision": "fp32", "memory_format": "contiguous"} | changes.pop("recipe", {})
    return Unit.model_validate(
        {
            "role": "final",
            "experiment": "test",
            "protocol_hash": "protocol",
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


def pixel_unit(method: str | dict[str, Any], folder: Path, **recipe: Any) -> Unit:
    """A small segmentation in float64 with a teacher, which is written to `folder`."""
    teacher = saved_teacher(folder, "fp64", {"name": "tiny_fcn"}, PIXELS)
    student = {"name": "tests.training.units:dense_net"}
    return unit(method, teacher, task=PIXELS, student=student, recipe={**PIXEL_RECIPE, **recipe})


def unit_of(task: str, method: str | dict[str, Any], folder: Path, **changes: Any) -> Unit:
    """A small training in float64 on a task, of a student without batch statistics, with a teacher, which is written to `folder`."""
    tiny = EACH_TASK[task]
    teacher = saved_teacher(folder, "fp64", tiny.teacher, tiny.task)
    recipe = {**RECIPE, "precision": "fp64", **changes.pop("recipe", {})}
    return unit(method, teacher, **{"task": tiny.task, "student": tiny.smooth, "recipe": recipe, **changes})


def saved_teacher(
    folder: Path, precision: str = "fp32", model: dict[str, Any] | None = None, of_task: Mapping[str, Any] = TASK
) -> TeacherRef:
    """An untrained but fixed teacher on disk."""
    torch.manual_seed(7)
    task = build_task(TaskSpec.model_validate(of_task))
    spec = ModelSpec.model_validate(model or TEACHER)
    weights = folder / "teacher.safetensors"
    sha = save_weights(task.build_model(spec).state_dict(), weights)
    return TeacherRef(model=spec, weights=weights, sha=sha, precision=precision)


def with_cache(ref: TeacherRef, unit_: Unit, folder: Path, taps: tuple[str, ...] = (), options: dict[str, Any] | None = None) -> TeacherRef:
    """The teacher with the cached outputs that the unit's views and the taps need."""
    spec = CacheSpec(
        teacher=ref, task=unit_.task, recipe=unit_.recipe, data_seed=unit_.data_seed, options=CacheOptions.model_validate(options or {})
    )
    builder = Builder(spec, folder, torch.device("cpu"))
    plan = builder.plan([taps])
    builder.begin(plan)
    for _ in build_here(builder, plan):
        pass
    builder.finish(plan)
    return ref.model_copy(update={"cache": folder})


def layout(folder: Path) -> Layout:
    return Layout(folder)


class Killed(Exception):
    pass


class DyingSession(LocalSession):
    """Dies right after it has kept a training's state for the `kill_after`-th time."""

    def __init__(self, checkpoint: Path, kill_after: int) -> None:
        super().__init__(checkpoint)
        self.left = kill_after

    def report(self, metrics: Mapping[str, float], state: Callable[[], State] | None) -> None:
        super().report(metrics, state)
        self.left -= state is not None
        if not self.left:
            raise Killed


def killed_and_continued(of: Unit, folder: Path, kill_after: int) -> RunRecord:
    """The record of a training that dies with `DyingSession`, and goes on in a process with other random numbers."""
    checkpoint = folder / "checkpoint.pt"
    with pytest.raises(Killed):
        fit(of, DyingSession(checkpoint, kill_after), layout(folder))
    torch.manual_seed(12345)
    return fit(of, LocalSession(checkpoint), layout(folder))
