"""The teacher as training sees it: called with a batch it gives outputs, live or from the cache."""

from __future__ import annotations

import torch
from torch import nn

from kdbench.data.batch import Batch
from kdbench.experiment import TeacherRef
from kdbench.models.outputs import Outputs
from kdbench.models.taps import Taps
from kdbench.tasks.base import Task
from kdbench.training.precision import autocast, place
from kdbench.training.teacher_cache import TeacherCache, open_cache


def load_teacher(ref: TeacherRef, task: Task, device: torch.device) -> nn.Module:
    """The frozen network: weights read strictly, eval mode, no gradients. Raises UserError where the weights don't fit the data."""
    model = task.build_model(ref.model.model_copy(update={"weights": ref.weights}))
    return place(model, ref.precision, ref.memory_format, device).eval().requires_grad_(False)


class LiveTeacher:
    """Runs the network for every batch: for methods that look inside it, and for views that never repeat."""

    def __init__(self, model: nn.Module, taps: tuple[str, ...], precision: str) -> None:
        self.model = model
        self.precision = precision
        self._taps = Taps(model, taps)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        with autocast(self.precision, batch.inputs.device):
            return self._taps(batch.inputs)


Teacher = LiveTeacher | TeacherCache


def open_teacher(ref: TeacherRef, task: Task, taps: tuple[str, ...], device: torch.device) -> Teacher:
    """The cached teacher where there is a cache and no tap is asked for, else the live one."""
    if ref.cache is not None and not taps:
        return open_cache(ref.cache)
    return LiveTeacher(load_teacher(ref, task, device), taps, ref.precision)
