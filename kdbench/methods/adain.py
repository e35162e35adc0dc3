"""Distillation via adaptive instance normalization (Yang, Martinez, Bulat & Tzimiropoulos, 2020, arXiv 2003.04289)."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_stages, stages
from kdbench.methods.kd import softened_divergence
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.tail import Tail
from kdbench.models.taps import locate, tap_shapes
from kdbench.models.trace import Example
from kdbench.search.space import Choice, Range, When
from kdbench.tasks.base import TaskInfo

Judgement = Literal["logit_mse", "logit_kl", "feature_mse"]
_EPSILON = 1e-5


def style(features: Tensor, epsilon: float = _EPSILON) -> tuple[Tensor, Tensor]:
    """Mean and deviation, [B, D, 1, 1] each, of every channel of [B, D, H, W] over its positions; the variance is biased, plus epsilon."""
    (features,) = loss_precision(features)
    variance, mean = torch.var_mean(features, dim=(2, 3), correction=0, keepdim=True)
    return mean, (variance + epsilon).sqrt()


def restyled(content: Tensor, styled: Tensor, epsilon: float = _EPSILON) -> Tensor:
    """AdaIN: `content` [B, D, H, W] with means and deviations of `styled` [B, D, h, w]; float32 or wider."""
    content, styled = loss_precision(content, styled)
    (mean, deviation), (wanted_mean, wanted_deviation) = style(content, epsilon), style(styled, epsilon)
    return wanted_deviation * (content - mean) / deviation + wanted_mean


def style_distance(student: Tensor, teacher: Tensor, epsilon: float = _EPSILON) -> Tensor:
    """Mean over samples and channels of the squared differences of means and of deviations, added; a scalar."""
    (mean_s, deviation_s), (mean_t, deviation_t) = style(student, epsilon), style(teacher, epsilon)
    return ((mean_s - mean_t).square() + (deviation_s - deviation_t).square()).mean()


class AdaIN(FeatureMethod):
    """Put the student's channel statistics into the teacher's features, and let the rest of the teacher judge the difference.

    After the paper, of which no code was published: the judgement, the places, both weights and the adapter are our reading of it.
    The judge's probabilities are the default because a distance between its logits grows without bound, and trainings diverged of it.
    At a place that is followed by nothing but averaging and a linear layer, deviations make no difference to the judge.
    """

    paper = Paper(
        "Knowledge distillation via adaptive instance normalization",
        arxiv="2003.04289",
        formula="L = w_task CE + weight d(g(A), g(f_t)) + style_weight mean ((mu_s - mu_t)^2 + (sigma_s - sigma_t)^2);  "
        "A = sigma_s (f_t - mu_t) / sigma_t + mu_s",
    )
    needs_teacher_network = True

    class Params(FeatureMethod.Params):
        """judgement: the distance between what the teacher makes of both, at its logits or at its next stage.

        adapter: a 1x1 convolution in front of the student's statistics; only where both are of one width can it be left out.
        """

        weight: Annotated[float, Range(0.01, 100.0, log=True), Field(ge=0)] = 1.0
        style_weight: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.0
        judgement: Annotated[Judgement, Choice(get_args(Judgement))] = "logit_kl"
        temperature: Annotated[float, Range(1.0, 4.0, log=True, when=When("judgement", ("logit_kl",))), Field(gt=0)] = 1.0
        adapter: bool = True
        epsilon: Annotated[float, Field(gt=0)] = _EPSILON

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """All stages that both have."""
        return paired_stages(student, teacher)

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        pairs = self.pairs(student, teacher)
        self.adapters = nn.ModuleList()
        for position, ((channels, *_), (wanted, *_)) in enumerate(self.map_pairs(student, teacher)):
            if pairs[position][1].kind != "map":
                raise self.unfit(position, *pairs[position], "the teacher's tap must be a map, whose channels have statistics over space")
            if not self.params.adapter and channels != wanted:
                way_out = "without an adapter both need the same number of channels; leave out `adapter: false`"
                raise self.unfit(position, *pairs[position], way_out)
            self.adapters.append(nn.Conv2d(channels, wanted, kernel_size=1, bias=False) if self.params.adapter else nn.Identity())

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        self._judges = [Tail(network, tap, example) for tap in self.teacher_taps]
        if self.params.judgement == "feature_mse":
            self._judges = [Tail(network, tap, example, until=_next_stage(network, example, tap)) for tap in self.teacher_taps]

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        judged, distances, epsilon = [], [], self.params.epsilon
        for (feature, content), adapter, judge in zip(self.read_maps(s, t), self.adapters, self._judges, strict=True):
            feature = adapter(feature)
            # Both in one call: what is the same is then judged the same to the last bit.
            judged.append(self._distance(*judge(torch.cat([restyled(content, feature, epsilon), content])).chunk(2)))
            distances.append(style_distance(feature, content, epsilon))
        params = self.params
        return {
            "judged": params.weight * torch.stack(judged).sum(),
            "style": params.style_weight * torch.stack(distances).sum(),
        }

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.params.judgement == "logit_kl":
            return softened_divergence(student, teacher, self.params.temperature)
        student, teacher = loss_precision(student, teacher)
        return F.mse_loss(student, teacher)


def _next_stage(network: nn.Module, example: Example, tap: str) -> str:
    """The teacher's first stage behind the tap; what its classifier reads behind the last."""
    seen = list(tap_shapes(network, example).taps)
    here = seen.index(locate(network, example, tap).path)
    behind = [stage for stage in stages(tap_shapes(network, example)) if seen.index(locate(network, example, stage).path) > here]
    return behind[0] if behind else "pooled"
