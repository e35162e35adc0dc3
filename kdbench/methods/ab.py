"""Activation boundaries, AB (Heo et al., AAAI 2019, arXiv 1811.03233)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_stages
from kdbench.models.adapters import to_size_of
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

SCALE = 3 / 1000  # of the authors' code


def boundary_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """What is missing until a student's unit is active where the teacher's is, and inactive elsewhere, by `margin`; squared.

    student, teacher: before their activation, [B, D, H, W] of one shape; of the teacher only the sign counts, so it may be behind a ReLU.
    Returns a scalar, float32 or wider: summed over units, mean over samples.
    """
    student, teacher = loss_precision(student, teacher)
    right_side = torch.where(teacher > 0, student, -student)
    return F.relu(margin - right_side).square().sum() / len(student)


def stage_weights(stages: int) -> list[float]:
    """The last stage's loss counts once, and each earlier one half as much as the next; all times `SCALE`."""
    return [SCALE * 2.0 ** (stage - stages + 1) for stage in range(stages)]


class AB(FeatureMethod):
    """Have units active for the same inputs as the teacher's, at every stage; how much so doesn't matter.

    The student's features go through a pointwise convolution and a batch norm, trained along: they have values on both sides of the
    boundary, whatever activation the tap stands behind. Where sizes differ, they are interpolated to the teacher's. The batch norm sees
    a worker's own samples, as the student's do. The authors train with this loss alone before they train on labels; here both are trained
    together.
    """

    paper = Paper(
        "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
        arxiv="1811.03233",
        venue="AAAI 2019",
        formula="L = w_task L_task + weight sum_k 2^(k - n + 1) 3/1000 / B sum max(0, margin - sign(t_k) s_k)^2,  k = 0 .. n - 1",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        """weight: of a sum over channels and positions, so it grows with the teacher's maps."""

        weight: Annotated[float, Range(0.01, 10.0, log=True), Field(ge=0)] = 1.0
        margin: Annotated[float, Field(gt=0)] = 1.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every stage that both have."""
        return paired_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours[0], theirs[0], kernel_size=1, bias=False), nn.BatchNorm2d(theirs[0]))
            for ours, theirs in self.map_pairs(student, teacher)
        )

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = []
        stages = zip(stage_weights(len(self.connectors)), self.connectors, self.read_maps(s, t), strict=True)
        for weight, connector, (ours, theirs) in stages:
            losses.append(weight * boundary_loss(to_size_of(theirs, connector(ours)), theirs, self.params.margin))
        return {"boundary": self.params.weight * torch.stack(losses).sum()}
