"""One-for-all distillation, OFA-KD: exits of the student learn the teacher's logits (Hao et al., NeurIPS 2023, arXiv 2310.19444)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.catalogue import nearest
from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.features import positions, stages
from kdbench.methods.logits import hard_labels, require_same_classes
from kdbench.models.adapters import class_tokens, map_shape
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

_MERGED_GRID = 7  # tokens are merged, two by two a side, while at least twice as many as this stand on a side
_HEADS = 4
_MLP_RATIO = 4

Positive = Annotated[float, Field(gt=0)]


def ofa_loss(student: Tensor, teacher: Tensor, target: Tensor, eps: float, temperature: float) -> Tensor:
    """-mean_b sum_c ((p_c + e_c)^eps - e_c) log q_c, with p and q softmax at temperature T, e the label's one-hot; no factor T^2.

    The label has the weight (1 + p_y)^eps - 1, another class p_c^eps: with eps 1 it is the cross-entropy with the teacher. The paper's text
    has the exponent on the label's part alone; this is the authors' code.

    student, teacher: logits [B, C]; target: int64 [B], or soft [B, C] of which the largest entry counts.
    Returns a scalar, float32 or wider.
    """
    student, teacher = loss_precision(student, teacher)
    p, log_q = F.softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    label = F.one_hot(hard_labels(target), teacher.shape[1]).to(p.dtype)
    return -(((p + label) ** eps - label) * log_q).sum(dim=1).mean()


class OneForAll(Method):
    """Exits at the student's stages, each a small projector with a classifier of its own, learn the teacher's logits.

    It asks nothing of the teacher but logits, so any architecture can teach any other. A stage that is a map goes through separable
    convolutions, as often as there are stages behind it; tokens through patch merging and transformer blocks. Which it is tells the shape
    alone: a Swin student has maps, where the authors would give it the projectors for tokens.
    """

    paper = Paper(
        "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        arxiv="2310.19444",
        venue="NeurIPS 2023",
        formula="L = w_task CE + w_kd ofa(z_s, z_t) + w_ofa sum_k ofa(h_k, z_t);  ofa = -sum_c ((p_c + e_c)^eps - e_c) log q_c",
        checked_against="Hao840/OFAKD@f7bb896",
    )

    class Params(Method.Params):
        """eps: one number for all, or one for each exit and the student's own logits' last; 1.5 on ImageNet with a DeiT teacher.

        student_taps: where the exits are; empty: at every stage. For each of them, chosen for the pair: stages_behind, how many stages
        follow it; widths, the channels that its projector ends in.
        """

        temperature: Annotated[float, Range(1.0, 4.0, log=True), Field(gt=0)] = 1.0
        eps: Annotated[Positive | tuple[Positive, ...], Range(1.0, 1.5)] = 1.0
        ofa_weight: Annotated[float, Range(0.1, 2.0, log=True), Field(ge=0)] = 1.0
        kd_weight: Annotated[float, Field(ge=0)] = 1.0
        student_taps: tuple[str, ...] = ()
        stages_behind: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = ()
        widths: tuple[Annotated[int, Field(ge=1, le=2**16)], ...] = ()

    params: Params

    def __init__(self, params: Method.Params | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(params, generator)
        self.student_taps = self.params.student_taps

    @property
    def taps_chosen(self) -> bool:
        return bool(self.params.student_taps and self.params.stages_behind and self.params.widths)

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        require_same_classes("ofa", student, teacher)
        assert teacher is not None, "refused in the line above"
        params = self.params
        try:
            found = stages(student)
        except UserError as error:
            raise UserError(f"method ofa puts exits at the student's stages: {error}") from error
        taps = params.student_taps or tuple(found)
        for name in taps:
            _check_exit(name, student)
        behind = params.stages_behind or tuple(_stages_behind(name, found, student) for name in taps)
        ours, theirs = _last_width(student), _last_width(teacher)
        widths = params.widths or tuple(_projector_width(student.taps[name], ours, theirs) for name in taps)
        return params.model_copy(update={"student_taps": taps, "stages_behind": behind, "widths": widths})

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        require_same_classes("ofa", student, teacher)
        params, exits = self.params, len(self.student_taps)
        self._eps = params.eps if isinstance(params.eps, tuple) else (params.eps,) * (exits + 1)
        for key, entries, wanted in (
            ("eps", self._eps, exits + 1),
            ("stages_behind", params.stages_behind, exits),
            ("widths", params.widths, exits),
        ):
            if len(entries) != wanted:
                raise UserError(
                    f"method ofa: {key} has {len(entries)} entries, expected {wanted} for the exits {', '.join(self.student_taps)}"
                )
        self.projectors = nn.ModuleList()
        for name, behind, width in zip(self.student_taps, params.stages_behind, params.widths, strict=True):
            shape = student.taps[name]
            kind = MapProjector if shape.kind == "map" else TokenProjector
            self.projectors.append(kind(shape, behind, width, student.logits[0]))

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert t is not None
        params, losses = self.params, []
        for name, projector, eps in zip(self.student_taps, self.projectors, self._eps[:-1], strict=True):
            (features,) = loss_precision(s.maps[name])
            losses.append(ofa_loss(projector(features), t.logits, batch.labels, eps, params.temperature))
        return {
            "ofa": params.ofa_weight * torch.stack(losses).sum(),
            "kd": params.kd_weight * ofa_loss(s.logits, t.logits, batch.labels, self._eps[-1], params.temperature),
        }


def _check_exit(name: str, student: Shapes) -> None:
    """Raise UserError where the student has no such place, or one that no projector can start from."""
    if name not in student.taps:
        raise UserError(f"method ofa: student_taps: there is no tap {name!r}{nearest(name, student.taps)}")
    try:
        map_shape(student.taps[name])
    except UserError as error:
        raise UserError(f"method ofa: student_taps: {name!r}: {error}") from error


def _stages_behind(name: str, found: list[str], student: Shapes) -> int:
    """How many of the student's stages, `found`, come after the place `name`: by its order, or by its resolution if it is none of them."""
    if name in found:
        return len(found) - 1 - found.index(name)
    return sum(positions(student.taps[stage]) < positions(student.taps[name]) for stage in found)


def _last_width(shapes: Shapes) -> int:
    """Channels of what the classifier reads, or of the last stage; 1 where neither is known."""
    return next((shapes.taps[name].channels for name in ("pooled", "stage:-1") if name in shapes.taps), 1)


def _projector_width(shape: TapShape, student: int, teacher: int) -> int:
    """Of maps the wider one of the two networks' last features; of tokens the student's, or their own if a class token goes along."""
    if shape.kind != "tokens":
        return max(student, teacher)
    return shape.channels if class_tokens(shape) else student


class MapProjector(nn.Module):
    """[B, D, H, W] -> logits [B, classes]: each separable convolution halves the map and doubles its channels, the last ends in `width`.

    A last stage has no convolution of that kind, but a pointwise one.
    """

    def __init__(self, shape: TapShape, convolutions: int, width: int, classes: int) -> None:
        super().__init__()
        channels = [shape.channels * 2**step for step in range(convolutions)] + [width]
        chain = [SeparableConvolution(*pair) for pair in pairwise(channels)]
        self.reduce = nn.Sequential(*chain) if chain else nn.Conv2d(shape.channels, width, kernel_size=1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.reduce(features).mean((2, 3)))
        return logits


class SeparableConvolution(nn.Module):
    """Depthwise 3x3 with stride 2, pointwise, batch norm, ReLU; then the same with stride 1: [B, D, H, W] -> [B, width, H / 2, W / 2]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.op = nn.Sequential(*_separable(channels, channels, stride=2), *_separable(channels, width, stride=1))

    def forward(self, features: Tensor) -> Tensor:
        reduced: Tensor = self.op(features)
        return reduced


def _separable(channels: int, width: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, groups=channels, bias=False)
    return [depthwise, nn.Conv2d(channels, width, kernel_size=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


class TokenProjector(nn.Module):
    """Tokens [B, N, D] -> logits [B, classes]: patches merged to a grid of at least 7 a side, blocks, a linear layer.

    That reads the class tokens' mean where there are any, the mean of all tokens otherwise.
    """

    def __init__(self, shape: TapShape, blocks: int, width: int, classes: int) -> None:
        """width: of merged tokens; where there are too few to merge, they keep theirs."""
        super().__init__()
        from timm.models.vision_transformer import Block  # takes seconds to import, which a student that has maps need not pay

        self.prefix = class_tokens(shape)
        side = map_shape(shape)[1]
        merges = max(0, int(math.log2(side / _MERGED_GRID)))
        channels = [shape.channels] + [width] * merges
        self.merging = nn.ModuleList(PatchMerging(*pair) for pair in pairwise(channels))
        inner, self._side = channels[-1], side
        self.blocks = nn.Sequential(*(Block(inner, math.gcd(_HEADS, inner), _MLP_RATIO) for _ in range(max(blocks, 1))))
        self.classifier = nn.Linear(inner, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        grid = tokens[:, self.prefix :].unflatten(1, (self._side, self._side))
        for step, merge in enumerate(self.merging):
            grid = merge(grid)
            if step == 0 or step + 1 < len(self.merging):  # the last of several is linear
                grid = F.gelu(grid)
        patches = grid.flatten(1, 2)
        seen = self.blocks(torch.cat([tokens[:, : self.prefix], patches], dim=1) if self.prefix else patches)
        logits: Tensor = self.classifier((seen[:, : self.prefix] if self.prefix else seen).mean(1))
        return logits


class PatchMerging(nn.Module):
    """Two by two tokens become one: [B, H, W, D] -> [B, H / 2, W / 2, width], with zeros beside an odd last row or column."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, width, bias=False)

    def forward(self, grid: Tensor) -> Tensor:
        even = F.pad(grid, (0, 0, 0, grid.shape[2] % 2, 0, grid.shape[1] % 2))
        quads = torch.cat([even[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=3)
        merged: Tensor = self.reduction(self.norm(quads))
        return merged
