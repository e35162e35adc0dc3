"""Knowledge distillation (Hinton, Vinyals & Dean, 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.logits import labelled_pixels, mean_over, require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import Imitation, TaskInfo


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float | Tensor, valid: Tensor | None = None) -> Tensor:
    """T^2 mean KL(softmax(teacher / T) || softmax(student / T)), over samples or pixels; T^2 keeps the gradient's scale (section 2).

    student, teacher: logits [B, C] or [B, C, H, W]; valid: None or boolean [B, H, W], the pixels that count.
    Returns a scalar in nats, float32 or wider, 0 where the two agree up to a constant.
    """
    student, teacher = loss_precision(student, teacher)
    log_q, log_p = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * mean_over((log_p.exp() * (log_p - log_q)).sum(dim=1), valid)


def softened_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """As `softened_divergence` without the teacher's entropy: the same gradient, but T^2 H(teacher) where the two agree (cls_KD's form)."""
    student, teacher = loss_precision(student, teacher)
    log_q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return temperature**2 * mean_over(-(p * log_q).sum(dim=1), valid)


FORMS = {"kl": softened_divergence, "cross_entropy": softened_cross_entropy}


class KD(Method):
    """Match the teacher's softened class probabilities, beside the labels; or what the task says plain distillation is on it."""

    paper = Paper(
        "Distilling the Knowledge in a Neural Network",
        arxiv="1503.02531",
        venue="NIPS 2014 workshop",
        formula="L = w_task CE(q, y) + w_kd T^2 KL(softmax(z_t / T) || softmax(z_s / T))",
        checked_against="megvii-research/mdistiller@a08d46f, HobbitLong/RepDistiller@b84f547; form cross_entropy: yzd-v/cls_KD@1e5d48f",
    )
    reads = frozenset({"class logits", "pixel logits", "imitation"})
    weighs_as_task = frozenset({"kd"})
    needs_labels = False

    class Params(Method.Params):
        task_weight: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.1
        kd_weight: Annotated[float, Range(0.1, 1.0), Field(ge=0)] = 0.9
        temperature: Annotated[float, Range(1.0, 20.0, log=True), Field(gt=0)] = 4.0
        form: Literal["kl", "cross_entropy"] = "kl"

    params: Params
    _imitation: Imitation | None = None

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self._imitation = task.imitation
        if self._imitation is None:
            require_same_classes("kd", student, teacher)
        elif self.params.form != "kl":
            raise UserError(f"method kd: form {self.params.form} compares class logits, and task {task.name} has a form of its own; use kl")

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        if self._imitation is not None:
            return {"kd": self.params.kd_weight * self._imitation(s, t, batch, self.params.temperature)}
        loss = FORMS[self.params.form]
        return {"kd": self.params.kd_weight * loss(s.logits, t.logits, self.params.temperature, labelled_pixels(batch.target))}
