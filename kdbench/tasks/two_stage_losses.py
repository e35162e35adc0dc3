"""What a detector of two stages learns from boxes.

Source: Ren et al., NIPS 2015 (arXiv 1506.01497), section 3.1.2, with the numbers of torchvision. Every term is the mean over images of what
an image loses, so that an image counts as much as any other, whatever it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data.columns import wide
from kdbench.data.hashing import hash64
from kdbench.data.kinds import has_box
from kdbench.models.detectors.anchors import encode
from kdbench.models.detectors.two_stage import ROI_WEIGHTS, TwoStageReading
from kdbench.tasks.anchor_losses import Matches, hardest, kept_anchors, match, wanted_offsets

SAMPLED, POSITIVE = 256, 128  # anchors of an image that the first stage learns, and how many of them lie on an object at most
_BETA = 1 / 9  # where the smooth L1 loss turns linear
_SEED = 0x5EC0  # of the draws among anchors


@dataclass(frozen=True)
class TwoStageLosses:
    """An image without an object keeps the loss of its background.

    First stage, on 256 anchors an image, at most half of which lie on an object: `objectness`, binary cross-entropy, and `rpn_boxes`, the
    smooth L1 loss of their offsets. Second stage, on all proposals: `roi_classes`, cross-entropy, and `roi_boxes`, the smooth L1 loss of
    the offsets of those that overlap an object by half. (Torchvision draws 512 of 2000 proposals there; ours are the best.)
    """

    draws: ClassVar[bool] = True
    reading: TwoStageReading

    def losses(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The terms by name, for images of `size`, height and width.

        target: with `draws` int64 [B], bits of each image from which its anchors are drawn.
        """
        return self._first(prediction, target, size) | self._second(prediction, target)

    def weights(self, target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """What each term is divided by: the images."""
        return dict.fromkeys(("objectness", "rpn_boxes", "roi_classes", "roi_boxes"), torch.tensor(len(target["labels"])))

    def _first(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        first = self.reading.first
        logits, offsets = first.split(prediction)
        anchors = kept_anchors(first, size, offsets.device).to(offsets)
        matches = match(target, anchors, above=first.above, below=first.below, best="any")
        learned = drawn(matches, target["draws"])
        count = learned.sum(1).clamp(min=1)
        positive = matches.positive
        objectness = F.binary_cross_entropy_with_logits(logits[..., 0], positive.to(logits), reduction="none")
        apart = torch.zeros_like(logits[..., 0])
        apart[positive] = _apart(offsets[positive], wanted_offsets(matches, anchors, first.weights))
        return {
            "objectness": ((objectness * learned).sum(1) / count).mean(),
            "rpn_boxes": ((apart * learned).sum(1) / count).mean(),
        }

    def _second(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        proposals, logits, offsets = (wide(prediction[name]) for name in ("proposals", "roi_logits", "roi_offsets"))
        matches = match(target, proposals, above=0.5, below=0.5, best="none")
        real, positive = has_box(proposals), matches.positive
        count = real.sum(1).clamp(min=1)
        each = F.cross_entropy(logits.flatten(0, 1), (matches.labels + 1).flatten(), reduction="none").view_as(matches.labels)
        apart = torch.zeros_like(each)
        of_class = offsets[positive].gather(1, matches.labels[positive][:, None, None].expand(-1, 1, 4))[:, 0]
        apart[positive] = _apart(of_class, encode(matches.boxes[positive], proposals[positive], ROI_WEIGHTS))
        return {"roi_classes": ((each * real).sum(1) / count).mean(), "roi_boxes": (apart.sum(1) / count).mean()}


def drawn(matches: Matches, draws: Tensor) -> Tensor:
    """Which anchors an image learns, bool [B, P]: up to 128 that lie on an object, and background up to 256 in all.

    They follow from `draws`, 64 bits an image: the same in any batch, on any worker and after a resume.
    """
    places = torch.arange(matches.labels.shape[1], device=matches.labels.device)
    bits = hash64(_SEED, draws[:, None], places)
    order = ((bits >> 1) & ((1 << 63) - 1)).double() / 2**63
    positive = hardest(order.masked_fill(~matches.positive, -torch.inf), matches.counts.clamp(max=POSITIVE))
    ground = ~matches.positive & ~matches.between
    return positive | hardest(order.masked_fill(~ground, -torch.inf), SAMPLED - positive.sum(1))


def _apart(given: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 loss of offsets [N, 4], summed over the four: [N]."""
    return F.smooth_l1_loss(given, wanted, beta=_BETA, reduction="none").sum(-1)
