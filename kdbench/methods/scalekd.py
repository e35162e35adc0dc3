"""ScaleKD: features in two views, as the rest of the teacher goes on with them (Fan et al., NeurIPS 2024, arXiv 2411.06786)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, output_place, stages
from kdbench.methods.kd import softened_cross_entropy
from kdbench.methods.logits import require_same_classes
from kdbench.models.adapters import as_map, as_tokens, class_tokens
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.tail import Tail
from kdbench.models.trace import Example
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

MapShape = tuple[int, int, int]
Norm = Literal["batch", "layer"]
Weight = Annotated[float, Field(ge=0)]

_CHANNELS_OF_A_HEAD = 64  # as the authors have it for Swin-B; 48 to 128 for others
_FFN_RATIO = 4


def spatial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of features scaled to length 1 at each position, summed over positions, averaged over samples: 4 H W at most.

    student, teacher: [B, D, H, W]. Returns a scalar, float32 or wider.
    """
    student, teacher = (F.normalize(features, dim=1) for features in loss_precision(student, teacher))
    return (student - teacher).square().sum() / len(student)


def frequency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`spatial_loss` without what is the same everywhere: of a cosine transform the constant component left out.

    To leave it out and to transform back is to subtract each channel's mean over space. Shapes as in `spatial_loss`.
    """
    student, teacher = (features - features.mean((2, 3), keepdim=True) for features in loss_precision(student, teacher))
    return spatial_loss(student, teacher)


class CrossAttention(nn.Module):
    """Queries [B, L, D_t] look at a student's tokens [B, N, D_s]; gives [B, L, D_t].

    sharpness: a factor on the logits of the attention, beside the usual 1 / sqrt(channels of a head).
    """

    def __init__(self, student: int, teacher: int, heads: int, sharpness: float) -> None:
        super().__init__()
        self.q = nn.Linear(teacher, teacher)
        self.k, self.v = nn.Linear(student, teacher), nn.Linear(student, teacher)
        self.proj = nn.Linear(teacher, teacher)
        self.heads = heads
        self.scale = sharpness * (teacher // heads) ** -0.5

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (self.q(query), self.k(tokens), self.v(tokens)))
        seen = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        mixed: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return mixed


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B, D, H, W], at each position alone."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class CrossAttentionProjector(nn.Module):
    """A student's map [B, D_s, H_s, W_s] as the teacher would have it, [B, D_t, H_t, W_t]: attended to by one query for each position.

    There is no residual connection from the query, and the one around the feed-forward part begins behind the norm.
    """

    def __init__(self, student: MapShape, teacher: MapShape, heads: int, sharpness: float, own_query: bool, norm: Norm = "batch") -> None:
        """student, teacher: [D, H, W]. own_query: whether queries are learned here; else they come with every call."""
        super().__init__()
        (channels, *size), (width, height_t, width_t) = student, teacher
        self.grid = height_t, width_t
        normalize = nn.BatchNorm2d(channels) if norm == "batch" else ChannelNorm(channels)
        self.features = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=3, padding=1), normalize, nn.ReLU())
        self.position = nn.Parameter(torch.zeros(1, channels, *size))
        self.query = nn.Parameter(torch.randn(height_t * width_t, width)) if own_query else None
        self.query_projection = nn.Conv2d(width, width, kernel_size=1)
        self.attention = CrossAttention(channels, width, heads, sharpness)
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, _FFN_RATIO * width), nn.ReLU(), nn.Linear(_FFN_RATIO * width, width))

    def forward(self, features: Tensor, query: Tensor | None = None) -> Tensor:
        """query: [B, D_t, H_t, W_t], in place of the learned one."""
        if query is None:
            assert self.query is not None, "a projector without a query of its own is given one"
            query = self.query.T.unflatten(1, self.grid).expand(len(features), -1, -1, -1)
        queries = F.relu(self.query_projection(query)).flatten(2).transpose(1, 2)
        tokens = (self.features(features) + self.position).flatten(2).transpose(1, 2)
        seen = self.norm(self.attention(queries, tokens))
        projected: Tensor = seen + self.ffn(seen)
        map_: Tensor = projected.transpose(1, 2).unflatten(2, self.grid)
        return map_


class DualView(nn.Module):
    """Two projectors for one stage, of one form and with weights of their own: for the spatial view and for the frequency view."""

    def __init__(
        self, student: MapShape, teacher: MapShape, heads: int, sharpness: Sequence[float], own_query: bool, norm: Norm = "batch"
    ) -> None:
        """sharpness: of the two views' attention; the rest as for `CrossAttentionProjector`."""
        super().__init__()
        self.spatial, self.frequency = (CrossAttentionProjector(student, teacher, heads, view, own_query, norm) for view in sharpness)

    def forward(self, features: Tensor, queries: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
        return self.spatial(features, queries[0]), self.frequency(features, queries[1])


class ScaleKD(FeatureMethod):
    """Match the teacher's last features in two views, from two stages of the student, beside the teacher's logits.

    The student's last stage but one is projected to the teacher's place of the same rank, and the rest of the frozen teacher makes last
    features of it; these are compared, and are the queries that the student's last stage is projected with. So gradients pass through the
    teacher, which has to run for every step. Behind a class token the teacher's own goes along.
    """

    paper = Paper(
        "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
        arxiv="2411.06786",
        venue="NeurIPS 2024",
        formula="L = w_task CE + w_kd KD + sum_stages a0 |n(P) - n(t)|^2 + a1 |n(P' - mean P') - n(t - mean t)|^2,  n: to length 1",
        checked_against="deep-optimization/ScaleKD@478a7db",
    )
    needs_teacher_network = True

    class Params(FeatureMethod.Params):
        """spatial_weight, frequency_weight: of both stages, or of each (the last stage second; 0 there for Swin-S and ResNet-50). They
        multiply sums over the positions of the teacher's last features: the defaults are for 7 x 7.

        sharpness: of the attention, of both views or of each. heads: of the attention in each stage; without, one for 64 channels.
        norm: of the student's features in the projectors; layer for ConvNeXt, as the authors have it. The taps are two pairs: the last
        stage but one, and the features behind the last.
        """

        task_weight: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.5
        kd_weight: Annotated[float, Range(0.0, 1.0), Field(ge=0)] = 0.5
        temperature: Annotated[float, Field(gt=0)] = 1.0
        spatial_weight: Annotated[Weight | tuple[Weight, Weight], Range(5e-3, 0.5, log=True)] = 0.08
        frequency_weight: Annotated[Weight | tuple[Weight, Weight], Range(5e-3, 0.5, log=True)] = 0.06
        sharpness: Annotated[Weight | tuple[Weight, Weight], Range(1.0, 10.0, log=True)] = 5.0
        heads: tuple[Annotated[int, Field(ge=1, le=1024)], Annotated[int, Field(ge=1, le=1024)]] | None = None
        norm: Norm = "batch"

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """The last stage but one, and the place behind the last."""
        for name, shapes in (("student", student), ("teacher", teacher)):
            if len(stages(shapes)) < 2:
                raise UserError(f"it compares two stages, and the {name} has one")
        return (stages(student)[-2], output_place(student)), (stages(teacher)[-2], output_place(teacher))

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("scalekd", student, teacher)
        if len(self.student_taps) != 2:
            raise UserError(f"method scalekd compares two places of each network, got student_taps {', '.join(self.student_taps)}")
        maps = self.map_pairs(student, teacher)
        self._shapes: list[tuple[TapShape, TapShape]] = self.pairs(student, teacher)
        heads = self.params.heads or tuple(_heads(theirs[0]) for _, theirs in maps)
        for position, (count, (_, theirs)) in enumerate(zip(heads, maps, strict=True)):
            if theirs[0] % count:
                tap = self.teacher_taps[position]
                raise UserError(f"method scalekd: heads: {count} do not divide the {theirs[0]} channels of the teacher's {tap!r}")
        sharpness = _two(self.params.sharpness)
        self.perceived = DualView(*maps[0], heads[0], sharpness, own_query=True, norm=self.params.norm)
        self.last = DualView(*maps[1], heads[1], sharpness, own_query=False, norm=self.params.norm)

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        tap, until = self.teacher_taps
        self._rest_of_teacher = Tail(network, tap, example, until)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        params = self.params
        (shape_s, _), (shape_last, shape_t) = self._shapes
        early, late = loss_precision(as_map(s.maps[self.student_taps[0]], shape_s), as_map(s.maps[self.student_taps[1]], shape_last))
        (goal,) = loss_precision(as_map(t.maps[self.teacher_taps[1]], shape_t))
        spatial, frequency = (self._perceive(projected, t) for projected in self.perceived(early))
        last_spatial, last_frequency = self.last(late, (spatial, frequency))
        weight_s, weight_f = _two(params.spatial_weight), _two(params.frequency_weight)
        return {
            "spatial": weight_s[0] * spatial_loss(spatial, goal),
            "frequency": weight_f[0] * frequency_loss(frequency, goal),
            "last_spatial": weight_s[1] * spatial_loss(last_spatial, goal),
            "last_frequency": weight_f[1] * frequency_loss(last_frequency, goal),
            "kd": params.kd_weight * softened_cross_entropy(s.logits, t.logits, params.temperature),
        }

    def _perceive(self, projected: Tensor, t: Outputs) -> Tensor:
        """What the rest of the teacher makes of a map [B, D, H, W] that stands where its own features would: its last ones, as a map."""
        (_, shape), (_, last) = self._shapes
        if shape.kind == "tokens":
            (own,) = loss_precision(t.maps[self.teacher_taps[0]])
            projected = torch.cat([own[:, : class_tokens(shape)], as_tokens(projected, TapShape("map", projected.shape[1:]))], dim=1)
        return as_map(self._rest_of_teacher(projected), last)


def _two(value: float | tuple[float, float]) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)


def _heads(width: int) -> int:
    """The most heads that have at least 64 channels each and divide them evenly; one where there are not as many channels."""
    return max((count for count in range(1, width // _CHANNELS_OF_A_HEAD + 1) if width % count == 0), default=1)
