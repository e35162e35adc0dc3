"""How pictures of any height and width fill a network's input of one size, and where each of their pixels comes to lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdbench.data.options import ImageSide

Fitting = Literal["centre", "letterbox", "stretch"]
WholeFitting = Literal["letterbox", "stretch"]  # those that show all of a picture
InputSize = ImageSide | tuple[ImageSide, ImageSide]  # one side, or height and width
Colour = tuple[int, int, int]

# ImageNet's mean, rounded: normalised it is about 0, which is what torchvision's detectors pad with.
PADDING: Colour = (124, 116, 104)

Box = tuple[int, int, int, int]  # top, left, height and width in whole pixels


def sides_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; one number stands for both."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Placement:
    """Where one picture comes to lie: `part` of it is resized to `resized`, whose upper left pixel is then the pixel `corner` of the input.

    original: height and width of the picture. resized, size: height and width of the resized part and of the input. corner: row and column,
    negative where the upper or left edge is cut off. What the resized part does not reach is padding.
    """

    original: tuple[int, int]
    part: Box
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """x and y: a position in the input is one in the picture, times `scale`, plus `shift`; in pixels from the upper left corner."""
        return self.resized[1] / self.part[3], self.resized[0] / self.part[2]

    @property
    def shift(self) -> tuple[float, float]:
        """x and y, see `scale`."""
        across, down = self.scale
        return self.corner[1] - self.part[1] * across, self.corner[0] - self.part[0] * down

    def picture(self, image: Tensor, padding: Colour) -> Tensor:
        """uint8 [3, H, W] of the original size as the input shows it, uint8 [3, h, w], resized with antialiasing."""
        from torchvision.transforms.v2 import functional as transforms  # takes two seconds, so only who has files pays

        top, left, height, width = self.part
        whole: Tensor = transforms.resize(image[:, top : top + height, left : left + width], list(self.resized), antialias=True)
        rows, columns = (_overlap(*sides) for sides in zip(self.corner, self.resized, self.size, strict=True))
        seen = whole[:, rows[1], columns[1]]
        if tuple(seen.shape[-2:]) == self.size:
            return seen
        shown = torch.tensor(padding, dtype=torch.uint8)[:, None, None].repeat(1, *self.size)
        shown[:, rows[0], columns[0]] = seen
        return shown

    def nearest(self) -> tuple[Tensor, Tensor, tuple[slice, slice]]:
        """Which pixels of the original are shown: rows int64 [a], columns int64 [b], and the rows and columns of the input that show them.

        Each pixel of the input shows the original's pixel that its centre lies in.
        """
        found = []
        places = zip(self.part[:2], self.part[2:], self.resized, self.corner, self.size, strict=True)
        for first, length, resized, corner, size in places:
            shown, seen = _overlap(corner, resized, size)
            steps = torch.arange(seen.start, seen.stop)
            found.append((first + (2 * steps + 1) * length // (2 * resized), shown))
        (rows, down), (columns, across) = found
        return rows, columns, (down, across)


def _overlap(corner: int, resized: int, size: int) -> tuple[slice, slice]:
    """Along one side, the pixels of the input that show something, and which of the resized part's they show."""
    start, stop = max(0, corner), min(size, corner + resized)
    return slice(start, stop), slice(start - corner, stop - corner)


@dataclass(frozen=True)
class Frame:
    """What a network's input shows of pictures of any size.

    size: height and width of the input.
    fitting:
        centre: the picture is resized so that the centre of `size` is left after a margin is cut off on all sides. It keeps its ratio.
        letterbox: the whole picture, as large as fits without changing its ratio, in the upper left corner. The rest, on the right or
            below, is `padding`, as everywhere in kdbench where things of several sizes are padded.
        stretch: the whole picture, resized to `size`.
    resize: of `centre`, pixels of the picture's side that matches the input's shorter one, before the margin is cut off.
    padding: red, green and blue.
    """

    size: tuple[int, int]
    fitting: Fitting = "letterbox"
    resize: int = 0
    padding: Colour = PADDING

    @property
    def facts(self) -> str:
        """All that decides what is seen, for hashes."""
        return json.dumps([self.size, self.fitting, self.resize, self.padding])

    @property
    def shows_all(self) -> bool:
        """Whether all of every picture is seen."""
        return self.fitting != "centre"

    def place(self, height: int, width: int, part: Box | None = None) -> Placement:
        """Where a picture [height, width] lies. part: what of it fills the whole input, whatever the fitting; None for the usual sight."""
        original, (high, wide) = (height, width), self.size
        if part is not None or self.fitting == "stretch":
            return Placement(original, part or (0, 0, height, width), self.size, (0, 0), self.size)
        if self.fitting == "letterbox":
            factor = min(high / height, wide / width)
            resized = min(high, max(1, round(height * factor))), min(wide, max(1, round(width * factor)))
            return Placement(original, (0, 0, height, width), resized, (0, 0), self.size)
        return Placement(original, (0, 0, height, width), *self._centred(height, width), self.size)

    def _centred(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size of the resized picture and its corner; of a square input as torchvision's `Resize` and `CenterCrop` have them."""
        high, wide = (side * self.resize // min(self.size) for side in self.size)
        if high * width >= wide * height:
            resized = high, max(self.size[1], int(high * width / height))
        else:
            resized = max(self.size[0], int(wide * height / width)), wide
        corner = tuple(-round((side - seen) / 2.0) for side, seen in zip(resized, self.size, strict=True))
        return resized, (corner[0], corner[1])
