"""What Mask R-CNN learns: Faster R-CNN's losses, and the masks of the objects.

Source: He et al., ICCV 2017 (arXiv 1703.06870), section 3. Masks of objects come as bit planes: bit k of plane g is object 63 g + k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, roi_align

from kdbench.data.columns import wide
from kdbench.data.encoded_targets import OBJECTS_A_GROUP
from kdbench.errors import UserError
from kdbench.models.detectors.mask_rcnn import MASK_SIDE, MaskReading
from kdbench.tasks.cell_losses import learned_labels
from kdbench.tasks.two_stage_losses import TwoStageLosses


def mask_of(planes: Tensor, objects: Tensor) -> Tensor:
    """The masks [N, H, W], bool, of some objects of one image. planes: int64 [G, H, W]; objects: int64 [N], their rows."""
    bits = planes[objects // OBJECTS_A_GROUP] >> (objects % OBJECTS_A_GROUP)[:, None, None]
    return (bits & 1).bool()


def cut_masks(planes: Tensor, objects: Tensor, boxes: Tensor) -> Tensor:
    """What share of each pixel of a box its object covers: [N, 28, 28] in [0, 1]. boxes: [N, 4] in pixels of the planes."""
    shown, row = objects.unique(return_inverse=True)
    masks = mask_of(planes, shown)[:, None].to(boxes)
    found: Tensor = roi_align(masks, torch.cat([row[:, None].to(boxes), boxes], dim=1), MASK_SIDE, 1.0)
    return found[:, 0]


@dataclass(frozen=True)
class MaskLosses(TwoStageLosses):
    """Those of two stages, and `masks`: binary cross-entropy of the masks of boxes that overlap an object by half.

    It is the mean over pixels and over these boxes of an image, 0 where there are none, then over the images.
    """

    reading: MaskReading

    def losses(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        if "masks" not in target:
            raise UserError("a network that draws masks learns from `masks` of the objects, and these data have none; use target: masks")
        return super().losses(prediction, target, size) | {"masks": self._drawn(prediction, target)}

    def weights(self, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        return super().weights(target, size) | {"masks": torch.tensor(len(target["labels"]))}

    def _drawn(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        logits, boxes = wide(prediction["masks"]), wide(prediction["mask_boxes"])
        labels, losses = learned_labels(target), []
        for row, learned in enumerate(prediction["mask_classes"] >= 0):
            if not learned.any():
                losses.append(logits[row].sum() * 0)
                continue
            some = boxes[row, learned]
            real = torch.where((labels[row] >= 0)[:, None], target["boxes"][row].to(some), 0)
            wanted = cut_masks(target["masks"][row], box_iou(some, real).nan_to_num(0).argmax(1), some)
            losses.append(F.binary_cross_entropy_with_logits(logits[row, learned], wanted))
        return torch.stack(losses).mean()
