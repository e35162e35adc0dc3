"""Normalized knowledge distillation, NKD (Yang et al., ICCV 2023, arXiv 2303.13005)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.kd import softened_cross_entropy
from kdbench.methods.logits import hard_labels, label_logits, other_logits, require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def target_loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """-mean p_y log q_y, without a temperature: cross-entropy weighted by what the teacher gives the label.

    student, teacher: logits [B, C]; target: int64 [B], or soft [B, C] of which the largest entry counts. No gradient through p_y.
    Returns a scalar in nats, float32 or wider.
    """
    student, teacher = loss_precision(student, teacher)
    labels = hard_labels(target)
    confidence = label_logits(F.softmax(teacher, dim=1), labels).detach()
    return -(confidence * label_logits(F.log_softmax(student, dim=1), labels)).mean()


def nontarget_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 mean cross-entropy between the two distributions over the classes beside the label, each normalised to sum to 1.

    Shapes as in `target_loss`. It does not depend on the label's own logits, and is 0 for two classes.
    """
    labels = hard_labels(target)
    return softened_cross_entropy(other_logits(student, labels), other_logits(teacher, labels), temperature)


class NKD(Method):
    """Match the teacher's probability of the label and, separately, how it ranks the other classes."""

    paper = Paper(
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels",
        arxiv="2303.13005",
        venue="ICCV 2023",
        formula="L = w_task CE - p_y log q_y - gamma T^2 sum_{c != y} P_c log Q_c,  P, Q = softmax(z_t / T), softmax(z_s / T) without y",
        checked_against="yzd-v/cls_KD@1e5d48f",
    )

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; ImageNet: temperature 1, gamma 1.5 (CNN) or 1 (DeiT)."""

        temperature: Annotated[float, Range(1.0, 4.0, log=True), Field(gt=0)] = 3.0
        gamma: Annotated[float, Range(0.5, 5.0, log=True), Field(ge=0)] = 3.5

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("nkd", student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        return {
            "target": target_loss(s.logits, t.logits, batch.labels),
            "nontarget": self.params.gamma * nontarget_loss(s.logits, t.logits, batch.labels, self.params.temperature),
        }
