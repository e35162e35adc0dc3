"""Curriculum temperature for knowledge distillation, CTKD (Li et al., AAAI 2023, arXiv 2211.16231)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress
from kdbench.methods.kd import softened_divergence
from kdbench.methods.logits import require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_INITIAL = 1.0  # of the learned number, the authors': with their bounds the temperature starts at 15.6


def with_gradient_scaled(x: Tensor, factor: float) -> Tensor:
    """`x` itself, to the bit; its gradient arrives multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def adversity(progress: float, curriculum: float) -> float:
    """What the temperature's gradient is multiplied by: from 0 down to -1 along half a cosine, as `progress` goes from 0 to `curriculum`.

    At -1 the temperature is raised or lowered to make the student's task as hard as it can be.
    """
    done = min(1.0, progress / curriculum) if curriculum > 0 else 1.0
    return (math.cos(math.pi * done) - 1) / 2


class CTKD(Method):
    """Learn the temperature against the student, more and more so in the course of training.

    One temperature for all samples. The authors' curriculum takes the first 10 of 240 epochs (5 of 100 on ImageNet), a step each epoch;
    here it is the same share of any training, and smooth. The learned number is in the student's optimizer, weight decay included.
    """

    paper = Paper(
        "Curriculum Temperature for Knowledge Distillation",
        arxiv="2211.16231",
        venue="AAAI 2023",
        formula="L = w_task CE + w_kd T^2 KL(softmax(z_t / T) || softmax(z_s / T)),  T = T_0 + span sigmoid(theta), theta ascends",
        checked_against="zhengli97/CTKD@7d52522",
    )
    needs_labels = False

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; ImageNet: both weights 1. The temperature moves between `lowest` and `lowest` + `span`."""

        task_weight: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.1
        kd_weight: Annotated[float, Range(0.1, 1.0), Field(ge=0)] = 0.9
        lowest: Annotated[float, Field(gt=0)] = 1.0
        span: Annotated[float, Range(5.0, 30.0), Field(ge=0)] = 20.0
        curriculum_share: Annotated[float, Range(5 / 240, 40 / 240, log=True), Field(ge=0, le=1)] = 10 / 240

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("ctkd", student, teacher)
        self.theta = nn.Parameter(torch.full((1,), _INITIAL))

    def temperature(self, at: Progress) -> Tensor:
        """The present temperature, a scalar; its gradient for `theta` is turned round as far as the curriculum has come."""
        factor = adversity(at.step / at.total_steps, self.params.curriculum_share)
        (theta,) = with_gradient_scaled(self.theta, factor)
        temperature: Tensor = self.params.lowest + self.params.span * theta.sigmoid()
        return temperature

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        return {"kd": self.params.kd_weight * softened_divergence(s.logits, t.logits, self.temperature(at))}

    def warmup_epochs(self, total_epochs: float) -> float:
        return self.params.curriculum_share * total_epochs
