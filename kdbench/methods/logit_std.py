"""Logit standardisation (Sun et al., CVPR 2024, arXiv 2403.01427)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.kd import softened_divergence
from kdbench.methods.logits import require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_EPSILON = 1e-7


def standardised(logits: Tensor) -> Tensor:
    """Each row of logits [B, C] less its mean, over its deviation (unbiased, of C - 1 degrees of freedom); float32 or wider.

    A row of equal logits becomes 0; the gradient there is finite, but steep, as for any row with a small deviation.
    """
    (logits,) = loss_precision(logits)
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + _EPSILON)


class LogitStandardisation(Method):
    """Knowledge distillation on z-scores: the student learns how the teacher's logits lie to each other, not how large they are."""

    paper = Paper(
        "Logit Standardization in Knowledge Distillation",
        arxiv="2403.01427",
        venue="CVPR 2024",
        formula="L = w_task CE + w_kd T^2 KL(softmax(z(t) / T) || softmax(z(s) / T)),  z(x) = (x - mean x) / std x",
    )
    needs_labels = False

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; for other pairs the authors suggest temperatures of 2 to 3 and weights of 3 to 15."""

        task_weight: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.1
        kd_weight: Annotated[float, Range(1.0, 20.0, log=True), Field(ge=0)] = 9.0
        temperature: Annotated[float, Range(1.0, 6.0, log=True), Field(gt=0)] = 2.0

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("logit_std", student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        loss = softened_divergence(standardised(s.logits), standardised(t.logits), self.params.temperature)
        return {"kd": self.params.kd_weight * loss}
