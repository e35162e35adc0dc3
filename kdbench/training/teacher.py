"""The teacher as training sees it: called with a batch it gives outputs, live or from the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import Columns
from kdbench.errors import UserError
from kdbench.experiment import Recipe, TeacherRef
from kdbench.models.batch_norm import guard_batch_norms
from kdbench.models.outputs import Outputs
from kdbench.models.taps import Taps
from kdbench.models.weights import inherited, state_sha256
from kdbench.storage.layout import Layout
from kdbench.storage.working_copy import fetch
from kdbench.tasks.base import Task
from kdbench.tasks.build import build_task
from kdbench.tasks.networks import as_teacher
from kdbench.training.cache.copies import bring
from kdbench.training.cache.outputs import TeacherCache, open_cache, read_entry, streams_of
from kdbench.training.precision import autocast, placed_inputs, to_device


def teacher_here(ref: TeacherRef, layout: Layout) -> TeacherRef:
    """A teacher with the places of its files as they are on this machine; what is in a working copy is fetched when it is opened."""
    cache = layout.here(ref.cache) if ref.cache is not None else None
    return ref.model_copy(update={"weights": layout.here(ref.weights), "cache": cache})


def tensors_for(student: nn.Module, label: str, ref: TeacherRef, task: Task) -> dict[str, Tensor]:
    """What a student with `weights: teacher` begins with, on the CPU: see `models.weights.inherited`. The student stays as it is.

    Raises UserError where nothing agrees, and as `load_teacher` does.
    """
    return inherited(student, _loaded(ref, _own_task(ref, task)).state_dict(), name=label, of=ref.model.label)


def load_teacher(ref: TeacherRef, task: Task, device: torch.device) -> nn.Module:
    """The frozen network: weights read strictly, eval mode, no gradients; of another task, as batches of `task` go into it.

    Raises UserError where the weights don't fit the data.
    """
    own = _own_task(ref, task)
    model = _loaded(ref, own)
    if own is not task:
        model = as_teacher(model, own, task)
    guard_batch_norms(model)  # a method's gradients may flow through a part of it
    return to_device(model, ref.precision, ref.memory_format, device).eval().requires_grad_(False)


def _own_task(ref: TeacherRef, task: Task) -> Task:
    return task if ref.task is None else build_task(ref.task)


def _loaded(ref: TeacherRef, own: Task) -> nn.Module:
    # Its initial weights are drawn only to be overwritten: a training draws the same numbers whether it loads the teacher or not.
    with torch.random.fork_rng(devices=[]):
        model = own.build_model(ref.model.model_copy(update={"weights": fetch(ref.weights, sha256=ref.sha)}))
    if ref.state is not None and state_sha256(model) != ref.state:
        raise UserError(f"the teacher's weights, {ref.weights}, are others here than where the run began: give all machines the same file")
    return model


class LiveTeacher:
    """Runs the network for every batch: for methods that look inside it, and for views that never repeat."""

    def __init__(self, model: nn.Module, task: Task, taps: tuple[str, ...], precision: str, memory_format: str = "contiguous") -> None:
        """task: says what a teacher is shown of a batch.

        precision, memory_format: what the model was placed with; a student's batch comes in its own.
        """
        self.model = model
        self.task = task
        self.precision = precision
        self.memory_format = memory_format
        self._taps = Taps(model, taps)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        with autocast(self.precision, batch.index.device):
            return self._taps(self._inputs(batch))

    @torch.no_grad()
    def kept(self, batch: Batch) -> Columns:
        """What the task keeps of the network's answers in evaluation."""
        with autocast(self.precision, batch.index.device):
            return self.task.kept(self.task.predict(self.model, self._inputs(batch)))

    def _inputs(self, batch: Batch) -> Columns:
        return placed_inputs(self.task.inputs_for("teacher", batch.inputs), self.precision, self.memory_format)


Teacher = LiveTeacher | TeacherCache


def open_teacher(ref: TeacherRef, task: Task, taps: tuple[str, ...], device: torch.device, recipe: Recipe, data_seed: int) -> Teacher:
    """The cached teacher where all that is asked for is in the cache, else the live one.

    recipe, data_seed: what decides the views that the training sees.
    """
    cached = _cached(ref.cache, taps, recipe, data_seed) if ref.cache is not None else None
    if cached is not None:
        return replace(cached, reading=task.reading(ref.model))
    return LiveTeacher(load_teacher(ref, task, device), task, taps, ref.precision, ref.memory_format)


def _cached(folder: Path, taps: tuple[str, ...], recipe: Recipe, data_seed: int) -> TeacherCache | None:
    bring(folder, streams_of(taps))
    entry = read_entry(folder)
    return open_cache(folder, taps) if entry is not None and entry.shows(recipe, data_seed) else None
