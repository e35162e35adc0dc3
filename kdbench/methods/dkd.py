"""Decoupled knowledge distillation, DKD (Zhao et al., CVPR 2022, arXiv 2203.08679)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.kd import softened_divergence
from kdbench.methods.logits import hard_labels, label_logits, other_logits, require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def target_class_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """TCKD = T^2 mean KL(b_t || b_s), with b = (p_y, 1 - p_y) at temperature T: the label against all other classes together.

    student, teacher: logits [B, C]; target: int64 [B], or soft [B, C] of which the largest entry counts.
    Returns a scalar in nats, float32 or wider.
    """
    student, teacher = loss_precision(student, teacher)
    labels = hard_labels(target)
    margin_s, margin_t = _label_margin(student / temperature, labels), _label_margin(teacher / temperature, labels)
    label = margin_t.sigmoid() * (F.logsigmoid(margin_t) - F.logsigmoid(margin_s))
    rest = (-margin_t).sigmoid() * (F.logsigmoid(-margin_t) - F.logsigmoid(-margin_s))
    return temperature**2 * (label + rest).mean()


def nontarget_class_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """NCKD = T^2 mean KL(n_t || n_s), with n the softmax at temperature T over the classes beside the label; 0 for two classes.

    Shapes as in `target_class_loss`.
    """
    labels = hard_labels(target)
    return softened_divergence(other_logits(student, labels), other_logits(teacher, labels), temperature)


def _label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)) [B]: both logarithms follow from it without a subtraction that could cancel."""
    return label_logits(logits, labels) - other_logits(logits, labels).logsumexp(dim=1)


class DKD(Method):
    """Weigh what the teacher says about the label and about the other classes apart from each other.

    The authors raise the loss from 0 in the first 20 of 240 epochs. Counted in epochs, that would never end in a run of 20;
    here it is the same share of any training.
    """

    paper = Paper(
        "Decoupled Knowledge Distillation",
        arxiv="2203.08679",
        venue="CVPR 2022",
        formula="L = w_task CE + min(1, progress / warmup) (alpha TCKD + beta NCKD);  KD = TCKD + (1 - p_y) NCKD",
        checked_against="megvii-research/mdistiller@a08d46f",
    )

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; the authors choose beta by pair, 2 to 8, and 0.5 with temperature 1 on ImageNet."""

        temperature: Annotated[float, Range(1.0, 4.0, log=True), Field(gt=0)] = 4.0
        alpha: Annotated[float, Field(ge=0)] = 1.0  # 1 in all of the authors' settings
        beta: Annotated[float, Range(0.5, 10.0, log=True), Field(ge=0)] = 8.0
        warmup_share: Annotated[float, Field(ge=0, le=1)] = 20 / 240

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("dkd", student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        params, strength = self.params, at.ramp(self.params.warmup_share)
        return {
            "tckd": strength * params.alpha * target_class_loss(s.logits, t.logits, batch.labels, params.temperature),
            "nckd": strength * params.beta * nontarget_class_loss(s.logits, t.logits, batch.labels, params.temperature),
        }

    def warmup_epochs(self, total_epochs: float) -> float:
        return self.params.warmup_share * total_epochs
