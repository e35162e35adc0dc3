"""Probabilistic knowledge transfer, PKT (Passalis & Tefas, ECCV 2018, arXiv 1803.10837)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, embeddings
from kdbench.models.adapters import as_vector
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_EPSILON = 1e-7  # the authors', added to lengths and to probabilities


def neighbourhood_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all B^2 pairs of p log(p / q): how likely each sample takes another for its neighbour, by cosine similarity.

    student, teacher: [B, D_s] and [B, D_t]. The authors' mean over pairs is 1 / B of the divergence, hence the large weights.
    Returns a scalar in nats, float32 or wider; 0 for a batch of one.
    """
    ours, theirs = (_neighbour_probabilities(features) for features in loss_precision(student, teacher))
    return (theirs * ((theirs + _EPSILON) / (ours + _EPSILON)).log()).mean()


def _neighbour_probabilities(features: Tensor) -> Tensor:
    directions = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _EPSILON)
    similarity = (directions @ directions.T + 1) / 2
    probabilities: Tensor = similarity / similarity.sum(1, keepdim=True)
    return probabilities


class PKT(FeatureMethod):
    """Match, for each sample of a batch, which others are near to it, in what the classifiers read."""

    paper = Paper(
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        arxiv="1803.10837",
        venue="ECCV 2018",
        formula="L = w_task L_task + weight mean_ij p_ij log(p_ij / q_ij),  p, q = rows of (1 + cosine) / 2, summing to 1",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    reads = MAPS_ALONE
    batch_coupled = True

    class Params(FeatureMethod.Params):
        weight: Annotated[float, Range(3000.0, 100_000.0, log=True), Field(ge=0)] = 30_000.0

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        return embeddings(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.pairs(student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = []
        for pair in self.read_pairs(s, t):
            ours, theirs = loss_precision(*pair)
            losses.append(neighbourhood_loss(as_vector(ours), as_vector(theirs)))
        return {"pkt": self.params.weight * torch.stack(losses).sum()}
