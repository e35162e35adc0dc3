"""The undistilled student: the control that every method is compared with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Method, Paper, Progress
from kdbench.models.outputs import Outputs


class Undistilled(Method):
    """Add nothing: the student learns from the task's own loss."""

    paper = Paper("No distillation", formula="L = L_task")
    reads = MAPS_ALONE
    needs_teacher = False
    needs_labels = False

    class Params(Method.Params):
        task_weight: Annotated[float, Field(ge=0)] = 1.0  # no Range: a lone loss has no weight to search beside the learning rate

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return {}
