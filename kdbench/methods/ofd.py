"""A comprehensive overhaul of feature distillation, OFD (Heo et al., ICCV 2019, arXiv 1904.01866)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import MAPS_ALONE, Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, before_activation, paired_stages
from kdbench.models.adapters import to_smaller
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import locate
from kdbench.models.trace import Example
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

# Where so little of a channel is negative, its mean says nothing: the margin is then this many deviations below zero.
_RARELY_NEGATIVE, _DEVIATIONS = 0.001, 3.0


def margins(scale: Tensor, shift: Tensor) -> Tensor:
    """E[x | x < 0] of normal numbers with mean `shift` and deviation |scale|, a batch norm's weight and bias [C]; float64 [C].

    -3 |scale| where a number is negative with a probability of at most 0.001.
    """
    mean, deviation = shift.detach().double(), scale.detach().double().abs()
    deviation_or_tiny = deviation.clamp(min=torch.finfo(torch.float64).tiny)
    z = mean / deviation_or_tiny
    negative = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = mean - deviation * density / negative.clamp(min=_RARELY_NEGATIVE)
    return torch.where(negative > _RARELY_NEGATIVE, expected, -_DEVIATIONS * deviation)


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared distance to max(t, m), without what is below a negative goal (eq. 4); summed over [D, H, W], mean over the batch.

    student, teacher: [B, D, H, W] before their activation; margin: [D], not above 0. Returns a scalar, float32 or wider, which grows
    with the size of the map.
    """
    student, teacher, margin = loss_precision(student, teacher, margin)
    goal = torch.maximum(teacher, margin.to(teacher.dtype)[:, None, None])
    counted = (teacher > 0) | (student > goal)
    return torch.where(counted, student - goal, 0.0).square().sum() / len(student)


class OFD(FeatureMethod):
    """Match features before the activation; where the teacher is negative, ask only that the student be so, too.

    The margin of a channel is the mean of its negative half, from the teacher's batch norm in front of the activation; it is rounded to
    float32, as in the code this was checked against. A stage counts half as much as the next deeper one. Places are compared before
    the last activation of a stage where that is a module; a teacher that has none, or no batch norm there, needs taps that are named.
    """

    paper = Paper(
        "A Comprehensive Overhaul of Feature Distillation",
        arxiv="1904.01866",
        venue="ICCV 2019",
        formula="L = w_task L_task + weight sum_k 2^(k + 1 - L) d_p(BN(conv1x1(f_s^k)), max(f_t^k, m^k))",
        checked_against="megvii-research/mdistiller@a08d46f",
    )
    reads = MAPS_ALONE
    needs_teacher_network = True

    class Params(FeatureMethod.Params):
        """The distance is a sum over channels and positions: the weight that suits a map grows as the map shrinks."""

        weight: Annotated[float, Range(1e-5, 1e-2, log=True), Field(ge=0)] = 1e-3

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """All stages that both have, before their activations."""
        ours, theirs = paired_stages(student, teacher)
        return before_activation(student, ours), before_activation(teacher, theirs)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self._shapes: list[tuple[TapShape, TapShape]] = self.pairs(student, teacher)
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(ours[0], theirs[0], kernel_size=1, bias=False), nn.BatchNorm2d(theirs[0]))
            for ours, theirs in self.map_pairs(student, teacher)
        )

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        for position, (tap, (ours, theirs)) in enumerate(zip(self.teacher_taps, self._shapes, strict=True)):
            norm = _norm_before(network, example, tap)
            if norm is None:
                way_out = "it takes its margins from a batch norm; name a teacher's tap that is one, or `before:` an activation behind one"
                raise self.unfit(position, ours, theirs, way_out)
            self.register_buffer(f"margin{position}", margins(norm.weight, norm.bias).float(), persistent=False)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = []
        for position, ((feature, goal), connector) in enumerate(zip(self.read_maps(s, t), self.connectors, strict=True)):
            distance = partial_distance(*to_smaller(connector(feature), goal), self.get_buffer(f"margin{position}"))
            losses.append(distance / 2 ** (len(self.connectors) - position - 1))
        return {"partial": self.params.weight * torch.stack(losses).sum()}


def _norm_before(network: nn.Module, example: Example, tap: str) -> nn.BatchNorm2d | None:
    """The batch norm whose output is tapped, or the last one in front of the tapped activation, inside the module that holds both."""
    place = locate(network, example, tap)
    if not place.reads_input:
        return place.module if type(place.module) is nn.BatchNorm2d else None
    holder = network.get_submodule(place.path.rpartition(".")[0])
    if isinstance(holder, nn.BatchNorm2d):  # timm's, with the activation inside
        return holder
    beside = list(holder.children())
    if isinstance(holder, nn.Sequential):
        beside = beside[: beside.index(place.module)]
    fitting = [module for module in beside if isinstance(module, nn.BatchNorm2d) and module.num_features == place.shape.channels]
    return fitting[-1] if fitting and fitting[-1].affine else None
