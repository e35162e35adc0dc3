"""Networks as a dry run looks at them: in outline, without memory for their weights, and for real where they are small."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdbench.data.batch import Part
from kdbench.data.columns import Columns, mapped
from kdbench.data.facts import Facts, NotHere
from kdbench.data.sources import NOISE
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.models.build import ModelSpec
from kdbench.models.inputs import model_inputs
from kdbench.models.outputs import Shapes
from kdbench.models.taps import tap_shapes
from kdbench.models.trace import Example, samples
from kdbench.tasks.base import Role, Task
from kdbench.tasks.build import TaskSpec, build_task, task_class
from kdbench.tasks.networks import as_teacher, outlined
from kdbench.tasks.splits import SplitOptions, validation_size
from kdbench.training.cost import counted_flops

META = torch.device("meta")
COUNTED_BATCH = 4  # more than one, as batch norms need it
REAL_PARAMETERS = 30_000_000  # a network up to this size is built for real: to be rehearsed, timed, and given to methods


@dataclass(frozen=True)
class Opened:
    """A task, on its data or on noise that stands in for them, and how many images the real ones have for training."""

    task: Task
    teacher_images: int  # that a teacher of this task learns from
    samples: Part  # what students learn from: labels and positions as they are, or as many of them
    validation_images: int
    stands_in: bool = False

    @property
    def student_images(self) -> int:
        return len(self.samples)


def open_data(experiment: Experiment, spec: TaskSpec, notes: list[str]) -> Opened:
    try:
        task = build_task(spec)
        splits = task.splits()
        return Opened(task, len(splits.learned_by("teacher")), splits.transfer, len(splits.val))
    except NotHere as missing:
        if experiment.runtime.address is None and not missing.downloadable:
            raise
        notes.append(str(missing))
        return _stand_in(spec, missing.facts)


def _stand_in(spec: TaskSpec, facts: Facts) -> Opened:
    given = spec.model_dump(mode="json")
    options = task_class(spec).Options.model_validate({key: value for key, value in given.items() if key != "name"})
    images = students = facts.train
    validation = 0
    changes: dict[str, Any] = {"data": facts.stand_in()}
    if isinstance(options, SplitOptions):
        validation = validation_size(options, facts.train, facts.name)
        images -= validation
        students = options.transfer_size or images
        if students > images and options.transfer != NOISE:
            raise UserError(f"transfer_size {students} is more than the {images} images of data {facts.name!r} that are left for training")
        changes |= {"val_size": 1, "transfer_size": None, "labelled": None if options.labelled is None else 1}
        if options.teacher_classes is not None or options.teacher_share != 1:
            changes |= {"teacher_classes": None, "teacher_share": 0.9}  # the names of classes are not known, but that there is such a part
            shown = facts.classes if options.teacher_classes is None else len(options.teacher_classes)
            images = round(images * shown / facts.classes * options.teacher_share)
    task = build_task(TaskSpec.model_validate(given | changes))
    task.data_name = facts.name
    transfer = task.splits().transfer
    rows = torch.arange(students)
    blank = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(students, -1, -1, -1)
    return Opened(task, images, Part(blank, _targets(transfer, rows, facts), rows, kinds=transfer.kinds), validation, True)


def _targets(transfer: Part, rows: Tensor, facts: Facts) -> Columns | None:
    """Targets of as many samples as there are rows, int64 [N]: labels in turn. Of other targets one stands for all, without its memory."""
    if transfer.target is None:
        return None
    if not transfer.one_label:
        return mapped(transfer.target, lambda values: values[:1].expand(len(rows), *values.shape[1:]))
    return transfer.labels[rows % len(transfer)] if transfer.without_label else rows % facts.classes


@dataclass
class Network:
    """A network as far as it has to be looked at: its shapes and costs without memory, the network itself where that is needed."""

    task: Task
    spec: ModelSpec
    role: Role = "student"
    lacks: str = ""  # what is missing for a rehearsal
    of: Network | None = None  # the network of another task that this one is for `task`

    def seen_by(self, task: Task) -> Network:
        """The network as batches of `task` go into it. Raises UserError where `task` has no use for a network of this one's task."""
        return self if task is self.task else Network(task, self.spec, self.role, self.lacks, self)

    @cached_property
    def outline(self) -> nn.Module:
        """The network without memory for its weights; the real one where its code needs numbers to build or run."""
        if self.of is not None:
            return as_teacher(self.of.outline, self.of.task, self.task)
        return outlined(self.task, self.spec, lambda: self.real)

    @cached_property
    def real(self) -> nn.Module:
        if self.of is not None:
            return as_teacher(self.of.real, self.of.task, self.task)
        return self.task.build_model(self.spec)

    @property
    def params(self) -> int:
        return parameters_of(self.outline)

    @property
    def flops(self) -> float:
        return self.forward_cost[0]

    @property
    def too_large(self) -> str:
        """Why it is looked at in outline alone; empty where it is small."""
        return "" if self.small else f"more than {REAL_PARAMETERS:,} parameters"

    @property
    def small(self) -> bool:
        return self.params <= REAL_PARAMETERS

    @cached_property
    def tap_shapes(self) -> Shapes:
        return tap_shapes(self.outline, self.task.example(self.role))

    @cached_property
    def forward_cost(self) -> tuple[float, float]:
        """FLOPs of a forward pass of one image, and bytes of what training keeps of it."""
        return forward_cost(self.outline, self.task.example(self.role))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def forward_cost(model: nn.Module, example: Example) -> tuple[float, float]:
    """FLOPs of a training-mode forward pass, and bytes that are kept for its backward pass, both a sample."""
    model = copy.deepcopy(model).train()
    inputs = samples(example, COUNTED_BATCH, device=_device(model))
    with counted_flops() as counter, saved_for_backward() as kept:
        model(model_inputs(model, inputs))
    return counter.get_total_flops() / COUNTED_BATCH, sum(kept.values()) / COUNTED_BATCH


@contextmanager
def saved_for_backward() -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for the backward pass, and their bytes. Weights, which are there anyway, are left out."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's number is given to another one

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def parameters_of(*modules: nn.Module) -> int:
    """Parameters of all of them together, one that several share counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
