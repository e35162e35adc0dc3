"""Weighted soft label distillation, WSLD (Zhou et al., ICLR 2021, arXiv 2102.00650)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.logits import require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_EPSILON = 1e-7  # nats, added to the teacher's cross-entropy


def weighted_soft_label_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 mean_b w_b H(softmax(teacher / T), softmax(student / T)), with w = 1 - exp(-CE(student) / CE(teacher)); no gradient through w.

    student, teacher: logits [B, C]; target: int64 [B] or soft [B, C]. The cross-entropies with the target in w are at temperature 1.
    Returns a scalar in nats, float32 or wider.
    """
    student, teacher = loss_precision(student, teacher)
    log_q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return temperature**2 * (sample_weights(student, teacher, target) * -(p * log_q).sum(dim=1)).mean()


def sample_weights(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """[B] in 0 .. 1: near 1 where the teacher knows the label far better than the student does, 0 where the student is sure of it."""
    labels = target.to(student.dtype) if target.is_floating_point() else target
    ours, theirs = (F.cross_entropy(logits.detach(), labels, reduction="none") for logits in (student, teacher))
    return -(-ours / (theirs + _EPSILON)).expm1()


class WSLD(Method):
    """Weigh each sample's soft label by how much better than the student the teacher knows the label.

    Checked against two ports; the authors' own code was not run. As in both, the teacher's entropy is not subtracted.
    """

    paper = Paper(
        "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective",
        arxiv="2102.00650",
        venue="ICLR 2021",
        formula="L = w_task CE + weight T^2 mean_b w_b H(p_t^T, p_s^T),  w_b = stop_grad(1 - exp(-CE_s / CE_t))",
        checked_against="yzd-v/cls_KD@1e5d48f, open-mmlab/mmrazor@90c7af1",
    )

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; ImageNet: temperature 2, weight 2.5."""

        weight: Annotated[float, Range(0.2, 5.0, log=True), Field(ge=0)] = 2.25
        temperature: Annotated[float, Range(1.0, 8.0, log=True), Field(gt=0)] = 4.0

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("wsld", student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        return {"wsld": self.params.weight * weighted_soft_label_loss(s.logits, t.logits, batch.labels, self.params.temperature)}
