"""Neuron selectivity transfer (Huang & Wang, 2017, arXiv 1707.01219)."""

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


def neuron_selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the two networks' channels, each one a sample in space, under the kernel (a . b)^2.

    student, teacher: [B, D_s, H_s, W_s] and [B, D_t, H_t, W_t]; where the sizes differ, the larger is averaged down. A channel is brought
    to length 1 over space. Returns a scalar, float32 or wider, 0 where the channels are the same in any order. Memory: B * D * D.
    """
    student, teacher = (F.normalize(x.flatten(2), dim=2) for x in to_smaller(*loss_precision(student, teacher)))
    return _mean_kernel(teacher, teacher) + _mean_kernel(student, student) - 2 * _mean_kernel(student, teacher)


def _mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    return torch.bmm(first, second.transpose(1, 2)).square().mean()


class NST(FeatureMethod):
    """Have channels that select the same places of an image as the teacher's do, at every stage."""

    paper = Paper(
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        arxiv="1707.01219",
        formula="L = w_task L_task + weight sum_stages (mean k(t, t) + mean k(s, s) - 2 mean k(s, t));  k(a, b) = (a . b)^2",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        weight: Annotated[float, Range(1.0, 500.0, log=True), Field(ge=0)] = 50.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every stage that both have."""
        return paired_spatial_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.map_pairs(student, teacher, over_space=True)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = [neuron_selectivity_loss(ours, theirs) for ours, theirs in self.read_maps(s, t)]
        return {"selectivity": self.params.weight * torch.stack(losses).sum()}
