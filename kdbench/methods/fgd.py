"""Focal and global distillation for detectors, FGD (Yang et al., CVPR 2022, arXiv 2111.11837)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdbench.data.batch import Batch
from kdbench.data.columns import named, several
from kdbench.data.kinds import NO_OBJECT
from kdbench.errors import UserError
from kdbench.methods.base import Paper, Progress, loss_precision
from kdbench.methods.features import FeatureMethod, Names, paired_levels
from kdbench.methods.presets import PerElement, Presets
from kdbench.models.adapters import to_smaller, to_width
from kdbench.models.outputs import Outputs, Shapes
from kdbench.search.space import Range
from kdbench.tasks.base import TaskInfo

# The authors' pyramids have 256 channels. Their finest map is that of stride 8 in one-stage detectors, of stride 4 in two-stage ones,
# for pictures of 800 x 1216 pixels.
_CHANNELS, _ONE_STAGE, _TWO_STAGE = 256, 100 * 152, 200 * 304


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """H W softmax over positions of the mean over channels of |features| / T: [B, H, W] of mean 1, from [B, C, H, W]."""
    samples, _, height, width = features.shape
    weights = (features.abs().mean(1).flatten(1) / temperature).softmax(dim=1)
    return (height * width * weights).view(samples, height, width)


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """C softmax over channels of the mean over positions of |features| / T: [B, C] of mean 1, from [B, C, H, W]."""
    return features.shape[1] * (features.abs().mean((2, 3)) / temperature).softmax(dim=1)


def foreground(boxes: Tensor, counts: Tensor, sizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """One over the area of the smallest box that covers a cell, 0 where none does.

    A box covers the cells from the floor of its upper left corner to the ceiling of its lower right one, both included, as in the authors'
    code; it is thus up to one row and column larger than its pixels. Its area is counted in these cells, those beyond the lower and right
    edge too. What is left of the picture or above it is cut off first.

    Args:
        boxes: [B, M, 4] of x0, y0, x1, y1 in pixels of the input.
        counts: bool [B, M], which rows count.
        sizes: [B, 2], height and width of each picture in these pixels.
        grid: H and W of the map.

    Returns:
        [B, H, W] of the boxes' type. Without gradients.
    """
    height, width = grid
    corners, shares = boxes.detach().clamp(min=0), sizes.to(boxes)[:, None]
    x, y = (corners[..., axis::2] / shares[..., 1 - axis, None] * side for axis, side in enumerate((width, height)))  # [B, M, 2] in cells
    (left, right), (upper, lower) = ((ends[..., :1].floor(), ends[..., 1:].ceil()) for ends in (x, y))
    areas = ((right - left + 1) * (lower - upper + 1)).squeeze(-1)
    columns, rows = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    inside_x = (columns >= left) & (columns <= right) & counts[..., None]  # [B, M, W]
    inside_y = (rows >= upper) & (rows <= lower)  # [B, M, H]
    masks = []
    for across, down, values in zip(inside_x, inside_y, 1 / areas, strict=True):  # a picture at a time: M maps of all may not fit
        covered = torch.where(down[:, :, None] & across[:, None], values[:, None, None], 0.0)
        masks.append(torch.cat([covered, covered.new_zeros(1, height, width)]).amax(0))
    return torch.stack(masks)


def background(covered: Tensor) -> Tensor:
    """One over the number of a picture's cells that no box covers, in these cells; 0 in the others. covered: of `foreground`, [B, H, W]."""
    free = (covered == 0).to(covered.dtype)
    return free / free.sum((1, 2), keepdim=True).clamp(min=1)


def focal_distance(student: Tensor, teacher: Tensor, mask: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    """Squared difference times mask and both attentions, summed over a sample's features, mean over samples.

    student, teacher: [B, C, H, W]. mask, spatial: [B, H, W]. channel: [B, C]. Returns a scalar, float32 or wider.
    """
    student, teacher = loss_precision(student, teacher)
    weights = (mask * spatial)[:, None] * channel[:, :, None, None]
    return (weights * (student - teacher).square()).sum() / len(student)


def attention_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Absolute difference of the two maps' attentions over space and over channels, summed, mean over samples."""
    student, teacher = loss_precision(student, teacher)
    space, channels = (
        (attention(student, temperature) - attention(teacher, temperature)).abs().sum()
        for attention in (spatial_attention, channel_attention)
    )
    return (space + channels) / len(student)


class GlobalContext(nn.Module):
    """Adds to each position of a map what a bottleneck makes of the whole of it (GcBlock: Cao et al., ICCVW 2019, arXiv 1904.11492).

    It begins as the identity: the last convolution is zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.weigh = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        last = self.add[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] from the same."""
        weights = self.weigh(features).flatten(2).softmax(dim=2)  # [B, 1, H W]
        context = (features.flatten(2) * weights).sum(2)[..., None, None]
        added: Tensor = self.add(context)
        return features + added


class Level(nn.Module):
    """What is learned beside the student for one pair of maps: the way from its width to the teacher's, and a context block for each."""

    def __init__(self, student: int, teacher: int) -> None:
        """student, teacher: channels."""
        super().__init__()
        self.align = to_width(student, teacher)
        self.student, self.teacher = GlobalContext(teacher), GlobalContext(teacher)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Squared difference of the maps with their contexts, summed over a sample's features, mean over samples."""
        gaps: Tensor = self.student(student) - self.teacher(teacher)
        return gaps.square().sum() / len(student)


class FGD(FeatureMethod):
    """Imitate a detector's features in and around the objects apart, weighed by the teacher's attention, and how positions relate.

    At every level of the pyramid. The authors' two pyramids have equal sizes; here the larger map is averaged down where they differ.
    """

    paper = Paper(
        "Focal and Global Knowledge Distillation for Detectors",
        arxiv="2111.11837",
        venue="CVPR 2022",
        formula="L = w_task L_task + sum_levels 1 / B sum (alpha M_fg + beta M_bg) A_S A_C (f_s - f_t)^2 "
        "+ gamma (|A_S^s - A_S^t| + |A_C^s - A_C^t|) + lambda (R_s(f_s) - R_t(f_t))^2",
        checked_against="yzd-v/FGD@c03a6cf",
    )
    reads = frozenset({"boxes"})
    needs_labels = True
    presets: ClassVar[Presets] = {
        "proposals": {
            "alpha": PerElement(5e-5, "channels", of=_CHANNELS),
            "gamma": PerElement(5e-5, "channels + positions", of=_CHANNELS + _TWO_STAGE),
            "relation": PerElement(5e-7, "values", of=_CHANNELS * _TWO_STAGE),
        },
        "boxes": {
            "alpha": PerElement(1e-3, "channels", of=_CHANNELS),
            "gamma": PerElement(5e-4, "channels + positions", of=_CHANNELS + _ONE_STAGE),
            "relation": PerElement(5e-6, "values", of=_CHANNELS * _ONE_STAGE),
        },
    }

    class Params(FeatureMethod.Params):
        """Weights are those of RetinaNet; the authors have alpha 1.6e-3, gamma 8e-4, relation 8e-6 for RepPoints and FCOS, which has T 0.8.

        The losses are sums, as the authors', so their weights belong to a size of the maps: 256 channels, 100 x 152 positions on the finest
        level. The defaults on a pair of networks are these times the ratio of what each sum grows with. alpha: of the objects, its masks
        are divided by areas, so it grows with channels alone. beta: of the background; none means half of alpha, as the authors have it
        everywhere. gamma: of the attentions, which grow with channels and positions. relation: the authors' lambda, of the maps with their
        contexts, which grow with channels times positions. temperature: of both attentions.
        """

        alpha: Annotated[float, Range(1e-4, 1e-2, log=True), Field(ge=0)] = 1e-3
        beta: Annotated[float | None, Field(ge=0)] = None
        gamma: Annotated[float, Range(5e-5, 5e-3, log=True), Field(ge=0)] = 5e-4
        relation: Annotated[float, Range(5e-7, 5e-5, log=True), Field(ge=0)] = 5e-6
        temperature: Annotated[float, Range(0.1, 2.0, log=True), Field(gt=0)] = 0.5

    params: Params

    def default_taps(self, student: Shapes, teacher: Shapes) -> tuple[Names, Names]:
        """Every level that both pyramids have."""
        found = paired_levels(student, teacher)
        if found is None:
            raise UserError("one of the networks names no levels of a pyramid (`level_modules`)")
        return found

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.levels = nn.ModuleList(Level(ours[0], theirs[0]) for ours, theirs in self.map_pairs(student, teacher))

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        params = self.params
        boxes, counts, sizes = objects_of(batch)
        sums: dict[str, list[Tensor]] = {"foreground": [], "background": [], "attention": [], "relation": []}
        for level, maps in zip(self.levels, self.read_maps(s, t), strict=True):
            assert isinstance(level, Level)
            ours, theirs = to_smaller(level.align(maps[0]), maps[1])
            covered = foreground(boxes.to(theirs.dtype), counts, sizes, (theirs.shape[2], theirs.shape[3]))
            attention = spatial_attention(theirs, params.temperature), channel_attention(theirs, params.temperature)
            sums["foreground"].append(focal_distance(ours, theirs, covered, *attention))
            sums["background"].append(focal_distance(ours, theirs, background(covered), *attention))
            sums["attention"].append(attention_distance(ours, theirs, params.temperature))
            sums["relation"].append(level.relation(ours, theirs))
        beta = params.alpha / 2 if params.beta is None else params.beta
        weights = {"foreground": params.alpha, "background": beta, "attention": params.gamma, "relation": params.relation}
        return {name: weights[name] * torch.stack(values).sum() for name, values in sums.items()}


def objects_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B, M, 4] of a batch of a detection task, bool [B, M] which of them are objects to learn, and [B, 2] its pictures' sizes.

    Padded rows, rows that a view has emptied and crowds are none.
    """
    target = several(batch.target)
    boxes = target["boxes"]
    counts = (target["labels"] != NO_OBJECT) & (boxes != 0).any(-1)
    if "crowd" in target:
        counts = counts & ~target["crowd"].bool()
    pictures = [column for column in named(batch.inputs, "").values() if column.ndim == 4]
    height, width = pictures[0].shape[-2:]
    sizes = torch.stack([boxes.new_full((len(boxes),), float(side)) for side in (height, width)], dim=1)  # made on the device
    return boxes, counts, sizes
