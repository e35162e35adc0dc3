"""Where a step of a view takes points and boxes: an affine map of each image, and the edges of the picture that it leads to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CORNERS = (0, 1, 2, 1, 2, 3, 0, 3)  # x and y of a box's four corners, of x0, y0, x1, y1


@dataclass(frozen=True)
class Motion:
    """A step moves the point x of an image to `linear` x + `shift`.

    Points are (x, y) in pixels from the upper left corner of the image: pixel (row i, column j) covers j .. j + 1 and i .. i + 1.
    linear: float32 [B, 2, 2]. shift: float32 [B, 2]. size: height and width of the picture after the step; what lies beyond is cut off.
    mirrored: bool [B], whether left and right change places.
    """

    linear: Tensor
    shift: Tensor
    size: tuple[int, int]
    mirrored: Tensor

    def points(self, points: Tensor) -> Tensor:
        """Where points [B, K, 2] are after the step, [B, K, 2], also outside the picture. The same bits in every batch."""
        x, y = points.unbind(-1)
        # One number at a time: the bits of a matrix product may depend on the size of the batch.
        moved = [
            row[:, :1] * x + row[:, 1:] * y + shift[:, None] for row, shift in zip(self.linear.unbind(1), self.shift.unbind(1), strict=True)
        ]
        return torch.stack(moved, dim=-1)

    def inside(self, points: Tensor) -> Tensor:
        """Which of the moved points [B, K, 2] lie in the picture or on its edge, bool [B, K]."""
        height, width = self.size
        x, y = points.unbind(-1)
        return (x >= 0) & (x <= width) & (y >= 0) & (y <= height)

    def boxes(self, boxes: Tensor) -> Tensor:
        """The smallest upright boxes around moved boxes, [B, M, 4] of x0, y0, x1, y1 before and after; they are not cut."""
        corners = self.points(boxes[..., _CORNERS].unflatten(-1, (4, 2)).flatten(1, 2)).unflatten(1, (-1, 4))
        return torch.cat([corners.amin(2), corners.amax(2)], dim=-1)

    def cut(self, boxes: Tensor) -> Tensor:
        """The parts of moved boxes [B, M, 4] that lie in the picture; a box outside it has no area."""
        height, width = self.size
        return torch.stack([boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)], dim=-1).flatten(-2)
