"""Universal self-knowledge distillation, USKD (Yang et al., ICCV 2023, arXiv 2303.13005)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.catalogue import nearest
from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.features import stages
from kdbench.methods.logits import other_logits
from kdbench.models.adapters import as_vector, class_tokens
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_WEAK_SMOOTHING = 0.1  # of the weak head's labels
_EPSILON = 1e-6


def labels_and_values(target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels, int64 [B, K], and how much each counts, [B, K]: one of a hard target [B], the two largest of a soft one [B, C]."""
    if target.dim() == 1:
        return target.unsqueeze(1), torch.ones_like(target, dtype=dtype).unsqueeze(1)
    values, labels = target.to(dtype).sort(dim=1, descending=True, stable=True)
    return labels[:, :2], values[:, :2]


def target_loss(logits: Tensor, target: Tensor) -> Tensor:
    """-mean_b sum_l w_l log p_l over a sample's labels, with the soft target w = stop_grad(p^2 + v - mean_b p^2), 0 where v = 0.

    logits: [B, C], p their softmax; target: int64 [B] with v = 1, or soft [B, C]: its two largest entries, with their values v.
    The mean in w runs over the whole batch given. Returns a scalar in nats, float32 or wider.
    """
    (logits,) = loss_precision(logits)
    labels, values = labels_and_values(target, logits.dtype)
    log_p = F.log_softmax(logits, dim=1).gather(1, labels)
    squared = (2 * log_p.detach()).exp()
    weight = (squared + values - squared.mean(0)).where(values != 0, 0.0)
    return -(weight * log_p).sum(1).mean()


def nontarget_loss(logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over the classes beside the labels, to soft labels 1 / rank, normalised; 0 where no other class is left.

    The rank is that among all classes by W_c / (1 - W_y) + log p_c / (1 - log p_y), where W is the weak head's softmax and p the student's.
    (The paper adds two probabilities; the authors' code takes the student's logarithm. Only the order counts, but it differs.)
    logits, weak_logits: [B, C]; target as in `target_loss`. No gradient reaches the weak head.
    """
    logits, weak_logits = loss_precision(logits, weak_logits)
    labels, _ = labels_and_values(target, logits.dtype)
    scores = torch.zeros_like(logits)
    for opinion in (F.softmax(weak_logits.detach(), dim=1), F.log_softmax(logits.detach(), dim=1)):
        scores = scores + opinion / (1 - opinion.gather(1, labels).sum(1, keepdim=True) + _EPSILON)
    shares = 1 / torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)
    ranked = torch.zeros_like(logits).scatter(1, scores.argsort(dim=1, descending=True), shares.expand_as(logits))
    soft = other_logits(ranked, labels)
    soft = soft / soft.sum(1, keepdim=True)
    return -(soft * F.log_softmax(other_logits(logits, labels), dim=1)).sum(1).mean()


def weak_loss(weak_logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the weak head's logits [B, C] to 0.9 of the label's distribution and 0.1 of the uniform one."""
    (weak_logits,) = loss_precision(weak_logits)
    labels = target.to(weak_logits.dtype) if target.is_floating_point() else target
    return F.cross_entropy(weak_logits, labels, label_smoothing=_WEAK_SMOOTHING)


class USKD(Method):
    """Be one's own teacher: soft labels for the other classes from a weak classifier on a middle feature and from the student itself.

    The classifier is trained along. It reads the mean over space of the second last stage, or the class token of the middle block.
    """

    paper = Paper(
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels",
        arxiv="2303.13005",
        venue="ICCV 2023",
        formula="L = w_task CE - alpha w_y log p_y - beta sum_{c != y} z_c log P_c + mu CE(weak head);  "
        "w_y = stop_grad(p_y^2 + 1 - mean_b p_y^2), z_c ~ 1 / rank_c, P = softmax(z_s) without y",
        checked_against="yzd-v/cls_KD@1e5d48f",
    )
    needs_teacher = False
    batch_coupled = True  # the mean in the soft target: the authors' is over one worker's samples, ours over all workers'

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; ImageNet: alpha 1, beta 0.1, mu 0.005. student_taps: one; empty: chosen for the student."""

        alpha: Annotated[float, Range(0.05, 2.0, log=True), Field(ge=0)] = 0.1
        beta: Annotated[float, Range(0.01, 1.0, log=True), Field(ge=0)] = 0.1
        mu: Annotated[float, Range(0.001, 0.2, log=True), Field(ge=0)] = 0.1
        student_taps: Annotated[tuple[str, ...], Field(max_length=1)] = ()

    params: Params

    def __init__(self, params: Method.Params | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(params, generator)
        self.student_taps = self.params.student_taps

    @property
    def taps_chosen(self) -> bool:
        return bool(self.params.student_taps)

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        if self.params.student_taps:
            (named,) = self.params.student_taps
            if named not in student.taps:
                raise UserError(f"method uskd: student_taps: there is no tap {named!r}{nearest(named, student.taps)}")
            return self.params
        names = stages(student)
        middle = names[(len(names) - 1) // 2] if names[0].startswith("block:") else names[max(0, len(names) - 2)]
        return self.params.model_copy(update={"student_taps": (middle,)})

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        if len(student.logits) != 1 or student.logits[0] < 2:
            raise UserError(f"method uskd needs logits of at least two classes, the student gives {list(student.logits)}")
        (self._tap,) = self.student_taps
        shape = student.taps[self._tap]
        try:
            self._reads_class_token = shape.kind == "tokens" and class_tokens(shape) > 0
        except UserError as error:
            raise UserError(f"method uskd can't read the student's {self._tap!r}: {error}") from error
        self.weak_head = nn.Linear(shape.channels, student.logits[0])

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        (feature,) = loss_precision(s.maps[self._tap])
        weak = self.weak_head(feature[:, 0] if self._reads_class_token else as_vector(feature))
        return {
            "target": self.params.alpha * target_loss(s.logits, batch.labels),
            "nontarget": self.params.beta * nontarget_loss(s.logits, weak, batch.labels),
            "weak": self.params.mu * weak_loss(weak, batch.labels),
        }
