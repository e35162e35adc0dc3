"""Which boxes of an image stay: non-maximum suppression with a result of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

_SMALLEST = 1e-2  # pixels; a side below it is no box, as torchvision has it


def best_of_each_image(
    scores: Tensor, boxes: Tensor, count: int, *, lowest: float, overlap: float, levels: Sequence[int], most: int, by_class: bool = False
) -> dict[str, Tensor]:
    """The best `count` boxes of each image: a box goes where a better one of its class overlaps it by more than `overlap`.

    Args:
        scores: [B, P, C] in [0, 1].
        boxes: [B, P, 4] of x0, y0, x1, y1; or [B, P, C, 4], one for each class.
        count: Boxes an image.
        lowest: Scores below it are left out, and so are those that are nan.
        overlap: Intersection over union.
        levels: Places of each level; they add up to P.
        most: Of each level so many of the highest scores are candidates.
        by_class: Of each class instead of each level.

    Returns:
        boxes: [B, count, 4]; scores: [B, count], falling; classes: int64 [B, count]. Rows beyond an image's boxes are 0.
    """
    kept = [_best(one, corners, count, lowest, overlap, levels, most, by_class) for one, corners in zip(scores, boxes, strict=True)]
    return {name: torch.stack([image[name] for image in kept]) for name in ("boxes", "scores", "classes")}


def _best(
    scores: Tensor, boxes: Tensor, count: int, lowest: float, overlap: float, levels: Sequence[int], most: int, by_class: bool
) -> dict[str, Tensor]:
    """scores: [P, C]; boxes: [P, 4] or [P, C, 4]."""
    classes_of = scores.shape[1]
    places = torch.arange(scores.numel(), device=scores.device).view_as(scores)
    groups = places.unbind(1) if by_class else places.split(list(levels))
    order = torch.cat([group.flatten()[_highest(scores.flatten()[group.flatten()], lowest, most)] for group in groups])
    # Group after group, so a stable sort leaves equal scores in the order of the places on every machine.
    order = order[scores.flatten()[order].sort(descending=True, stable=True).indices]
    found = boxes[order // classes_of] if boxes.ndim == 2 else boxes.flatten(0, 1)[order]
    candidates, classes, values = found, order % classes_of, scores.flatten()[order]
    large = ((candidates[:, 2:] - candidates[:, :2]) >= _SMALLEST).all(1)
    candidates, classes, values = candidates[large], classes[large], values[large]
    # batched_nms moves classes apart by the largest coordinate, which keeps them apart only where none is negative.
    apart = candidates - candidates.min() if len(candidates) else candidates
    kept = batched_nms(apart, values, classes, overlap)[:count]
    empty = (0, count - len(kept))
    return {
        "boxes": F.pad(candidates[kept], (0, 0, *empty)),
        "scores": F.pad(values[kept], empty),
        "classes": F.pad(classes[kept], empty),
    }


def _highest(scores: Tensor, lowest: float, most: int) -> Tensor:
    """Positions of the `most` highest of scores [K] that reach `lowest`, falling; a score that is nan reaches nothing."""
    ranked, order = scores.sort(descending=True, stable=True)
    return order[ranked >= lowest][:most]
