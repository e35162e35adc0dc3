"""PKD: features matched by their correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_levels, paired_stages
from kdbench.methods.presets import Presets
from kdbench.models.adapters import to_size_of, to_width
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_STEADY = 1e-6  # added to a deviation, so that a constant channel stays finite


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of the standardised features: (n - 1) / n (1 - r), r the channels' mean correlation.

    student, teacher: [B, D, H, W]; mean and unbiased deviation are those of a channel over its n = B * H * W values.
    Returns a scalar, float32 or wider, from 0 where every channel is a rising linear function of the teacher's, to 2.
    """
    student, teacher = loss_precision(student, teacher)
    return (_standardised(student) - _standardised(teacher)).square().mean() / 2


def _standardised(features: Tensor) -> Tensor:
    over = (0, 2, 3)
    values = features.shape[0] * features.shape[2] * features.shape[3]
    deviation = features.std(over, correction=min(1, values - 1), keepdim=True)  # of a single value there is no unbiased one
    return (features - features.mean(over, keepdim=True)) / (deviation + _STEADY)


class PKD(FeatureMethod):
    """Match the teacher's features channel by channel, whatever their scale and offset, at every level of a pyramid or every stage.

    The paper compares pyramids of equal widths. Where widths differ, a pointwise convolution that is trained along leads from the student's
    to the teacher's.
    """

    paper = Paper(
        "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
        arxiv="2207.02039",
        venue="NeurIPS 2022",
        formula="L = w_task L_task + weight sum_stages mean (z_s - z_t)^2 / 2;  z = (f - mean) / (deviation + 1e-6)",
        checked_against="open-mmlab/mmrazor@90c7af1",
    )
    reads = MAPS_ALONE
    batch_coupled = True  # mean and deviation are the batch's
    presets: ClassVar[Presets] = {"proposals": {"weight": 6.0}, "boxes": {"weight": 10.0}}

    class Params(FeatureMethod.Params):
        """weight: 6 is the authors' for two-stage detectors, 10 for RetinaNet. resize: which side is interpolated where sizes differ."""

        weight: Annotated[float, Range(1.0, 30.0, log=True), Field(ge=0)] = 6.0
        resize: Literal["student", "teacher"] = "student"

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every level that both pyramids have; every stage that both have of networks without a pyramid."""
        return paired_levels(student, teacher) or paired_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.aligns = nn.ModuleList(to_width(ours[0], theirs[0]) for ours, theirs in self.map_pairs(student, teacher))

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = []
        for align, (ours, theirs) in zip(self.aligns, self.read_maps(s, t), strict=True):
            if self.params.resize == "student":
                ours = to_size_of(theirs, ours)
            else:
                theirs = to_size_of(ours, theirs)
            losses.append(correlation_loss(align(ours), theirs))
        return {"correlation": self.params.weight * torch.stack(losses).sum()}
