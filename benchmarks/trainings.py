"""kdbench's own trainings as the benchmark measures them: units, teachers with random weights, caches, and epochs as arms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import RANDOM_IMAGES
from benchmarks.timing import Arm, arm
from kdbench.experiment import Recipe, TeacherRef, Unit
from kdbench.methods.build import build_method
from kdbench.models.build import ModelSpec
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.assembly import Training, assemble
from kdbench.training.cache.build import Builder, build_here
from kdbench.training.cache.outputs import CacheSpec
from kdbench.training.checkpoint import save_weights
from kdbench.training.loop import train_epoch
from kdbench.training.precision import Memo, settled
from kdbench.training.session import LocalSession

CPU = torch.device("cpu")
# So many epochs that the schedule never ends, and a low learning rate: a network that diverged would be measured on infinities.
RECIPE = {"epochs": 1_000_000, "batch_size": 128, "lr": 0.01, "augment": {"crop": 2, "flip": True}}

Model = str | dict[str, Any]


@dataclass(frozen=True)
class ModelPair:
    """A teacher and a student, and the images that they look at, [channels, size, size]."""

    title: str
    teacher: Model
    student: Model
    channels: int = 3
    size: int = 32
    batch: int = 64


QUICKSTART = ModelPair("quickstart", {"name": "cifar_resnet8", "width": 32, "stem_stride": 2}, "tiny_cnn", 1, 28, 128)
# The pair that the goals of the sweep rest on: a teacher of 1.2 M parameters, a student of 24 k.
BIG_TEACHER = ModelPair("cifar_resnet8 x4 -> tiny_cnn", {"name": "cifar_resnet8", "width": 64, "stem_stride": 2}, "tiny_cnn", 1, 28, 128)


def image_task(pair: ModelPair, train: int, classes: int = 10) -> dict[str, Any]:
    """A classification task on `train` random images for learning, and as few for validation and test as can be."""
    data = {"name": RANDOM_IMAGES, "train": train + 32, "test": 32, "size": pair.size, "channels": pair.channels, "classes": classes}
    return {"name": "classification", "data": data, "val_size": 32}


def unit(task: dict[str, Any], student: Model, method: str | dict[str, Any], teacher: TeacherRef | None = None, **recipe: Any) -> Unit:
    """One training that writes no checkpoints. recipe: what differs from RECIPE."""
    return Unit.model_validate(
        {
            "role": "trial",
            "experiment": "benchmark",
            "protocol_hash": "benchmark",
            "task": task,
            "student": student,
            "teacher": teacher,
            "method": method,
            "recipe": {**RECIPE, "precision": "fp32", "memory_format": "contiguous", **recipe},
            "seed": 0,
            "checkpoint_seconds": 1e9,
        }
    )


def fastest_precision(task: dict[str, Any], model: Model, batch: int, memo: Path) -> dict[str, str]:
    """`precision` and `memory_format` as kdbench's own measurement chooses them for the model."""
    built = build_task(TaskSpec.model_validate(task))
    network = built.build_model(ModelSpec.model_validate(model))
    recipe = settled(Recipe(batch_size=batch, compile=False), network, built.info.example, batch, CPU, Memo(memo))
    return {"precision": recipe.precision, "memory_format": recipe.memory_format}


def random_teacher(folder: Path, task: dict[str, Any], model: Model, **precision: str) -> TeacherRef:
    """A teacher of random weights on disk: it costs what a trained one costs."""
    torch.manual_seed(7)
    built = build_task(TaskSpec.model_validate(task))
    spec = ModelSpec.model_validate(model)
    weights = folder / "teacher.safetensors"
    sha = save_weights(built.build_model(spec).state_dict(), weights)
    return TeacherRef(model=spec, weights=weights, sha=sha, **precision)


def with_cache(ref: TeacherRef, of: Unit, folder: Path) -> TeacherRef:
    """The teacher with its outputs for the unit's images and views on disk, the method's taps among them."""
    builder = Builder(CacheSpec(teacher=ref, task=of.task, recipe=of.recipe, data_seed=of.data_seed), folder, CPU)
    plan = builder.plan([build_method(of.method, None).teacher_taps])
    builder.begin(plan)
    for _ in build_here(builder, plan):
        pass
    builder.finish(plan)
    return ref.model_copy(update={"cache": folder})


def begun(of: Unit) -> Training:
    """The training at its beginning, on one thread."""
    return assemble(of, LocalSession(device=CPU, threads=1))


def epochs(run: Training) -> Arm:
    """An arm that trains one epoch more, in seconds a sample."""

    def one_more() -> None:
        run.step = 0
        train_epoch(run, run.epoch)
        run.epoch += 1

    return arm(one_more, run.loader.steps_per_epoch * run.loader.batch_size)
