"""The steps of a view, with the decisions of each sample drawn: every column of the samples applies the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.draws import Decision, Draws, inside, rectangles
from kdbench.data.motion import Motion
from kdbench.data.pixels import UNIT, blend, grey, mean_grey, taken

# Of the erased rectangle: the paper's share of the image's area and ratio of sides.
_ERASED_AREA = (0.02, 0.4)
_ERASED_RATIO = (0.3, 1 / 0.3)


class Change(Protocol):
    """One step of a view of B samples, whose pictures are all of one size."""

    @property
    def motion(self) -> Motion | None:
        """Where the step takes points. None for a step that moves nothing."""
        ...

    def picture(self, images: Tensor) -> Tensor:
        """What the step makes of pictures: uint8 [B, C, H, W] before and after. What comes from outside is black."""
        ...

    def moved(self, values: Tensor, outside: float) -> Tensor:
        """Values per pixel [B, C, H, W] of any type after the step: each pixel holds the value of one pixel, or `outside`."""
        ...

    def enlarged(self, scale: int) -> Change:
        """The same step of pictures whose height and width are `scale` times as large."""
        ...


@dataclass(frozen=True)
class Shifted:
    """A crop of the padded picture, mirrored or not.

    size: height and width, before and after. padding: pixels on every side. down, across: int64 [B], 0 .. 2 padding, where the crop
    begins in the padded picture. mirrored: bool [B].
    """

    size: tuple[int, int]
    padding: int
    down: Tensor
    across: Tensor
    mirrored: Tensor

    @classmethod
    def drawn(cls, draws: Draws, size: tuple[int, int], padding: int, flip: bool) -> Shifted:
        """flip: whether half of the samples are mirrored."""
        steps = 2 * padding + 1
        mirrored = draws.below(Decision.MIRROR, 2).bool() if flip else torch.zeros_like(draws.index, dtype=torch.bool)
        return cls(size, padding, draws.below(Decision.DOWN, steps), draws.below(Decision.ACROSS, steps), mirrored)

    @property
    def motion(self) -> Motion:
        mirrored, right, up = self.mirrored, self.across - self.padding, self.down - self.padding
        linear = torch.eye(2, device=mirrored.device).repeat(len(mirrored), 1, 1)
        linear[:, 0, 0] = torch.where(mirrored, -1.0, 1.0)
        shift = torch.stack([torch.where(mirrored, self.size[1] + right, -right), -up], dim=1).float()
        return Motion(linear, shift, self.size, mirrored)

    def picture(self, images: Tensor) -> Tensor:
        return self.moved(images, 0)

    def moved(self, values: Tensor, outside: float) -> Tensor:
        return taken(F.pad(values, (self.padding,) * 4, value=outside), self._places)

    def enlarged(self, scale: int) -> Shifted:
        height, width = self.size
        return Shifted((height * scale, width * scale), self.padding * scale, self.down * scale, self.across * scale, self.mirrored)

    @cached_property
    def _places(self) -> Tensor:
        """For each sample and output pixel, the pixel of the padded picture that it shows: int64 [B, H, W], row-major."""
        height, width = self.size
        device = self.down.device
        rows = torch.arange(height, device=device) + self.down[:, None]
        columns = torch.arange(width, device=device).expand(len(self.down), -1)
        columns = torch.where(self.mirrored[:, None], width - 1 - columns, columns) + self.across[:, None]
        return rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]


@dataclass(frozen=True)
class Recoloured:
    """Brightness, contrast and saturation, in this order, each times a factor. The factors are int64 [B], in 256ths."""

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor

    motion = None

    @classmethod
    def drawn(cls, draws: Draws, strength: float) -> Recoloured:
        """The factors lie between 1 - strength and 1 + strength."""
        most = round(UNIT * strength)
        decisions = (Decision.BRIGHTNESS, Decision.CONTRAST, Decision.SATURATION)
        return cls(*(UNIT - most + draws.below(decision, 2 * most + 1) for decision in decisions))

    def picture(self, images: Tensor) -> Tensor:
        brightness, contrast, saturation = (factor[:, None, None, None] for factor in (self.brightness, self.contrast, self.saturation))
        images = blend(images.new_zeros(1), images, brightness)
        images = blend(mean_grey(images), images, contrast)
        return blend(grey(images), images, saturation) if images.shape[1] > 1 else images

    def moved(self, values: Tensor, outside: float) -> Tensor:
        return values

    def enlarged(self, scale: int) -> Recoloured:
        return self


@dataclass(frozen=True)
class Erased:
    """A rectangle that hides what is behind it (Zhong et al., arXiv 1708.04896); boxes and points stay where they are.

    size: height and width of the picture. top, left: int64 [B]. sides: int64 [B, 2], height and width of the rectangle.
    erased: bool [B], whether the picture has one.
    """

    size: tuple[int, int]
    top: Tensor
    left: Tensor
    sides: Tensor
    erased: Tensor

    motion = None

    @classmethod
    def drawn(cls, draws: Draws, size: tuple[int, int], probability: float) -> Erased:
        height, width = size
        candidates = rectangles(height, width, _ERASED_AREA, _ERASED_RATIO, draws.index.device)
        sides = candidates[draws.below(Decision.ERASED_SIDES, len(candidates))]
        top = draws.below(Decision.ERASED_DOWN, height - sides[:, 0] + 1)
        left = draws.below(Decision.ERASED_ACROSS, width - sides[:, 1] + 1)
        return cls(size, top, left, sides, draws.chosen(Decision.ERASED, probability))

    def picture(self, images: Tensor) -> Tensor:
        return self.moved(images, 0)

    def moved(self, values: Tensor, outside: float) -> Tensor:
        return values.masked_fill(self._gone[:, None], outside)

    def enlarged(self, scale: int) -> Erased:
        height, width = self.size
        return Erased((height * scale, width * scale), self.top * scale, self.left * scale, self.sides * scale, self.erased)

    @cached_property
    def _gone(self) -> Tensor:
        """The pixels of the rectangle: bool [B, H, W]."""
        return inside(self.size, self.top, self.left, self.sides) & self.erased[:, None, None]
