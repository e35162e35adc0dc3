"""The boxes that a detector's second stage looks at: a fixed number of the first stage's best ones, and what its maps hold there.

Sources: Ren et al., "Faster R-CNN", NIPS 2015 (arXiv 1506.01497); Lin et al., CVPR 2017 (arXiv 1612.03144), eq. 1, for the level of a box.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, nms, roi_align

from kdbench.data.columns import wide
from kdbench.models.detectors.readings import cut_at_edges

_SMALLEST = 1e-3  # pixels; a side below it is no proposal, as torchvision has it
_SMALLEST_FOUND = 1e-2  # the same of what is found in the end
_SAMPLES = 2  # of a map, across and down in each of a box's bins


def best_proposals(
    boxes: Tensor,
    scores: Tensor,
    levels: Sequence[int],
    size: tuple[int, int],
    valid: Tensor | None,
    *,
    count: int,
    most: int,
    overlap: float,
) -> Tensor:
    """The best `count` boxes of each image, after non-maximum suppression within each level: [B, count, 4], rows beyond them 0.

    Its shapes depend on no value, so that a network with it can be exported with a dynamic batch.

    Args:
        boxes: [B, P, 4].
        scores: [B, P], of any range.
        levels: Places of each level; they add up to P.
        size: Height and width of the input, beyond which no box reaches.
        valid: [B, 2], height and width of the picture in each input; None where it fills the input.
        count: Boxes an image.
        most: Of each level so many of the highest scores are candidates.
        overlap: Intersection over union with a better box of the level above which a box goes.
    """
    numbers = [min(most, places) for places in levels]
    starts = [sum(levels[:level]) for level in range(len(levels))]
    order = torch.cat(
        [part.topk(k, dim=1).indices + start for part, k, start in zip(scores.split(list(levels), dim=1), numbers, starts, strict=True)],
        dim=1,
    )
    level_of = torch.cat([torch.full((k,), level, device=boxes.device) for level, k in enumerate(numbers)])
    of_level = level_of.expand(boxes.shape[0], -1)  # len() would fix the batch in an export
    scores, boxes = scores.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    boxes = cut_at_edges(boxes, size, valid)
    large = (boxes[..., 2:] - boxes[..., :2] >= _SMALLEST).all(-1)
    return _first(boxes, scores, large & _kept(boxes, scores, of_level, large, overlap, size), count)[0]


def best_of_classes(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], valid: Tensor | None, *, count: int, most: int, lowest: float, overlap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `count` boxes of each image, after non-maximum suppression within each class; shapes depend on no value.

    Args:
        boxes: [B, R, C, 4], one for each class.
        scores: [B, R, C].
        size: As in `best_proposals`.
        valid: As in `best_proposals`.
        count: Boxes an image.
        most: So many of an image's highest scores are candidates.
        lowest: Scores up to it are left out.
        overlap: Intersection over union.

    Returns:
        Boxes [B, count, 4], scores [B, count], falling, and classes, int64 [B, count]; 0 in rows beyond an image's boxes.
    """
    scores, order = scores.flatten(1).topk(min(most, scores.shape[1] * scores.shape[2]), dim=1)
    classes = order % boxes.shape[2]
    boxes = cut_at_edges(boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4)), size, valid)
    large = (boxes[..., 2:] - boxes[..., :2] >= _SMALLEST_FOUND).all(-1) & (scores > lowest)
    found, values, best = _first(boxes, scores, large & _kept(boxes, scores, classes, large, overlap, size), count)
    of_class = F.pad(classes.gather(1, best), (0, count - best.shape[1]))
    return found, values, torch.where(values > 0, of_class, 0)


def _first(boxes: Tensor, scores: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best that are kept, with 0 in rows beyond them: boxes, scores and, of as many as there are places, where they stood."""
    number = min(count, scores.shape[1])
    values, best = scores.masked_fill(~kept, -torch.inf).topk(number, dim=1)
    real = values > -torch.inf
    chosen = boxes.gather(1, best[..., None].expand(-1, -1, 4)) * real[..., None]
    return F.pad(chosen, (0, 0, 0, count - number)), F.pad(torch.where(real, values, 0), (0, count - number)), best


def _kept(boxes: Tensor, scores: Tensor, groups: Tensor, large: Tensor, overlap: float, size: tuple[int, int]) -> Tensor:
    """Which boxes [B, K, 4] stay within their groups, int64 [B, K]: bool [B, K]. Those that are not `large` stay or go."""
    return (_kept_in_one_call if torch.compiler.is_exporting() else _kept_by_image)(boxes, scores, groups, large, overlap, size)


def _kept_by_image(boxes: Tensor, scores: Tensor, groups: Tensor, large: Tensor, overlap: float, size: tuple[int, int]) -> Tensor:
    """Which boxes [B, K, 4] stay, bool [B, K]."""
    kept = torch.zeros_like(large)
    if boxes.is_meta:  # where a network is only looked at, no box has a place
        return large
    for row, some in enumerate(large):
        places = some.nonzero().flatten()
        kept[row, places[batched_nms(boxes[row, places], scores[row, places], groups[row, places], overlap)]] = True
    return kept


def _kept_in_one_call(boxes: Tensor, scores: Tensor, groups: Tensor, large: Tensor, overlap: float, size: tuple[int, int]) -> Tensor:
    """The same for exporters, which follow no loop over images: one suppression of all, with images and groups moved apart."""
    images, places = scores.shape
    image = torch.arange(images, device=boxes.device)[:, None].expand(-1, places)
    apart = torch.stack([groups * (size[1] + 1), image * (size[0] + 1)], dim=-1).to(boxes)
    kept = nms((boxes + apart.repeat(1, 1, 2)).flatten(0, 1), scores.flatten(), overlap)
    return torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view(images, places) > 0


def pooled(maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, *, bins: int, turn: float) -> Tensor:
    """What the maps hold in boxes [B, R, 4], each in the level of its size: [B R, D, bins, bins].

    Args:
        maps: Of the levels, the finest first.
        strides: Of the levels, in pixels.
        boxes: In pixels of the input; those without an area are looked at in the finest level.
        bins: Across and down.
        turn: Square root of the area from which the second level is looked at, in pixels; each further level begins at twice as much.
    """
    images, count, _ = boxes.shape
    flat = boxes.flatten(0, 1)
    image = torch.arange(images, device=boxes.device).repeat_interleave(count).to(flat)
    places = torch.cat([image[:, None], flat], dim=1)
    side = (flat[:, 2:] - flat[:, :2]).prod(-1).sqrt()
    # The small number keeps a box whose size is just a power of two from falling back by rounding, as in torchvision.
    level = (side / turn).log2().add(1 + 1e-6).floor().clamp(0, len(maps) - 1)

    def seen(number: int, some: Tensor) -> Tensor:
        # In half precision, places of boxes would be rounded to whole pixels.
        at = wide(maps[number])
        found: Tensor = roi_align(at, some.to(at), bins, 1 / strides[number], _SAMPLES)
        return found.to(maps[number])

    if torch.compiler.is_exporting() or places.is_meta:
        result = seen(0, places)
        for number in range(1, len(maps)):
            result = torch.where((level == number)[:, None, None, None], seen(number, places), result)
        return result
    result = maps[0].new_zeros(len(places), maps[0].shape[1], bins, bins)
    for number in range(len(maps)):
        some = (level == number).nonzero().flatten()
        result = result.index_copy(0, some, seen(number, places[some]))
    return result
