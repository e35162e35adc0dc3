"""What a detector without anchors learns from boxes: pure functions of predictions and padded targets.

Source of assignment and losses: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019 (arXiv 1904.01355).

Everywhere B is images, P a pyramid's cells in the order of `models.detectors.positions`, C classes and M padded objects of an image. Boxes
are x0, y0, x1, y1 in pixels of the network's input. A target is {"boxes" [B, M, 4], "labels" int64 [B, M]}, with "crowd" bool [B, M] where
the data have regions that nobody learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from kdbench.data.columns import wide
from kdbench.data.kinds import NO_OBJECT  # of a background cell too
from kdbench.models.detectors.cells import CellReading

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss: Lin et al., ICCV 2017 (arXiv 1708.02002), section 4.1


@dataclass(frozen=True)
class Assignment:
    """What each cell learns. labels: int64 [B, P], NO_OBJECT for background; boxes: [B, P, 4], anything for background."""

    labels: Tensor
    boxes: Tensor

    @property
    def positive(self) -> Tensor:
        """Which cells learn an object, bool [B, P]."""
        return self.labels != NO_OBJECT

    @property
    def counts(self) -> Tensor:
        """Positive cells of each image, int64 [B]: what an image's losses are divided by, together with those of its batch."""
        return self.positive.sum(1)


def size_ranges(strides: Tensor, reach: float) -> Tensor:
    """How far the farthest side of a cell's object may be, [P, 2] in pixels, lowest and highest.

    strides: [P], of the cells. A level of stride s takes reach s / 2 .. reach s; the finest level begins at 0 and the coarsest has no end.
    """
    ranges = torch.stack([strides * (reach / 2), strides * reach], dim=1)
    ranges[strides == strides.min(), 0] = 0
    ranges[strides == strides.max(), 1] = float("inf")
    return ranges


def learned_labels(target: Mapping[str, Tensor]) -> Tensor:
    """Classes of the objects that a detector learns, int64 [B, M]: NO_OBJECT in padded rows and for crowds."""
    labels = target["labels"]
    return labels.masked_fill(target["crowd"].bool(), NO_OBJECT) if "crowd" in target else labels


def assign(target: Mapping[str, Tensor], centres: Tensor, strides: Tensor, reach: float = 4.0, radius: float = 1.5) -> Assignment:
    """Which object each cell learns (section 3.2, with centre sampling).

    A cell learns an object where it lies inside the object's box, not more than `radius` strides from the box's centre across and down, and
    where the farthest side of the box is in the range of the cell's level. The object of the smallest area wins.

    Args:
        target: Boxes [B, M, 4] and labels [B, M]; rows labelled -1 are padding, and rows of `crowd` are learned by no cell.
        centres: float [P, 2] of x and y, see `positions`.
        strides: float [P].
        reach: See `size_ranges`.
        radius: In strides.
    """
    boxes, labels = target["boxes"].to(centres), learned_labels(target)
    if not labels.shape[1]:
        empty = labels.new_full((len(labels), len(centres)), NO_OBJECT)
        return Assignment(empty, boxes.new_zeros(*empty.shape, 4))
    low, high = (corner[:, None] for corner in boxes.split(2, dim=-1))  # [B, 1, M, 2]
    cells = centres[None, :, None]
    sides = torch.cat([cells - low, high - cells], dim=-1)  # [B, P, M, 4]
    near = ((cells - (low + high) / 2).abs() <= radius * strides[None, :, None, None]).all(-1)
    shortest, longest = size_ranges(strides, reach).unbind(1)
    farthest = sides.amax(-1)
    in_range = (farthest >= shortest[:, None]) & (farthest <= longest[:, None])
    learned = (sides.amin(-1) > 0) & near & in_range & (labels != NO_OBJECT)[:, None]
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None].expand(learned.shape)
    smallest, which = areas.masked_fill(~learned, float("inf")).min(-1)
    found = labels.gather(1, which).masked_fill(smallest.isinf(), NO_OBJECT)
    return Assignment(found, boxes.gather(1, which[..., None].expand(-1, -1, 4)))


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """Sum over all cells and classes of -alpha_t (1 - p_t)^gamma log p_t (Lin et al., eq. 5), with one sigmoid a class.

    logits: [..., C]. labels: int64 [...], NO_OBJECT where every class is absent. Returns a scalar, float32 or wider.
    """
    logits = wide(logits)
    present = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    towards = torch.where(present, logits, -logits)  # log-odds of the right answer
    weights = torch.where(present, alpha, 1 - alpha)
    return -(weights * torch.sigmoid(-towards) ** gamma * F.logsigmoid(towards)).sum()


def giou_loss(boxes: Tensor, assignment: Assignment) -> Tensor:
    """Sum over positive cells of 1 - GIoU with the cell's object (Rezatofighi et al., CVPR 2019, arXiv 1902.09630).

    boxes: predicted, [B, P, 4]. Returns a scalar, float32 or wider; 0 with a gradient of 0 where no cell is positive.
    """
    positive = assignment.positive
    predicted = wide(boxes)[positive]
    total: Tensor = generalized_box_iou_loss(predicted, assignment.boxes[positive].to(predicted), reduction="sum")
    return total


def centreness(assignment: Assignment, centres: Tensor) -> Tensor:
    """How central each cell lies in its object, [B, P] in [0, 1] (eq. 3); 0 for background. centres: [P, 2]."""
    low, high = assignment.boxes.split(2, dim=-1)
    near, far = centres - low, high - centres
    ratio = torch.minimum(near, far).clamp(min=0) / torch.maximum(near, far).clamp(min=torch.finfo(near.dtype).tiny)
    return ratio.prod(-1).sqrt().masked_fill(~assignment.positive, 0)


@dataclass(frozen=True)
class CellLosses:
    """What a network learns whose levels are read by a `CellReading`; an image without an object keeps the loss of its background.

    `focal`: of all cells and classes; `giou`: of the cells that learn an object; `centreness`: binary cross-entropy of these, where the
    network says it. All are divided by the number of these cells, or by 1 where there are none.
    """

    draws: ClassVar[bool] = False
    reading: CellReading

    def losses(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The terms by name, for images of `size`, height and width."""
        logits, sides, central = self.reading.split(prediction)
        centres, strides = (numbers.to(sides) for numbers in self.reading.cells(size, sides.device))
        assignment = self._assigned(target, centres, strides)
        divisor = assignment.counts.sum().clamp(min=1)
        terms = {
            "focal": focal_loss(logits, assignment.labels) / divisor,
            "giou": giou_loss(self.reading.boxes(sides, centres, strides), assignment) / divisor,
        }
        if central is not None:
            positive = assignment.positive
            wanted = centreness(assignment, centres)[positive]
            terms["centreness"] = F.binary_cross_entropy_with_logits(central[positive], wanted, reduction="sum") / divisor
        return terms

    def weights(self, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """What each term is divided by: the cells that learn an object."""
        centres, strides = self.reading.cells(size, target["labels"].device)
        count = self._assigned(target, centres, strides).counts.sum()
        return dict.fromkeys(("focal", "giou", *(["centreness"] if self.reading.centreness else [])), count)

    def _assigned(self, target: Mapping[str, Tensor], centres: Tensor, strides: Tensor) -> Assignment:
        return assign(target, centres, strides, self.reading.reach, self.reading.radius)
