"""Knowledge review, ReviewKD (Chen et al., CVPR 2021, arXiv 2104.09044)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, before_activation, paired_stages
from kdbench.models.adapters import as_map, map_shape
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_PYRAMID = (4, 2, 1)  # pixels a side of the coarser maps that are compared, too
_WIDEST = 512


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL: the mean squared difference at full size and at 4, 2 and 1 pixels a side, each step with half the weight, the weights' sum 1.

    student, teacher: [B, D, H, W]; sizes that are not smaller than H are left out. Returns a scalar, float32 or wider.
    """
    student, teacher = loss_precision(student, teacher)
    losses, weights = [F.mse_loss(student, teacher)], [1.0]
    for side in _PYRAMID:
        if side < teacher.shape[-2]:
            coarse = F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side)
            losses.append(F.mse_loss(*coarse))
            weights.append(weights[-1] / 2)
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """ABF: a level of the student, mixed by attention with what came from the deeper levels, and what it says about the teacher's."""

    def __init__(self, channels: int, middle: int, wanted: int, fuses: bool) -> None:
        """channels: the student's; middle: those passed on; wanted: the teacher's. fuses: false for the deepest level."""
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, middle, kernel_size=1, bias=False), nn.BatchNorm2d(middle))
        self.conv2 = nn.Sequential(nn.Conv2d(middle, wanted, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(wanted))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * middle, 2, kernel_size=1), nn.Sigmoid()) if fuses else None

    def forward(self, features: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """features: [B, channels, H, W]; deeper: [B, middle, h, w]. Returns [B, wanted, *size] and, to pass on, [B, middle, *size]."""
        x: Tensor = self.conv1(features)
        if self.att_conv is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, size=x.shape[-2:], mode="nearest")
            gates = self.att_conv(torch.cat([x, deeper], dim=1))
            x = x * gates[:, :1] + deeper * gates[:, 1:]
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="nearest")
        return self.conv2(x), x


class ReviewKD(FeatureMethod):
    """Explain each of the teacher's stages by the student's same stage together with all deeper ones.

    The teacher is read before the last activation of a stage where that is a module, as in the authors' code, the student behind it;
    where it is none, the stage's output is compared. What the classifier reads is the deepest level. The authors raise the loss from 0
    in the first 20 of 240 epochs; here it is that share of any training.
    """

    paper = Paper(
        "Distilling Knowledge via Knowledge Review",
        arxiv="2104.09044",
        venue="CVPR 2021",
        formula="L = w_task CE + weight min(1, progress / warmup) sum_k HCL(ABF_k(f_s^k, ABF_k+1), f_t^k)",
        checked_against="megvii-research/mdistiller@a08d46f",
    )

    class Params(FeatureMethod.Params):
        """The authors choose the weight by pair, 1 to 8. The loss is a mean over positions, so it holds at any map size."""

        weight: Annotated[float, Range(0.5, 10.0, log=True), Field(ge=0)] = 1.0
        warmup_share: Annotated[float, Field(ge=0, le=1)] = 20 / 240

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """All stages that both have, and what the classifiers read."""
        ours, theirs = paired_stages(student, teacher)
        pooled = ("pooled",) if "pooled" in student.taps and "pooled" in teacher.taps else ()
        return (*ours, *pooled), (*before_activation(teacher, theirs), *pooled)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self._shapes: list[tuple[TapShape, TapShape]] = self.pairs(student, teacher)
        levels = []
        for position, (ours, theirs) in enumerate(self._shapes):
            try:
                levels.append((_level_shape(ours), _level_shape(theirs)))
            except UserError as error:
                raise self.unfit(position, ours, theirs, str(error)) from error
        self._single_position = any(height * width == 1 for pair in levels for _, height, width in pair)
        middle = min(_WIDEST, levels[-1][0][0])
        deepest = len(levels) - 1
        self.fusions = nn.ModuleList(
            Fusion(ours[0], middle, theirs[0], fuses=position < deepest) for position, (ours, theirs) in enumerate(levels)
        )

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        if self.training and self._single_position and len(batch) == 1:
            raise UserError(f"method {self.name}: its batch norms can't measure a batch of one; change recipe.batch_size")
        losses, passed = [], None
        levels = zip(self.student_taps, self.teacher_taps, self._shapes, self.fusions, strict=True)
        for student, teacher, (ours, theirs), fusion in reversed(list(levels)):
            (feature,) = loss_precision(_as_level(s.maps[student], ours))
            hint = _as_level(t.maps[teacher], theirs).to(feature.dtype)
            explained, passed = fusion(feature, passed, hint.shape[-2:])
            losses.append(hierarchical_context_loss(explained, hint))
        return {"review": self.params.weight * at.ramp(self.params.warmup_share) * torch.stack(losses).sum()}

    def warmup_epochs(self, total_epochs: float) -> float:
        return self.params.warmup_share * total_epochs


def _level_shape(shape: TapShape) -> tuple[int, int, int]:
    """[D, H, W] of a level: a vector is a map of one position."""
    return (shape.channels, 1, 1) if shape.kind == "vector" else map_shape(shape)


def _as_level(features: Tensor, shape: TapShape) -> Tensor:
    return features[:, :, None, None] if shape.kind == "vector" else as_map(features, shape)
