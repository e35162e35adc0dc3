"""Relational knowledge distillation, RKD (Park et al., CVPR 2019, arXiv 1904.05068)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, embeddings
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_LEAST_SQUARE = 1e-12  # of a distance: two equal samples are 1e-6 apart, which counts in the mean, and give no gradient


def distance_loss(student: Tensor, teacher: Tensor, squared: bool = False) -> Tensor:
    """Smooth L1 between the two batches' distances, each over its own batch's mean distance, averaged over all B^2 pairs (eq. 5).

    student, teacher: [B, ...], flattened; squared: compare squared distances. Returns a scalar, float32 or wider; 0 for a batch of one.
    """
    ours, theirs = (_relative_distances(differences(features), squared) for features in (student, teacher))
    return F.smooth_l1_loss(ours, theirs)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles that every three samples form, averaged over all B^3 triples (eq. 7).

    Shapes as in `distance_loss`. Takes memory for B^2 vectors and B^3 numbers.
    """
    ours, theirs = (_cosines(differences(features)) for features in (student, teacher))
    return F.smooth_l1_loss(ours, theirs)


def differences(features: Tensor) -> Tensor:
    """[B, B, D] of features [B, ...]: at (i, j), sample j less sample i. Exact for close samples, as a Gram matrix would not be."""
    (features,) = loss_precision(features)
    rows = features.flatten(1)
    return rows.unsqueeze(0) - rows.unsqueeze(1)


def _relative_distances(difference: Tensor, squared: bool) -> Tensor:
    square = difference.square().sum(2).clamp(min=_LEAST_SQUARE)
    distance = square if squared else square.sqrt()
    itself = torch.eye(len(distance), dtype=torch.bool, device=distance.device)
    distance = distance.masked_fill(itself, 0.0)
    pairs = max(1, len(distance) * (len(distance) - 1))
    mean = distance.sum() / pairs
    return distance / mean.where(mean > 0, 1.0)


def _cosines(difference: Tensor) -> Tensor:
    """[B, B, B]: at (i, j, k), the cosine of the angle at sample i between samples j and k; 0 where one of them is sample i."""
    direction = F.normalize(difference, dim=2)
    return direction @ direction.transpose(1, 2)


class RKD(FeatureMethod):
    """Match the distances and angles between the samples of a batch, in what the classifiers read."""

    paper = Paper(
        "Relational Knowledge Distillation",
        arxiv="1904.05068",
        venue="CVPR 2019",
        formula="L = w_task L_task + w_d mean_ij l(d_ij^s, d_ij^t) + w_a mean_ijk l(cos_ijk^s, cos_ijk^t),  l = smooth L1",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    reads = MAPS_ALONE
    batch_coupled = True

    class Params(FeatureMethod.Params):
        distance_weight: Annotated[float, Range(1.0, 50.0, log=True), Field(ge=0)] = 25.0
        angle_weight: Annotated[float, Range(1.0, 100.0, log=True), Field(ge=0)] = 50.0
        squared: bool = False

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        return embeddings(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.pairs(student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        taps = self.read_pairs(s, t)
        distance = torch.stack([distance_loss(*pair, self.params.squared) for pair in taps]).sum()
        angle = torch.stack([angle_loss(*pair) for pair in taps]).sum()
        return {"distance": self.params.distance_weight * distance, "angle": self.params.angle_weight * angle}
