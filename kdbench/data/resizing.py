"""A random part of an image, resized to its full size (Szegedy et al., arXiv 1409.4842). Files are resized where they are decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdbench.data.draws import Decision, Draws, rectangles
from kdbench.data.hashing import below
from kdbench.data.motion import Motion
from kdbench.data.pixels import taken

RATIO = (3 / 4, 4 / 3)  # width by height of the part


@dataclass(frozen=True)
class ResizedPart:
    """A `changes.Change`: a part of each picture fills the whole. size: height and width; boxes: int64 [B, 4], see `parts`."""

    size: tuple[int, int]
    boxes: Tensor

    @classmethod
    def drawn(cls, draws: Draws, size: tuple[int, int], smallest: float) -> ResizedPart:
        return cls(size, parts(*size, part_bits(draws), smallest))

    @property
    def motion(self) -> Motion:
        start, sides = self.boxes[:, [1, 0]], self.boxes[:, [3, 2]].float()
        full = torch.tensor([self.size[1], self.size[0]], device=sides.device)
        # Whole numbers are divided by whole numbers, so each result is rounded once.
        linear, shift = torch.diag_embed(full / sides), -start * full / sides
        return Motion(linear, shift, self.size, torch.zeros_like(self.boxes[:, 0], dtype=torch.bool))

    def picture(self, images: Tensor) -> Tensor:
        return resized(images, self.boxes)

    def moved(self, values: Tensor, outside: float) -> Tensor:
        return resized_nearest(values, self.boxes)

    def enlarged(self, scale: int) -> ResizedPart:
        return ResizedPart((self.size[0] * scale, self.size[1] * scale), self.boxes * scale)


@dataclass(frozen=True)
class ResizedInFile:
    """A `changes.Change` that was done where files were decoded: pixels are as they should be, boxes and points have yet to follow.

    motion: from where a picture is usually seen to where the part of it is.
    """

    motion: Motion

    def picture(self, images: Tensor) -> Tensor:
        return images

    def moved(self, values: Tensor, outside: float) -> Tensor:
        return values

    def enlarged(self, scale: int) -> ResizedInFile:
        raise NotImplementedError("an enlarged picture can't follow a part that was cut from a file")


def part_bits(draws: Draws) -> Tensor:
    """What decides each sample's part, its sides, then its place down and across: int64 [B, 3]."""
    return draws.bits(Decision.RESIZED_CROP, 3)


def parts(height: int, width: int, bits: Tensor, smallest: float) -> Tensor:
    """The part of an image [height, width] that each row of bits [B, 3] stands for: int64 [B, 4] of top, left, height and width.

    Its area is `smallest` to 1 of the image's, uniformly; its ratio of sides 3/4 to 4/3.
    """
    candidates = rectangles(height, width, (smallest, 1.0), RATIO, bits.device)
    sides = candidates[below(bits[:, 0], len(candidates))]
    top, left = below(bits[:, 1], height - sides[:, 0] + 1), below(bits[:, 2], width - sides[:, 1] + 1)
    return torch.stack([top, left, sides[:, 0], sides[:, 1]], dim=1)


def resized(images: Tensor, boxes: Tensor) -> Tensor:
    """Each part at the size of the whole image, uint8 [B, C, H, W], by bilinear sampling in whole numbers; boxes: int64 [B, 4]."""
    height, width = images.shape[-2:]
    (up, down, below_share), (left, right, right_share) = _neighbours(boxes[:, 0::2], height), _neighbours(boxes[:, 1::2], width)
    total = torch.full_like(images, 1 << 15, dtype=torch.int32)
    for rows, row_weight in ((up, 256 - below_share), (down, below_share)):
        for columns, column_weight in ((left, 256 - right_share), (right, right_share)):
            places = rows[:, :, None] * width + columns[:, None, :]
            weight = (row_weight[:, :, None] * column_weight[:, None, :]).int()
            total += taken(images, places) * weight[:, None]
    return total.bitwise_right_shift_(16).byte()


def resized_nearest(values: Tensor, boxes: Tensor) -> Tensor:
    """As `resized` for labels or numbers per pixel, [B, C, H, W] of any type: each takes the nearest one's."""
    height, width = values.shape[-2:]
    rows, columns = _nearest(boxes[:, 0::2], height), _nearest(boxes[:, 1::2], width)
    return taken(values, rows[:, :, None] * width + columns[:, None, :])


def _neighbours(box: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each place along a side, the two pixels of the part that it lies between and the second one's weight in 256ths: int64 [B, side].

    box: int64 [B, 2], where the part starts along this side and how long it is.
    """
    start, length = box[:, :1], box[:, 1:]
    places = torch.arange(side, device=box.device)
    position = (2 * places + 1) * length - side  # in (2 side)ths of a pixel: centres of pixels lie on centres of pixels
    before = position // (2 * side)
    share = (position - before * 2 * side) * 256 // (2 * side)
    first = torch.minimum(before.clamp(min=0), length - 1)
    second = torch.minimum((before + 1).clamp(min=0), length - 1)
    return start + first, start + second, share


def _nearest(box: Tensor, side: int) -> Tensor:
    start, length = box[:, :1], box[:, 1:]
    return start + (2 * torch.arange(side, device=box.device) + 1) * length // (2 * side)
