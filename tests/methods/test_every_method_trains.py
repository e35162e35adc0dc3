"""Every method of the catalogue trains on Fashion-MNIST images, on its defaults and with a pair that fits it, as a user would start it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench.experiment import TeacherRef, Unit
from kdbench.methods import METHODS
from kdbench.methods.base import Progress
from kdbench.records.record import RunRecord
from kdbench.training import loop
from kdbench.training.assembly import Training, assemble
from kdbench.training.loop import fit
from kdbench.training.precision import autocast
from kdbench.training.session import LocalSession
from kdbench.training.teacher import LiveTeacher
from tests.training.units import TASK, killed_and_continued, layout, saved_teacher, unit

SMALL_CNN: dict[str, Any] = {"name": "tiny_cnn", "width": 6}
CNN: dict[str, Any] = {"name": "tiny_cnn", "width": 8}
VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "depth": 3, "embed_dim": 16, "num_heads": 2}
SMALL_VIT = {**VIT, "embed_dim": 8}
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
}
# student and teacher, where two convolutional networks of unequal width are not what the method is for
DETECTORS: Any = ({"name": "tiny_fcos", "width": 4}, {"name": "tiny_fcos", "width": 6})
PAIRS = {"fgd": DETECTORS, "kdsvd": (CNN, CNN), "ofa": (SMALL_CNN, VIT), "scalekd": (SMALL_CNN, SWIN), "vitkd": (SMALL_VIT, VIT)}
# The task of a method that needs another than classification
SCENES = {"name": "shapes", "target": "boxes", "size": 32, "train": 310, "test": 10}
TASKS: dict[str, dict[str, Any]] = {"fgd": {"name": "detection", "data": SCENES, "val_size": 10}}
RECIPES: dict[str, dict[str, Any]] = {"fgd": {"clip_grad": 1.0}}  # its sums over pyramids are large before a detector learns
TASK_TERMS = {"cross_entropy", "focal", "giou"}
# A softmax, or the batch statistics of the layer behind it, take such a constant out again: it has no gradient.
WITHOUT_GRADIENT = (".attention.k.bias", ".features.0.bias", ".weigh.bias")
EPOCHS, LONGER = 3, {"crd": 8, "vitkd": 8}  # a memory that begins at random, and a transformer without warm-up, need more
LATE = Progress(epoch=8, step=40, total_steps=40)


@dataclass(frozen=True)
class Watched:
    """A finished training, and what it began with."""

    run: Training
    record: RunRecord
    folder: Path
    before: Mapping[str, Tensor]  # weights of student, peers and method
    losses: tuple[float, float]  # all terms on one batch, before and after


def asked(name: str, folder: Path) -> Unit:
    student, teacher = PAIRS.get(name, (SMALL_CNN, CNN))
    task = TASKS.get(name, TASK)
    ref: TeacherRef = saved_teacher(folder, model=teacher, of_task=task)
    recipe = {"epochs": LONGER.get(name, EPOCHS), "lr": 0.02, "schedule": "constant", **RECIPES.get(name, {})}
    return unit({"name": name}, ref, task=task, student=student, recipe=recipe, checkpoint_seconds=0)


@pytest.fixture(scope="module", params=sorted(METHODS))
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp(request.param)
    begun: list[tuple[Training, dict[str, Tensor], float]] = []

    def watching(*args: Any) -> Training:
        run = assemble(*args)
        begun.append((run, copied(run.distiller), late_loss(run)))
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "assemble", watching)
        record = fit(asked(request.param, folder), LocalSession(), layout(folder))
    ((run, before, first),) = begun
    return Watched(run, record, folder, before, (first, late_loss(run)))


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@contextmanager
def late_terms(run: Training) -> Iterator[dict[str, Tensor]]:
    """The terms of the first batch with the weights that they have late in training; the training is as it was afterwards."""
    kept, random, drawn = copied(run.distiller), torch.get_rng_state(), run.generator.get_state()
    batch = next(iter(run.loader.batches(0)))
    teacher = run.teacher(batch) if run.teacher is not None else None
    yield run.distiller(batch, teacher, LATE, autocast("fp32", torch.device("cpu")))
    run.distiller.load_state_dict(kept)
    torch.set_rng_state(random)
    run.generator.set_state(drawn)


def late_loss(run: Training) -> float:
    with late_terms(run) as terms:
        return terms["total"].item()


def test_the_loss_falls(watched: Watched) -> None:
    before, after = watched.losses
    assert after < before
    assert len(watched.record.curve) == watched.run.unit.recipe.epochs
    assert all(math.isfinite(value) for row in watched.record.curve for value in row.values())


def test_every_weight_of_student_and_method_moves(watched: Watched) -> None:
    still = [name for name, weight in watched.run.distiller.named_parameters() if torch.equal(watched.before[name], weight)]
    assert all(name.endswith(WITHOUT_GRADIENT) for name in still), still


def test_what_the_method_adds_reaches_the_students_first_layer(watched: Watched) -> None:
    first = next(weight for weight in watched.run.distiller.student.parameters() if weight.dim() > 1)
    with late_terms(watched.run) as terms:
        if watched.run.unit.method.name == "none":
            assert terms.keys() == {"cross_entropy", "total"}
            return
        added = terms["total"] - sum(term for name, term in terms.items() if name in TASK_TERMS)
        (gradient,) = torch.autograd.grad(added, first)
    assert gradient.isfinite().all()
    assert gradient.count_nonzero()


def test_the_teacher_and_its_buffers_stay_as_they_were(watched: Watched) -> None:
    run = watched.run
    assert (run.teacher is not None) == run.distiller.method.needs_teacher
    if not isinstance(run.teacher, LiveTeacher):
        return
    original = load_file(watched.folder / "teacher.safetensors")
    assert not run.teacher.model.training
    assert all(torch.equal(value, original[name]) for name, value in run.teacher.model.state_dict().items())
    ours = {id(weight) for weight in run.distiller.parameters()}
    assert not ours & {id(weight) for weight in run.teacher.model.parameters()}


def test_what_is_kept_is_a_plain_student(watched: Watched) -> None:
    run = watched.run
    plain = run.task.build_model(run.unit.student)
    plain.load_state_dict(load_file(layout(watched.folder).student(run.unit.key)), strict=True)
    assert watched.record.params_count == sum(weight.numel() for weight in plain.parameters())
    trained = sum(weight.numel() for weight in run.distiller.parameters())
    assert watched.record.adapter_params == trained - watched.record.params_count


def test_a_killed_training_continues_to_the_same_bits(watched: Watched, tmp_path: Path) -> None:
    of = watched.run.unit
    killed_and_continued(of, tmp_path, 7)  # in the midst of the second epoch
    whole, continued = (load_file(layout(folder).student(of.key)) for folder in (watched.folder, tmp_path))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())
