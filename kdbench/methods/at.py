"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_spatial_stages
from kdbench.models.adapters import to_smaller
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def attention_map(features: Tensor, power: int = 2) -> Tensor:
    """Where a network looks: mean of f^power over channels, brought to length 1 over space (section 3.1); 0 where all features are 0.

    features: [B, D, H, W]. Returns [B, H * W].
    """
    return F.normalize(features.pow(power).mean(dim=1).flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    """Mean squared difference of the two attention maps, over samples and positions.

    student, teacher: [B, D_s, H_s, W_s] and [B, D_t, H_t, W_t]; where the sizes differ, the larger features are averaged down first.
    Returns a scalar, float32 or wider, at most 4 / (H * W).
    """
    student, teacher = to_smaller(*loss_precision(student, teacher))
    return (attention_map(student, power) - attention_map(teacher, power)).square().mean()


class AT(FeatureMethod):
    """Look where the teacher looks, at every stage."""

    paper = Paper(
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer",
        arxiv="1612.03928",
        venue="ICLR 2017",
        formula="L = w_task L_task + weight sum_stages mean (a_s - a_t)^2;  a = normalise(mean_channels f^p)",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        """weight: of a mean over positions, where the paper has a sum, so it does the same at half the height and width with a quarter."""

        weight: Annotated[float, Range(10.0, 5000.0, log=True), Field(ge=0)] = 1000.0
        power: Annotated[int, Field(ge=1, le=16)] = 2

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every stage that both have."""
        return paired_spatial_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.map_pairs(student, teacher, over_space=True)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = [attention_loss(ours, theirs, self.params.power) for ours, theirs in self.read_maps(s, t)]
        return {"attention": self.params.weight * torch.stack(losses).sum()}
