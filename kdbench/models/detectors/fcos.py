"""A small detector without anchors: each cell of a feature pyramid says which object it lies in and how far that object's sides are.

Source: Tian et al., ICCV 2019 (arXiv 1904.01355), without the centre-ness branch: with centre sampling, cells far from an object's centre
are background already.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.positions import MOST_LEVELS, strides_of_levels
from kdbench.models.initial_weights import he_by_fan_out, small_head

_PRIOR = 0.01  # score of every class at every cell before training: Lin et al., ICCV 2017 (arXiv 1708.02002), section 4.1
_MOST_GROUPS = 8  # of a group norm


class FCOS(nn.Module):
    """A backbone of w, 2w, 4w, ... channels, a pyramid of 3w channels at each level, and one head that all levels share.

    level_modules: paths of the modules that give the pyramid's maps [B, 3w, ceil(H / stride), ceil(W / stride)], the finest first.
    reading: says what a level's channels hold.
    """

    stage_modules: tuple[str, ...]
    level_modules: tuple[str, ...]
    reading: CellReading

    def __init__(self, width: int, levels: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if not 1 <= levels <= MOST_LEVELS:
            raise UserError(f"levels must be 1 to {MOST_LEVELS}, got {levels}.")
        self.reading = CellReading(num_classes, strides_of_levels(levels))
        self.stage_modules = ("stem", *(f"stages.{level}" for level in range(levels)))
        self.level_modules = tuple(f"smooth.{level}" for level in range(levels))
        widths, channels = [width << (1 + level) for level in range(levels)], 3 * width
        self.stem = _halved(in_channels, width)
        self.stages = nn.ModuleList(_halved(before, after) for before, after in zip([width, *widths], widths, strict=False))
        self.lateral = nn.ModuleList(nn.Conv2d(before, channels, 1) for before in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths)
        self.class_tower, self.box_tower = _tower(channels), _tower(channels)
        self.classes = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.sides = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))  # s_i of exp(s_i x), section 3.2
        he_by_fan_out(self)
        small_head(self.classes)
        small_head(self.sides)
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The raw levels of normalised images [B, in_channels, H, W], by name, [B, num_classes + 4, H_l, W_l] each: see `CellReading`."""
        raw = (
            torch.cat([self.classes(self.class_tower(level)), self.sides(self.box_tower(level)) * scale], dim=1)
            for level, scale in zip(self._pyramid(images), self.scales, strict=True)
        )
        return dict(zip(self.reading.names, raw, strict=True))

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        """The levels' maps, the finest first (Lin et al., CVPR 2017, arXiv 1612.03144, section 3)."""
        x, stages = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        merged: list[Tensor] = []
        for lateral, stage_map in zip(reversed(self.lateral), reversed(stages), strict=True):
            finer = lateral(stage_map)
            merged.insert(0, finer + F.interpolate(merged[0], size=finer.shape[-2:], mode="nearest") if merged else finer)
        return [smooth(level) for smooth, level in zip(self.smooth, merged, strict=True)]


def _halved(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution of stride 2, BatchNorm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _tower(channels: int) -> nn.Sequential:
    """What stands before a prediction. Group norm, since levels that share a layer do not share statistics."""
    norm = nn.GroupNorm(math.gcd(channels, _MOST_GROUPS), channels)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm, nn.ReLU())


def tiny_fcos(*, num_classes: int, in_channels: int, width: int = 8, levels: int = 2) -> FCOS:
    return FCOS(width, levels, num_classes=num_classes, in_channels=in_channels)
