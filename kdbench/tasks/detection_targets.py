"""What a detector without anchors learns from boxes and how its boxes are measured: pure functions of predictions and padded targets.

Source of assignment and losses: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019 (arXiv 1904.01355).

Everywhere B is images, P a pyramid's cells in the order of `models.detectors.positions`, C classes and M padded objects of an image. Boxes
are x0, y0, x1, y1 in pixels of the network's input. A target is {"boxes" [B, M, 4], "labels" int64 [B, M]}, a prediction
{"logits" [B, P, C], "boxes" [B, P, 4]}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss

from kdbench.data.kinds import NO_OBJECT  # of a background cell too

CENTRE_RADIUS = 1.5  # in strides: only cells this close to an object's centre learn it
REACH = 4.0  # strides from a cell to the farthest side of its object, per level. The paper has 8, for levels from stride 8 and 800 pixels
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss: Lin et al., ICCV 2017 (arXiv 1708.02002), section 4.1
LOWEST_SCORE, NMS_OVERLAP, MOST_CANDIDATES = 0.05, 0.5, 1000  # of what is kept: the same, section 4


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


def size_ranges(strides: Tensor, reach: float = REACH) -> Tensor:
    """How far the farthest side of a cell's object may be, [P, 2] in pixels, lowest and highest.

    strides: [P], of the cells. A level of stride s takes reach s / 2 .. reach s; the finest level begins at 0 and the coarsest has no end.
    """
    ranges = torch.stack([strides * (reach / 2), strides * reach], dim=1)
    ranges[strides == strides.min(), 0] = 0
    ranges[strides == strides.max(), 1] = float("inf")
    return ranges


def assign(target: Mapping[str, Tensor], centres: Tensor, strides: Tensor, reach: float = REACH) -> Assignment:
    """Which object each cell learns (section 3.2, with centre sampling).

    A cell learns an object where it lies inside the object's box, not more than 1.5 strides from the box's centre across and down, and
    where the farthest side of the box is in the range of the cell's level. The object of the smallest area wins.

    Args:
        target: Boxes [B, M, 4] and labels [B, M]; rows labelled -1 are padding.
        centres: float [P, 2] of x and y, see `positions`.
        strides: float [P].
        reach: See `size_ranges`.
    """
    boxes, labels = target["boxes"].to(centres), target["labels"]
    if not labels.shape[1]:
        empty = labels.new_full((len(labels), len(centres)), NO_OBJECT)
        return Assignment(empty, boxes.new_zeros(*empty.shape, 4))
    low, high = (corner[:, None] for corner in boxes.split(2, dim=-1))  # [B, 1, M, 2]
    cells = centres[None, :, None]
    sides = torch.cat([cells - low, high - cells], dim=-1)  # [B, P, M, 4]
    near = ((cells - (low + high) / 2).abs() <= CENTRE_RADIUS * strides[None, :, None, None]).all(-1)
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
    logits = _wide(logits)
    present = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    towards = torch.where(present, logits, -logits)  # log-odds of the right answer
    weights = torch.where(present, alpha, 1 - alpha)
    return -(weights * torch.sigmoid(-towards) ** gamma * F.logsigmoid(towards)).sum()


def giou_loss(boxes: Tensor, assignment: Assignment) -> Tensor:
    """Sum over positive cells of 1 - GIoU with the cell's object (Rezatofighi et al., CVPR 2019, arXiv 1902.09630).

    boxes: predicted, [B, P, 4]. Returns a scalar, float32 or wider; 0 with a gradient of 0 where no cell is positive.
    """
    positive = assignment.positive
    predicted = _wide(boxes)[positive]
    total: Tensor = generalized_box_iou_loss(predicted, assignment.boxes[positive].to(predicted), reduction="sum")
    return total


def detection_losses(prediction: Mapping[str, Tensor], assignment: Assignment) -> dict[str, Tensor]:
    """`focal` and `giou`, both divided by the batch's positive cells, or by 1 where it has none.

    An image without an object adds its background to `focal` and nothing to the divisor.
    """
    positives = assignment.counts.sum().clamp(min=1)
    return {
        "focal": focal_loss(prediction["logits"], assignment.labels) / positives,
        "giou": giou_loss(prediction["boxes"], assignment) / positives,
    }


def imitation_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], strides: Tensor, temperature: float = 1.0) -> Tensor:
    """Plain distillation of a detector: the teacher's scores at all cells, and its boxes where it sees something. Our definition.

    The sum over cells and classes of T^2 KL(sigmoid(teacher / T) || sigmoid(student / T)): binary cross-entropy less the teacher's
    entropy, so 0 for equal predictions. To it the sum over cells of the teacher's highest score times the mean distance of the four sides
    in strides. Cells where both see background add next to nothing, so a cell's weight is 1.

    Args:
        student: Prediction of the student.
        teacher: Prediction of the teacher for the same cells; no gradient flows to it.
        strides: float [P], of the cells.
        temperature: T.

    Returns:
        A scalar sum, float32 or wider. Divide it by max(1, positive cells), as the task's losses are.
    """
    logits, wanted = _wide(student["logits"]) / temperature, _wide(teacher["logits"].detach()) / temperature
    present, absent = wanted.sigmoid(), (-wanted).sigmoid()
    divergence = present * (F.logsigmoid(wanted) - F.logsigmoid(logits)) + absent * (F.logsigmoid(-wanted) - F.logsigmoid(-logits))
    seen = _wide(teacher["logits"].detach()).sigmoid().amax(-1)
    distance = (_wide(student["boxes"]) - _wide(teacher["boxes"].detach())).abs().mean(-1) / strides.to(seen)
    return temperature**2 * divergence.sum() + (seen * distance).sum()


def best_boxes(prediction: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The best `count` boxes of each image, by non-maximum suppression within each class.

    Of the 1000 highest scores of at least 0.05, a box goes where a better one of its class overlaps it by more than 0.5.

    Returns:
        boxes: [B, count, 4]; scores: [B, count], falling; classes: int64 [B, count]. Rows beyond an image's boxes are 0.
    """
    logits, boxes = _wide(prediction["logits"]), _wide(prediction["boxes"])
    kept = [_best_of_image(scores, corners, count) for scores, corners in zip(logits.sigmoid(), boxes, strict=True)]
    return {name: torch.stack([image[name] for image in kept]) for name in ("boxes", "scores", "classes")}


def _best_of_image(scores: Tensor, boxes: Tensor, count: int) -> dict[str, Tensor]:
    """scores: [P, C]; boxes: [P, 4]."""
    # A stable sort: equal scores stand in the order of the cells, on every machine.
    ranked, order = scores.flatten().sort(descending=True, stable=True)
    # A number that is nan is not above the lowest score, so it is left out as well.
    order = order[ranked >= LOWEST_SCORE][:MOST_CANDIDATES]
    candidates, classes = boxes[order // scores.shape[1]], order % scores.shape[1]
    # batched_nms moves classes apart by the largest coordinate, which keeps them apart only where none is negative.
    apart = candidates - candidates.min() if len(candidates) else candidates
    chosen = batched_nms(apart, scores.flatten()[order], classes, NMS_OVERLAP)[:count]
    empty = (0, count - len(chosen))
    return {
        "boxes": F.pad(candidates[chosen], (0, 0, *empty)),
        "scores": F.pad(scores.flatten()[order[chosen]], empty),
        "classes": F.pad(classes[chosen], empty),
    }


def shared_boxes(kept: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The share, 0 .. 1, of all boxes of both that the other holds too: one of the same class that overlaps it by more than 0.5.

    kept, other: of the same images, see `best_boxes`. 1 where neither holds a box.
    """
    found = total = 0
    for row in range(len(kept["scores"])):
        ours, theirs = (_row_of(boxes, row) for boxes in (kept, other))
        same = (ours[1][:, None] == theirs[1]) & (box_iou(ours[0], theirs[0]) > NMS_OVERLAP)
        found += int(same.any(1).sum()) + int(same.any(0).sum())
        total += len(ours[1]) + len(theirs[1])
    return found / total if total else 1.0


def _row_of(kept: Mapping[str, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] and classes [K] of one image, without padding."""
    real = kept["scores"][row] > 0
    return kept["boxes"][row][real].float(), kept["classes"][row][real]


def average_precision(kept: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, float]:
    """COCO's average precision in percent: `ap` over overlaps 0.50, 0.55, ..., 0.95, `ap50` and `ap75`; means over classes that occur.

    Args:
        kept: Boxes [N, K, 4], scores [N, K] and classes [N, K] of `best_boxes`; rows with score 0 are padding.
        target: Boxes [N, M, 4] and labels [N, M]; rows labelled -1 are padding.

    Returns:
        The three numbers; 0 where the target has no object at all.
    """
    from torchmetrics.detection import MeanAveragePrecision  # takes seconds, so only who measures a detector pays

    # Every worker has all predictions, and rank 0 alone measures a test set: torchmetrics must not wait for the others.
    most = [1, 10, max(100, kept["scores"].shape[1])]
    metric = MeanAveragePrecision(max_detection_thresholds=most, backend="faster_coco_eval", sync_on_compute=False)
    predicted = zip(kept["boxes"].float().cpu(), kept["scores"].float().cpu(), kept["classes"].long().cpu(), strict=True)
    wanted = zip(target["boxes"].float().cpu(), target["labels"].long().cpu(), strict=True)
    metric.update(
        [{"boxes": boxes[s > 0], "scores": s[s > 0], "labels": classes[s > 0]} for boxes, s, classes in predicted],
        [{"boxes": boxes[labels != NO_OBJECT], "labels": labels[labels != NO_OBJECT]} for boxes, labels in wanted],
    )
    found = metric.compute()
    return {ours: 100 * max(0.0, found[theirs].item()) for ours, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"))}


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
