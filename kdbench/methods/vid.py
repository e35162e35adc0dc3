"""Variational information distillation, VID (Ahn et al., CVPR 2019, arXiv 1904.05835)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_stages
from kdbench.models.adapters import to_smaller
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo


def gaussian_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """-log N(teacher | mean, variance) without its constant: mean of ((mean - t)^2 / variance + log variance) / 2.

    mean, teacher: [B, D, H, W]; variance: [D], positive. Returns a scalar in nats a value, float32 or wider; negative where features are
    met more closely than to a deviation of 1.
    """
    mean, variance, teacher = loss_precision(mean, variance, teacher)
    variance = variance[:, None, None]
    return ((mean - teacher).square() / variance + variance.log()).mean() / 2


class Guess(nn.Module):
    """A Gaussian over the teacher's features, given the student's: a mean by three pointwise convolutions, a variance a channel."""

    def __init__(self, student: int, teacher: int, hidden: int, variance: float, least_variance: float) -> None:
        """student, teacher, hidden: channels; variance: what training begins with, and least_variance, which it stays above."""
        super().__init__()
        widths = ((student, hidden), (hidden, hidden), (hidden, teacher))
        first, second, third = (nn.Conv2d(before, after, kernel_size=1, bias=False) for before, after in widths)
        self.regressor = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.least_variance = least_variance
        self.log_scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance - least_variance))))

    @property
    def variance(self) -> Tensor:
        """[D], by softplus of what is learned."""
        return F.softplus(self.log_scale) + self.least_variance

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss for maps [B, *, H, W], of which the larger is averaged down."""
        student, teacher = to_smaller(student, teacher)
        return gaussian_loss(self.regressor(student), self.variance, teacher)


class VID(FeatureMethod):
    """Keep as much information as possible about the teacher's features: make them likely, given the student's, at every stage."""

    paper = Paper(
        "Variational Information Distillation for Knowledge Transfer",
        arxiv="1904.05835",
        venue="CVPR 2019",
        formula="L = w_task L_task + weight sum_stages mean ((mu(f_s) - f_t)^2 / var + log var) / 2",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        """init_variance: of every channel at first; least_variance: what no channel falls below.

        hidden_channels: of the regressor; as many as the teacher's where not given.
        """

        weight: Annotated[float, Range(0.1, 10.0, log=True), Field(ge=0)] = 1.0
        init_variance: Annotated[float, Field(ge=0.01, le=100)] = 5.0
        least_variance: Annotated[float, Field(gt=0, lt=0.01)] = 1e-5
        hidden_channels: Annotated[int, Field(ge=1, le=2**16)] | None = None

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every stage that both have."""
        return paired_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        params = self.params
        self.guesses = nn.ModuleList(
            Guess(ours[0], theirs[0], params.hidden_channels or theirs[0], params.init_variance, params.least_variance)
            for ours, theirs in self.map_pairs(student, teacher)
        )

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = [guess(ours, theirs) for guess, (ours, theirs) in zip(self.guesses, self.read_maps(s, t), strict=True)]
        return {"vid": self.params.weight * torch.stack(losses).sum()}
