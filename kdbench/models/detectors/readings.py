"""How what a detector gives is read: raw numbers a level of its pyramid become scores and boxes.

A detector gives one tensor a level, `level:0` [B, D, H_0, W_0] for the finest, `level:1`, ...; what the D channels hold is the family's
own. So its file exports with shapes that are fixed, and only who evaluates it pays for sorting and suppressing boxes. A network says how
it is read in its attribute `reading`.

Everywhere B is images, P the places of all levels end to end, C classes; boxes are x0, y0, x1, y1 in pixels of the network's input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kdbench.models.detectors.suppression import best_of_each_image


class Dense(NamedTuple):
    """What a detector says at every place. logits: [B, P, C], one sigmoid a class; boxes: [B, P, 4]. Both float32 or wider."""

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Reading(ABC):
    """How the prediction of one family of detectors is read.

    num_classes: C. strides: of the levels, the finest first, in input pixels.
    """

    num_classes: int
    strides: tuple[int, ...]

    wants_valid: ClassVar[bool] = False  # whether the network is handed `valid`, as of `detections`, where pictures are padded
    wants_truth: ClassVar[bool] = False  # whether the network is handed `boxes` and `labels` of the target in training

    @property
    def level_names(self) -> tuple[str, ...]:
        """What the tensors of the levels are called, the finest first."""
        return tuple(f"level:{level}" for level in range(len(self.strides)))

    @property
    def names(self) -> tuple[str, ...]:
        """What the prediction's tensors are called: those of the levels, and what a second stage gives."""
        return self.level_names

    @property
    def places(self) -> tuple[str, tuple[int, ...]]:
        """What must agree where two detectors are compared place by place: what a place is, and the levels' strides."""
        return self.of_places, self.strides

    @property
    @abstractmethod
    def of_places(self) -> str:
        """What a place of a level is, in words: `one cell`, `9 anchors a cell`."""

    @abstractmethod
    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Of each tensor of the prediction for one image of `size`, height and width."""

    @abstractmethod
    def dense(self, prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Dense:
        """Scores and boxes of all places, for images of `size`."""

    @abstractmethod
    def detections(
        self, prediction: Mapping[str, Tensor], size: tuple[int, int], count: int, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The best boxes of each image, after non-maximum suppression within each class.

        Args:
            prediction: What the network gave.
            size: Height and width of its input.
            count: Boxes an image.
            valid: [B, 2], height and width of the picture in each input's upper left corner, beyond which no box reaches; None where it
                fills the input.

        Returns:
            boxes: [B, count, 4]; scores: [B, count], falling; classes: int64 [B, count]. Rows beyond an image's boxes are 0.
        """


def end_to_end(maps: Tensor, per_cell: int = 1) -> Tensor:
    """[B, per_cell D, H, W] -> [B, H W per_cell, D]: cells row by row, and the places of a cell one after the other."""
    images, channels, height, width = maps.shape
    split = maps.view(images, per_cell, channels // per_cell, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(images, height * width * per_cell, channels // per_cell)


def cut_at_edges(boxes: Tensor, size: tuple[int, int], valid: Tensor | None) -> Tensor:
    """Boxes [B, ..., 4] cut at the edges of their pictures. size, valid: as of `Reading.detections`."""
    height, width = (valid.to(boxes).T if valid is not None else boxes.new_tensor(size)[:, None]).unbind(0)
    edges = torch.stack([width, height, width, height], dim=-1).view(-1, *[1] * (boxes.ndim - 2), 4)
    return torch.minimum(boxes.clamp(min=0), edges)


def suppressed(
    scores: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    count: int,
    valid: Tensor | None,
    *,
    lowest: float,
    overlap: float,
    candidates: tuple[int, ...],
    most: int,
    by_class: bool = False,
) -> dict[str, Tensor]:
    """`best_of_each_image` of boxes [B, P, 4] or [B, P, C, 4] that are cut at the picture's edge first, as torchvision's detectors do.

    scores: [B, P, C]. candidates: places of each level, of which the `most` highest scores are looked at; by_class: of each class.
    """
    inside = cut_at_edges(boxes, size, valid)
    return best_of_each_image(scores, inside, count, lowest=lowest, overlap=overlap, levels=candidates, most=most, by_class=by_class)
