"""Similarity-preserving distillation, SP (Tung & Mori, ICCV 2019, arXiv 1907.09682)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_t - G_s||^2 / B^2 of the two batches' Gram matrices [B, B], each row brought to length 1 (eq. 4).

    student, teacher: [B, ...], of any shapes that agree in B. Returns a scalar, float32 or wider; 0 for a batch of one.
    """
    grams = []
    for features in loss_precision(student, teacher):
        rows = features.flatten(1)
        grams.append(F.normalize(rows @ rows.T, dim=1))
    return (grams[1] - grams[0]).square().mean()


class SP(FeatureMethod):
    """Match which samples of a batch look alike, at the last stage. The features themselves may be of any size."""

    paper = Paper(
        "Similarity-Preserving Knowledge Distillation",
        arxiv="1907.09682",
        venue="ICCV 2019",
        formula="L = w_task L_task + weight / B^2 ||G_t - G_s||_F^2,  G = rows of F F^T over their length",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    reads = MAPS_ALONE
    batch_coupled = True

    class Params(FeatureMethod.Params):
        weight: Annotated[float, Range(300.0, 10_000.0, log=True), Field(ge=0)] = 3000.0

    params: Params

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.pairs(student, teacher)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = [similarity_loss(*pair) for pair in self.read_pairs(s, t)]
        return {"sp": self.params.weight * torch.stack(losses).sum()}
