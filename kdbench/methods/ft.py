"""Factor transfer, FT (Kim, Park & Kwak, NeurIPS 2018, arXiv 1802.04977)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.at import attention_map
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_spatial_stages
from kdbench.models.adapters import to_smaller
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_SLOPE = 0.1  # of the leaky ReLUs (section 3)


def factor_loss(student: Tensor, teacher: Tensor, power: int = 2, norm: int = 1) -> Tensor:
    """Mean of |F_s - F_t| (norm 1) or of its power `norm`, F the factor's mean of f^power over channels, at length 1 over space.

    student, teacher: factors [B, D_s, H_s, W_s] and [B, D_t, H_t, W_t]; where the sizes differ, the larger is averaged down first.
    Returns a scalar, float32 or wider. The paper's factor is normalised as a whole; this, with the mean over channels, is the code's.
    """
    student, teacher = to_smaller(*loss_precision(student, teacher))
    difference = attention_map(student, power) - attention_map(teacher, power)
    return difference.abs().mean() if norm == 1 else difference.pow(norm).mean()


def _layers(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *widths: int) -> nn.Sequential:
    """3x3 convolutions that keep the size, from width to width, each with a leaky ReLU."""
    layers = [nn.Sequential(kind(before, after, kernel_size=3, padding=1), nn.LeakyReLU(_SLOPE)) for before, after in pairwise(widths)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """The teacher's features told in fewer channels, and told back (section 3.1)."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encode = _layers(nn.Conv2d, channels, channels, factors, factors)
        self.decode = _layers(nn.ConvTranspose2d, factors, factors, channels, channels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of features [B, D, H, W]: factor [B, factors, H, W], and how far what it is decoded to is from the features, mean squared."""
        factor = self.encode(features)
        return factor, F.mse_loss(self.decode(factor), features)


class FT(FeatureMethod):
    """Match a paraphrase of the teacher's features: a factor, which an autoencoder learns from them without labels.

    The authors train the paraphraser first; here it learns along, from its own term `reconstruction`, and its factor is a constant to the
    student. A translator, trained along too, makes the student's factor from its features.
    """

    paper = Paper(
        "Paraphrasing Complex Network: Network Compression via Factor Transfer",
        arxiv="1802.04977",
        venue="NeurIPS 2018",
        formula="L = w_task L_task + weight mean |F_s - F_t|^norm;  F = normalise(mean_channels factor^power)",
        checked_against="HobbitLong/RepDistiller@b84f547",
    )
    reads = MAPS_ALONE

    class Params(FeatureMethod.Params):
        """weight: of a mean over positions, of values that are smaller the larger the map. rate: the factor's channels in the teacher's."""

        weight: Annotated[float, Range(5.0, 2000.0, log=True), Field(ge=0)] = 200.0
        rate: Annotated[float, Range(0.25, 1.0), Field(gt=0)] = 0.5
        power: Annotated[int, Field(ge=1, le=16)] = 2
        norm: Annotated[int, Field(ge=1, le=2)] = 1

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """The last stage that is wider than one position."""
        ours, theirs = paired_spatial_stages(student, teacher)
        return ours[-1:], theirs[-1:]

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        maps = self.map_pairs(student, teacher, over_space=True)
        factors = [max(1, round(self.params.rate * theirs[0])) for _, theirs in maps]
        self.paraphrasers = nn.ModuleList(Paraphraser(theirs[0], count) for (_, theirs), count in zip(maps, factors, strict=True))
        self.translators = nn.ModuleList(
            _layers(nn.Conv2d, ours[0], ours[0], count, count) for (ours, _), count in zip(maps, factors, strict=True)
        )

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses, reconstructions = [], []
        for paraphraser, translator, (ours, theirs) in zip(self.paraphrasers, self.translators, self.read_maps(s, t), strict=True):
            factor, reconstruction = paraphraser(theirs)
            losses.append(factor_loss(translator(ours), factor.detach(), self.params.power, self.params.norm))
            reconstructions.append(reconstruction)
        return {"factor": self.params.weight * torch.stack(losses).sum(), "reconstruction": torch.stack(reconstructions).sum()}
