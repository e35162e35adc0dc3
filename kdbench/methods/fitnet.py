"""FitNets: a learned regressor from the student's features to the teacher's (Romero et al., ICLR 2015, arXiv 1412.6550)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress
from kdbench.methods.features import FeatureMethod, Names, middle_stages
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


class Regressor(nn.Module):
    """Convolution, batch norm, ReLU: [B, D_s, H_s, W_s] -> [B, D_t, H_t, W_t].

    The convolution halves a map that is twice as large, doubles one that is half as large, and is an unpadded one of side
    1 + H_s - H_t otherwise, which is pointwise at equal sizes.
    """

    def __init__(self, student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
        """student, teacher: [D, H, W]. Raises ValueError where the student's map is smaller than the teacher's, and not half as large."""
        super().__init__()
        (channels, height, width), (wanted, goal_height, goal_width) = student, teacher
        self.conv: nn.Module
        if (height, width) == (2 * goal_height, 2 * goal_width):
            self.conv = nn.Conv2d(channels, wanted, kernel_size=3, stride=2, padding=1)
        elif (2 * height, 2 * width) == (goal_height, goal_width):
            self.conv = nn.ConvTranspose2d(channels, wanted, kernel_size=4, stride=2, padding=1)
        elif height >= goal_height and width >= goal_width:
            self.conv = nn.Conv2d(channels, wanted, kernel_size=(1 + height - goal_height, 1 + width - goal_width))
        else:
            raise ValueError(f"no regressor leads from {height}x{width} to {goal_height}x{goal_width}")
        self.bn = nn.BatchNorm2d(wanted)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(features)))


class FitNet(FeatureMethod):
    """Match the teacher's features at one place, through a regressor that is trained along.

    The paper trains the hint first and the rest afterwards; here, as in the code it was checked against, both are trained together,
    and the regressor has a batch norm and a ReLU, so it fits features that are not negative.
    """

    paper = Paper(
        "FitNets: Hints for Thin Deep Nets",
        arxiv="1412.6550",
        venue="ICLR 2015",
        formula="L = w_task L_task + weight mean (ReLU(BN(conv(f_s))) - f_t)^2",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        weight: Annotated[float, Range(1.0, 1000.0, log=True), Field(ge=0)] = 100.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """A middle place of each, as the hint layer of the paper."""
        return middle_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        regressors = []
        for position, (ours, theirs) in enumerate(self.map_pairs(student, teacher)):
            try:
                regressors.append(Regressor(ours, theirs))
            except ValueError as error:
                way_out = f"{error}; name taps of which the student's is as large as the teacher's, larger, or half as large"
                raise self.unfit(position, *self.pairs(student, teacher)[position], way_out) from error
        self.regressors = nn.ModuleList(regressors)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        pairs = zip(self.regressors, self.read_maps(s, t), strict=True)
        losses = [F.mse_loss(regressor(feature), hint) for regressor, (feature, hint) in pairs]
        return {"hint": self.params.weight * torch.stack(losses).sum()}
