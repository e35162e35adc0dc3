"""What detectors with anchors learn from boxes: pure functions of predictions and padded targets.

Sources: Lin et al., ICCV 2017 (arXiv 1708.02002), for RetinaNet; Liu et al., ECCV 2016 (arXiv 1512.02325), for SSD. Everywhere B is images,
P all anchors, C classes and M padded objects of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from kdbench.data.kinds import NO_OBJECT, has_box
from kdbench.models.detectors.anchors import AnchorReading, BoxesOfCells, DefaultBoxReading, Weights, encode
from kdbench.tasks.cell_losses import Assignment, focal_loss, learned_labels

_NEGATIVES = 3  # of SSD, background boxes that are learned for each box that learns an object: Liu et al., section 2.2


@lru_cache(maxsize=16)
def kept_anchors(reading: BoxesOfCells, size: tuple[int, int], device: torch.device) -> Tensor:
    """All anchors of a family, see `BoxesOfCells.anchors`; kept, because every step of a training asks for them. Not to be changed."""
    return reading.anchors(size, device)


@dataclass(frozen=True)
class Matches(Assignment):
    """What each anchor learns. between: anchors that overlap an object too much for background and too little to learn it, bool [B, P].

    Those are NO_OBJECT in `labels`.
    """

    between: Tensor


def match(target: Mapping[str, Tensor], anchors: Tensor, *, above: float, below: float, best: str) -> Matches:
    """Which object each anchor learns: the one that it overlaps most, where that is enough.

    Args:
        target: Boxes [B, M, 4] and labels [B, M]; rows labelled -1 are padding, and rows of `crowd` are learned by no anchor.
        anchors: [P, 4], the same for all images; or [B, P, 4].
        above: Intersection over union from which an anchor learns the object.
        below: Up to which it learns background.
        best: What becomes of an anchor that an object overlaps more than all other anchors, however little: with `any`, it learns the
            object that it overlaps most itself, as in RetinaNet; with `its own`, it learns this object, as in SSD; with `none`, nothing.
    """
    labels = learned_labels(target)
    each = anchors if anchors.ndim == 3 else anchors.expand(len(labels), *anchors.shape)
    rows = [
        _of_one_image(boxes.to(places), names, places, above, below, best)
        for boxes, names, places in zip(target["boxes"], labels, each, strict=True)
    ]
    found, matched, between = (torch.stack(column) for column in zip(*rows, strict=True))
    return Matches(found, matched, between)


def _of_one_image(boxes: Tensor, labels: Tensor, anchors: Tensor, above: float, below: float, best: str) -> tuple[Tensor, Tensor, Tensor]:
    """boxes: [M, 4]; labels: [M]; anchors: [P, 4]."""
    real = (labels != NO_OBJECT) & has_box(boxes)
    boxes, labels = boxes[real], labels[real]
    if not len(labels):
        background = labels.new_full((len(anchors),), NO_OBJECT)
        return background, torch.zeros_like(anchors), torch.zeros_like(background, dtype=torch.bool)
    overlaps = box_iou(boxes, anchors)
    overlap, which = overlaps.max(0)
    learned = overlap >= above
    between = (overlap >= below) & ~learned
    if best == "any":
        # An object that no anchor touches has no best one.
        learned |= ((overlaps == overlaps.amax(1, keepdim=True)) & (overlaps > 0)).any(0)
    elif best == "its own":
        theirs = torch.full_like(which, -1)
        # Of objects that share their best anchor the last one has it, in whatever order they are written.
        theirs = theirs.scatter_reduce(0, overlaps.argmax(1), torch.arange(len(labels), device=labels.device), "amax")
        which, learned = torch.where(theirs >= 0, theirs, which), learned | (theirs >= 0)
    found = labels[which].masked_fill(~learned, NO_OBJECT)
    return found, boxes[which], between & ~learned


def wanted_offsets(matches: Matches, anchors: Tensor, weights: Weights) -> Tensor:
    """The offsets that positive anchors learn, [positives, 4]. anchors: [P, 4]."""
    positive = matches.positive
    return encode(matches.boxes[positive], anchors.expand(*positive.shape, 4)[positive], weights)


@dataclass(frozen=True)
class AnchorLosses:
    """RetinaNet's; an image without an object keeps the loss of its background.

    `focal`: of all anchors and classes, without the anchors in between; `l1`: of the offsets of the anchors that learn an object. Both are
    divided by the number of these anchors in the batch, or by 1 where there are none. (Torchvision divides image by image.)
    """

    draws: ClassVar[bool] = False
    reading: AnchorReading

    def losses(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The terms by name, for images of `size`, height and width."""
        logits, offsets = self.reading.split(prediction)
        anchors = kept_anchors(self.reading, size, offsets.device).to(offsets)
        matches = self._matched(target, anchors)
        divisor = matches.counts.sum().clamp(min=1)
        apart = (offsets[matches.positive] - wanted_offsets(matches, anchors, self.reading.weights)).abs()
        return {"focal": focal_loss(logits[~matches.between], matches.labels[~matches.between]) / divisor, "l1": apart.sum() / divisor}

    def weights(self, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """What each term is divided by: the anchors that learn an object."""
        count = self._matched(target, kept_anchors(self.reading, size, target["labels"].device)).counts.sum()
        return {"focal": count, "l1": count}

    def _matched(self, target: Mapping[str, Tensor], anchors: Tensor) -> Matches:
        return match(target, anchors, above=self.reading.above, below=self.reading.below, best="any")


@dataclass(frozen=True)
class DefaultBoxLosses:
    """SSD's; an image without an object teaches nothing.

    `cross_entropy`: of the boxes that learn an object, and of three times as many background boxes of the same image, those with the
    largest loss; `smooth_l1`: of the offsets of the first. Both are divided by the number of boxes that learn an object, or by 1.
    """

    draws: ClassVar[bool] = False
    reading: DefaultBoxReading

    def losses(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The terms by name, for images of `size`, height and width."""
        logits, offsets = self.reading.split(prediction)
        anchors = kept_anchors(self.reading, size, offsets.device).to(offsets)
        matches = self._matched(target, anchors)
        divisor = matches.counts.sum().clamp(min=1)
        positive = matches.positive
        each = F.cross_entropy(logits.flatten(0, 1), (matches.labels + 1).flatten(), reduction="none").view_as(matches.labels)
        learned = positive | hardest(each.detach().masked_fill(positive, -torch.inf), _NEGATIVES * matches.counts)
        wanted = wanted_offsets(matches, anchors, self.reading.weights)
        return {
            "cross_entropy": each[learned].sum() / divisor,
            "smooth_l1": F.smooth_l1_loss(offsets[positive], wanted, reduction="sum") / divisor,
        }

    def weights(self, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """What each term is divided by: the boxes that learn an object."""
        count = self._matched(target, kept_anchors(self.reading, size, target["labels"].device)).counts.sum()
        return {"cross_entropy": count, "smooth_l1": count}

    def _matched(self, target: Mapping[str, Tensor], anchors: Tensor) -> Matches:
        return match(target, anchors, above=self.reading.above, below=self.reading.above, best="its own")


def hardest(losses: Tensor, counts: Tensor) -> Tensor:
    """Which places have the highest losses [B, P] of their image, so many as `counts` [B] says: bool [B, P]. Those at -inf never have."""
    order = losses.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter(1, order, torch.arange(losses.shape[1], device=losses.device).expand_as(order))
    return (ranks < counts[:, None]) & (losses > -torch.inf)
