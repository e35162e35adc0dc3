"""Distillation from a stronger teacher, DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.logits import labelled_pixels, mean_over, require_same_classes
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_EPSILON = 1e-8  # the authors', added to the product of the two lengths


def inter_class_loss(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """T^2 (1 - the mean correlation of the two distributions over classes), of each sample or pixel.

    student, teacher: logits [B, C] or [B, C, H, W]; valid: None or boolean [B, H, W], the pixels that count.
    Returns a scalar, float32 or wider: 0 where the distributions agree up to scale and shift, at most 2 T^2. Uniform predictions correlate
    with nothing; near them the gradient is finite, but steep.
    """
    ours, theirs = (_probabilities(logits, temperature) for logits in (student, teacher))
    correlation = _cosine(ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True), dim=1)
    return temperature**2 * (1 - mean_over(correlation, _rows(valid)))


def intra_class_loss(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """T^2 (1 - the mean correlation of what the two give one class, over all samples or pixels together), over classes.

    Shapes as in `inter_class_loss`. A lone sample correlates with nothing: the loss is then T^2, without a gradient.
    """
    rows = _rows(valid)
    ours, theirs = (_centred_columns(_probabilities(logits, temperature), rows) for logits in (student, teacher))
    return temperature**2 * (1 - _cosine(ours, theirs, dim=0).mean())


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """[N, C]: a row for each sample or pixel."""
    (logits,) = loss_precision(logits)
    return F.softmax(logits.movedim(1, -1).flatten(0, -2) / temperature, dim=1)


def _rows(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.flatten()


def _centred_columns(values: Tensor, rows: Tensor | None) -> Tensor:
    """values [N, C] less each column's mean over the rows that count; 0 in the others."""
    if rows is None:
        return values - values.mean(0)
    counted = rows.unsqueeze(1)
    mean = torch.where(counted, values, 0.0).sum(0) / counted.sum().clamp(min=1)
    return torch.where(counted, values - mean, 0.0)


def _cosine(first: Tensor, second: Tensor, dim: int) -> Tensor:
    lengths = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    cosine: Tensor = (first * second).sum(dim) / (lengths + _EPSILON)
    return cosine


class DIST(Method):
    """Match how the teacher ranks the classes of a sample, and the samples within a class: correlations in place of divergences.

    On dense predictions a row is a pixel. The authors count every pixel; here those without a label are left out, as in `kd`.
    """

    paper = Paper(
        "Knowledge Distillation from A Stronger Teacher",
        arxiv="2205.10536",
        venue="NeurIPS 2022",
        formula="L = w_task L_task + weight T^2 (beta (1 - mean_b rho(p_b, q_b)) + gamma (1 - mean_c rho(p_.c, q_.c)))",
        checked_against="hunto/image_classification_sota@6f7a70a, hunto/DIST_KD@2418f18, open-mmlab/mmrazor@90c7af1",
    )
    reads = frozenset({"class logits", "pixel logits"})
    batch_coupled = True
    needs_labels = False

    class Params(Method.Params):
        """Defaults are those of CIFAR-100; temperature 1 on ImageNet, and none (1) for segmentation."""

        weight: Annotated[float, Field(ge=0)] = 2.0  # a factor of both, so searched through them
        beta: Annotated[float, Range(0.5, 4.0, log=True), Field(ge=0)] = 1.0
        gamma: Annotated[float, Range(0.5, 4.0, log=True), Field(ge=0)] = 1.0
        temperature: Annotated[float, Range(1.0, 4.0, log=True), Field(gt=0)] = 4.0

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("dist", student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        params, valid = self.params, labelled_pixels(batch.target)
        return {
            "inter": params.weight * params.beta * inter_class_loss(s.logits, t.logits, params.temperature, valid),
            "intra": params.weight * params.gamma * intra_class_loss(s.logits, t.logits, params.temperature, valid),
        }
