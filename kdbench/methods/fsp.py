"""Flow of solution procedure, FSP (Yim et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_stages
from kdbench.models.adapters import to_smaller, to_width
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def flow_matrix(first: Tensor, second: Tensor) -> Tensor:
    """How the channels of two places go together: the mean over space of their products (eq. 1).

    first, second: [B, D_1, H_1, W_1] and [B, D_2, H_2, W_2]; where the sizes differ, the larger is averaged down. Returns [B, D_1, D_2].
    """
    first, second = (x.flatten(2) for x in to_smaller(*loss_precision(first, second)))
    return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]


def flow_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the flow matrices of consecutive places, summed over them (eq. 2 with equal weights).

    student, teacher: two or more maps each; map k has one width in both, sizes are free. Returns a scalar, float32 or wider.
    """
    flows = zip(pairwise(student), pairwise(teacher), strict=True)
    return torch.stack([F.mse_loss(flow_matrix(*ours), flow_matrix(*theirs)) for ours, theirs in flows]).sum()


class FSP(FeatureMethod):
    """Go from stage to stage as the teacher does.

    The paper does this first and trains on labels afterwards, between networks of equal widths; here both are trained together, and where
    widths differ, a pointwise convolution that is trained along leads from the student's to the teacher's.
    """

    paper = Paper(
        "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        venue="CVPR 2017",
        formula="L = w_task L_task + weight sum_k mean (G_s^k - G_t^k)^2;  G^k = mean_space f_k f_(k+1)^T",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        weight: Annotated[float, Range(1.0, 500.0, log=True), Field(ge=0)] = 50.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every stage that both have."""
        return paired_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        maps = self.map_pairs(student, teacher)
        if len(maps) < 2:
            raise UserError(
                f"method {self.name} compares how features change from one place to the next, and the pair has "
                f"{len(maps)} to compare; name two or more student_taps and as many teacher_taps"
            )
        self.aligns = nn.ModuleList(to_width(ours[0], theirs[0]) for ours, theirs in maps)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        maps = self.read_maps(s, t)
        ours = [align(student) for align, (student, _) in zip(self.aligns, maps, strict=True)]
        return {"flow": self.params.weight * flow_loss(ours, [teacher for _, teacher in maps])}
