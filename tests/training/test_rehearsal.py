"""A rehearsal leaves no trace, takes the smallest micro-batch that training has, and is cheap because it takes no larger one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.experiment import Experiment, Recipe, WorkerRange
from kdbench.methods import METHODS
from kdbench.models.build import build_model
from kdbench.models.taps import tap_shapes
from kdbench.tasks.build import build_task
from kdbench.tasks.classification import Classification
from kdbench.training.rehearsal import Rehearsal, check_sees_all, smallest_micro_batch
from tests.bad_input.odd_networks import Draws

SHAPES: dict[str, Any] = {
    "name": "rehearsed",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 60, "test": 20, "target": "class"}, "val_size": 20},
    "teacher": {"model": "tiny_cnn"},
    "students": ["tests.bad_input.odd_networks:Draws"],
    "methods": ["none", "kd", "fitnet"],
    "recipe": {"batch_size": 20, "ema": 0.9, "augment": {"crop": 2, "mixup": 0.2}},
}


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def test_networks_and_generators_stay_exactly_as_they_were() -> None:
    experiment = Experiment.model_validate(SHAPES)
    task = build_task(experiment.task)
    assert experiment.teacher is not None
    student, teacher = task.build_model(experiment.students[0]), task.build_model(experiment.teacher.model)
    student.train()
    teacher.eval()
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in (student, teacher)]
    assert isinstance(student, Draws)
    steps, flags, drawn = student.steps, [m.training for m in student.modules()], generators()
    ours, theirs = tap_shapes(student, task.info.example), tap_shapes(teacher, task.info.example)
    rehearsal = Rehearsal(experiment, task, [experiment.recipe], torch.device("cpu"))
    rehearsal.teacher(teacher, theirs)
    student.steps = steps
    assert rehearsal.student(experiment.students[0], student, ours, theirs, teacher) == ()
    assert generators() == drawn
    assert [m.training for m in student.modules()] == flags
    assert not any(m.training for m in teacher.modules())
    for network, kept in zip((student, teacher), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("batches", "cuts", "workers", "images", "fewest"),
    [
        ([10], [4], 1, 1000, 1),
        ([10], [3], 1, 1000, 2),
        ([128], [1], 1, 1000, 128),
        ([128], [1], 4, 1000, 32),
        ([128], [1], 1, 50, 50),
        ([10], [1], WorkerRange(min=1, max=4), 1000, 2),
        ([64, 8], [1], 1, 1000, 8),
        ([64, 8], [1, 8], 1, 1000, 1),
    ],
)
def test_the_smallest_micro_batch_is_the_last_part_of_the_smallest_share(
    batches: list[int], cuts: list[int], workers: int | WorkerRange, images: int, fewest: int
) -> None:
    recipes = [Recipe(batch_size=batch) for batch in batches] + [Recipe(batch_size=batches[0], accumulate=cut) for cut in cuts]
    assert smallest_micro_batch(recipes, workers, images) == fewest


def test_every_method_is_rehearsed_and_one_that_needs_the_teachers_network_is_left_out_without_it() -> None:
    experiment = Experiment.model_validate(SHAPES | {"students": ["tiny_cnn"], "methods": ["kd", "srrl"], "recipe": {"batch_size": 20}})
    task = build_task(experiment.task)
    student = task.build_model(experiment.students[0])
    rehearsal = Rehearsal(experiment, task, [experiment.recipe], torch.device("cpu"))
    theirs = tap_shapes(student, task.info.example)
    assert "srrl" in METHODS
    assert rehearsal.student(experiment.students[0], student, theirs, theirs, None) == ("srrl",)
    assert rehearsal.student(experiment.students[0], student, theirs, theirs, student) == ()


@pytest.mark.parametrize("padding", [0, "valid"])
def test_patches_of_ones_own_network_must_divide_the_image(padding: Any) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 8, 8, padding), nn.Flatten(), nn.LazyLinear(2))
    check_sees_all("own", network, (1, 32, 24))
    network = nn.Sequential(nn.Conv2d(1, 4, 8, 8, padding), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(UserError, match="never sees 2 rows and 3 columns of each; use patches of 2 or 17 pixels"):
        check_sees_all("own", network, (1, 34, 27))


@pytest.mark.parametrize(("name", "side"), [("resnet18", 33), ("convnext_atto", 32), ("cifar_resnet8", 29), ("inception_v3", 96)])
def test_convolutions_that_overlap_leave_nothing_out(name: str, side: int) -> None:
    from kdbench.models.build import ModelSpec

    spec = ModelSpec(name=name)
    check_sees_all(name, build_model(spec, num_classes=2, in_channels=3, image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3), (3, side, side))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", r"beginning the stage 'head' fails: .*no such head"),
        ("frozen", r"`begin` of the stage 'head' leaves nothing that learns"),
        ("nan", r"in a first training step in the stage 'head', its loss .*itself is nan"),
    ],
)
def test_a_fault_of_a_later_stage_is_found_too(fault: str, said: str) -> None:
    methods = [{"name": "tests.training.own_methods:Broken", "label": "broken", "fault": fault}]
    experiment = Experiment.model_validate(SHAPES | {"students": ["tests.training.own_methods:PlainNet"], "methods": methods})
    task = build_task(experiment.task)
    assert experiment.teacher is not None
    theirs = tap_shapes(task.build_model(experiment.teacher.model), task.info.example)
    rehearsal = Rehearsal(experiment, task, [experiment.recipe], torch.device("cpu"))
    network = task.build_model(experiment.students[0])
    ours = tap_shapes(network, task.info.example)
    with pytest.raises(UserError, match=rf"^method 'broken' with student .*{said}"):
        rehearsal.student(experiment.students[0], network, ours, theirs, None)


def test_a_method_with_stages_is_rehearsed_in_each_and_leaves_no_trace() -> None:
    student = "tests.training.own_methods:NormedNet"
    experiment = Experiment.model_validate(SHAPES | {"students": [student], "methods": ["tests.training.own_methods:FreshHead"]})
    task = build_task(experiment.task)
    assert experiment.teacher is not None
    network, teacher = task.build_model(experiment.students[0]), task.build_model(experiment.teacher.model)
    before, drawn = {name: tensor.clone() for name, tensor in network.state_dict().items()}, generators()
    ours, theirs = (tap_shapes(one, task.info.example) for one in (network, teacher))
    Rehearsal(experiment, task, [experiment.recipe], torch.device("cpu")).student(experiment.students[0], network, ours, theirs, teacher)
    assert generators() == drawn
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


class CountsLabels(Classification):
    """Its `weight` says nothing of what distillation is a mean over."""

    @property
    def counts_samples(self) -> bool:
        return False

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": torch.tensor(len(batch))}


@pytest.mark.parametrize(("recipe", "workers"), [({"accumulate": 2}, 1), ({}, 2)])
def test_a_count_that_is_missing_is_told_before_anything_is_trained(recipe: dict[str, Any], workers: int) -> None:
    asked = SHAPES | {"students": ["tiny_cnn"], "recipe": {"batch_size": 20, **recipe}, "runtime": {"workers": workers}}
    experiment = Experiment.model_validate({**asked, "methods": ["none", "kd"]})
    task = CountsLabels(build_task(experiment.task).options)
    assert experiment.teacher is not None
    student, teacher = task.build_model(experiment.students[0]), task.build_model(experiment.teacher.model)
    rehearsal = Rehearsal(experiment, task, [experiment.recipe], torch.device("cpu"))
    shapes = [tap_shapes(network, task.info.example) for network in (student, teacher)]
    with pytest.raises(UserError, match="the task's `weight` says nothing of 'imitation'; it has: cross_entropy"):
        rehearsal.student(experiment.students[0], student, shapes[0], shapes[1], teacher)
