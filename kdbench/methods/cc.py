"""Correlation congruence, CC (Peng et al., ICCV 2019, arXiv 1904.01802)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, embeddings
from kdbench.models.adapters import as_vector
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def neighbour_product_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over neighbours b, b + 1 of sum_k |d_bk| |d_(b+1)k|, with d = student - teacher, both [B, D].

    Not the paper's difference of Gram matrices, but what its authors' code computes: it depends on the order of the batch.
    Returns a scalar, float32 or wider; 0 for a batch of one, which has no neighbours.
    """
    student, teacher = loss_precision(student, teacher)
    distance = (student - teacher).abs()
    return (distance[:-1] * distance[1:]).sum() / max(1, len(distance) - 1)


class CC(FeatureMethod):
    """Bring learned embeddings of what the classifiers read together, for samples that follow each other in the batch."""

    paper = Paper(
        "Correlation Congruence for Knowledge Distillation",
        arxiv="1904.01802",
        venue="ICCV 2019",
        formula="L = w_task L_task + weight mean_b sum_k |d_bk| |d_(b+1)k|,  d = W_s f_s - W_t f_t",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE
    batch_coupled = True

    class Params(FeatureMethod.Params):
        weight: Annotated[float, Range(0.002, 2.0, log=True), Field(ge=0)] = 0.02
        dimensions: Annotated[int, Field(ge=1, le=2**16)] = 128  # of the embeddings; the loss is a sum over them

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        return embeddings(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        pairs = self.pairs(student, teacher)
        self.student_embeddings = nn.ModuleList(nn.Linear(ours.channels, self.params.dimensions) for ours, _ in pairs)
        self.teacher_embeddings = nn.ModuleList(nn.Linear(theirs.channels, self.params.dimensions) for _, theirs in pairs)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        losses = []
        taps = zip(self.student_taps, self.teacher_taps, self.student_embeddings, self.teacher_embeddings, strict=True)
        for student, teacher, embed_student, embed_teacher in taps:
            ours, theirs = loss_precision(s.maps[student], t.maps[teacher])
            losses.append(neighbour_product_loss(embed_student(as_vector(ours)), embed_teacher(as_vector(theirs))))
        return {"cc": self.params.weight * torch.stack(losses).sum()}
