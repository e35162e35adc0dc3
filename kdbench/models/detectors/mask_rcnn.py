"""Mask R-CNN with the modules of torchvision inside, on any backbone: Faster R-CNN that draws what its best boxes hold.

Source: He et al., "Mask R-CNN", ICCV 2017 (arXiv 1703.06870).

Masks are drawn for a fixed number of boxes: in evaluation for the best ones after suppression, in training for the proposals that overlap
the true boxes most. A box has one mask, that of its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou

from kdbench.data.columns import wide
from kdbench.models.detectors.anchors import BOX
from kdbench.models.detectors.proposals import best_of_classes, pooled
from kdbench.models.detectors.two_stage import FasterRCNN, TwoStageReading

MASK_SIDE = 28  # pixels of a mask, across and down its box
_BINS = MASK_SIDE // 2
_CANDIDATES = 1000  # of an image, before its boxes are suppressed
OVERLAP = 0.5  # with a true box, from which a proposal learns its mask


@dataclass(frozen=True)
class MaskReading(TwoStageReading):
    """Faster R-CNN's, and of K boxes: `mask_boxes` [B, K, 4], `mask_scores` [B, K], `mask_classes` [B, K], whole numbers, and `masks`
    [B, K, 28, 28], logits over the box.

    In evaluation these are the best boxes, with score 0 in rows beyond them. In training they are proposals, and the class is that of the
    object whose mask they learn, -1 where there is none.

    drawn: K in evaluation.
    """

    drawn: int = 100

    @property
    def names(self) -> tuple[str, ...]:
        return (*super().names, "mask_boxes", "mask_scores", "mask_classes", "masks")

    def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        count = self.drawn
        third = {"mask_boxes": (count, BOX), "mask_scores": (count,), "mask_classes": (count,), "masks": (count, MASK_SIDE, MASK_SIDE)}
        return super().shapes(size) | third

    def detections(
        self, prediction: Mapping[str, Tensor], size: tuple[int, int], count: int, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The boxes that masks were drawn for, with `masks` [B, count, 28, 28], the probability of each pixel of a box."""
        found = {
            "boxes": wide(prediction["mask_boxes"]),
            "scores": wide(prediction["mask_scores"]),
            "classes": prediction["mask_classes"].long(),
            "masks": wide(prediction["masks"]).sigmoid(),
        }
        missing = max(0, count - self.drawn)
        return {name: F.pad(values[:, :count], (*[0, 0] * (values.ndim - 2), 0, missing)) for name, values in found.items()}


class MaskRCNN(FasterRCNN):
    """Faster R-CNN with four convolutions and a transposed one over what a box holds: see `MaskReading`."""

    reading: MaskReading

    def __init__(self, *sizes: Any, drawn: int, num_classes: int, in_channels: int) -> None:
        """sizes: as Faster R-CNN's. drawn: boxes that masks are drawn for in evaluation."""
        super().__init__(*sizes, num_classes=num_classes, in_channels=in_channels)
        two, width = self.reading, sizes[1]
        self.reading = MaskReading(num_classes, two.strides, sizes=two.sizes, proposals=two.proposals, drawn=drawn)
        self.roi_heads.mask_head = MaskRCNNHeads(width, (width,) * 4, 1)
        self.roi_heads.mask_predictor = MaskRCNNPredictor(width, width, num_classes + 1)
        self._drawn_in_training = 64

    def forward(
        self, images: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        maps = self.backbone(images)
        given = self.in_two_stages(maps, (images.shape[-2], images.shape[-1]), boxes, labels, valid)
        with torch.no_grad():
            if self.training:
                where, scores, classes = self._learned_boxes(given["proposals"], boxes, labels)
            else:
                where, scores, classes = self._best(given, (images.shape[-2], images.shape[-1]), valid)
        head: Any = self.roi_heads
        seen = pooled(maps[:-1], self.reading.strides[:-1], where, bins=_BINS, turn=self._turn)
        logits = head.mask_predictor(head.mask_head(seen))
        count = where.shape[1]
        channel = (classes.flatten() + 1).clamp(min=0)[:, None, None, None].expand(-1, 1, MASK_SIDE, MASK_SIDE)
        masks = logits.gather(1, channel).view(-1, count, MASK_SIDE, MASK_SIDE)
        # One kind of number in all tensors, so that a teacher's can be cached as one.
        return given | {"mask_boxes": where, "mask_scores": scores, "mask_classes": classes.to(where), "masks": masks}

    def _best(self, given: Mapping[str, Tensor], size: tuple[int, int], valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        read = self.reading
        scores, boxes = read.second(given)
        limits = {"lowest": read.lowest, "overlap": read.overlap}
        return best_of_classes(boxes, scores, size, valid, count=read.drawn, most=_CANDIDATES, **limits)

    def _learned_boxes(self, proposals: Tensor, boxes: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The proposals that overlap the true boxes most: [B, N, 4], zeros [B, N], and the classes of these, -1 where it is little."""
        count = min(self._drawn_in_training, proposals.shape[1])
        if boxes is None or labels is None or not boxes.shape[1]:
            none = proposals.new_zeros(len(proposals), count)
            return proposals[:, :count], none, torch.full_like(none, -1, dtype=torch.int64)
        real = torch.where((labels >= 0)[..., None], boxes.to(proposals), 0)
        overlaps, object_of = torch.stack([box_iou(*pair) for pair in zip(proposals, real, strict=True)]).nan_to_num(0).max(-1)
        best, rows = overlaps.topk(count, dim=1)
        classes = labels.gather(1, object_of.gather(1, rows)).masked_fill(best < OVERLAP, -1)
        return proposals.gather(1, rows[..., None].expand(-1, -1, BOX)), torch.zeros_like(best), classes


def mask_rcnn(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet50",
    width: int = 256,
    finest: int = 4,
    levels: int = 5,
    anchor: int = 32,
    hidden: int = 1024,
    proposals: int = 1000,
    learned: int = 512,
    drawn: int = 100,
    preset: str = "",
) -> MaskRCNN:
    """proposals, learned: boxes that the second stage looks at in evaluation and in training. drawn: boxes that get a mask."""
    sizes = (backbone, width, finest, levels, anchor, hidden, proposals, learned)
    return MaskRCNN(*sizes, preset, drawn=drawn, num_classes=num_classes, in_channels=in_channels)


def maskrcnn_resnet50_fpn(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 256,
    finest: int = 4,
    levels: int = 5,
    anchor: int = 32,
    hidden: int = 1024,
    proposals: int = 1000,
    learned: int = 512,
    drawn: int = 100,
    preset: str = "",
) -> MaskRCNN:
    sizes = ("resnet50", width, finest, levels, anchor, hidden, proposals, learned)
    return MaskRCNN(*sizes, preset, 0.0, drawn=drawn, num_classes=num_classes, in_channels=in_channels)
