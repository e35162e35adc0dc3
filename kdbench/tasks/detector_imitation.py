"""Plain distillation of a detector: the teacher's scores at all places, and its boxes where it sees something. Our definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from kdbench.data.columns import several
from kdbench.errors import UserError
from kdbench.models.detectors.readings import Dense, Reading
from kdbench.models.outputs import Outputs


def imitation_loss(student: Dense, teacher: Dense, temperature: float = 1.0, confident: float = 0.3) -> Tensor:
    """Mean over images of what the student's scores and boxes differ from the teacher's.

    q_i is the teacher's highest score at place i of an image. Scores: T^2 times the sum over places and classes of the binary cross-entropy
    of sigmoid(student / T) with sigmoid(teacher / T), over max(1, sum of q). Boxes: over the places with q_i >= `confident`, the sum of
    q_i (1 - GIoU) over max(1, sum of these q_i). So an image counts as much as any other, whatever it shows.

    Args:
        student: Of the student, [B, P, C] and [B, P, 4].
        teacher: Of the teacher at the same places; no gradient flows to it.
        temperature: T.
        confident: Between 0 and 1.

    Returns:
        A scalar, float32 or wider. It is not 0 for equal predictions: the cross-entropy is then the teacher's entropy.
    """
    wanted, boxes = teacher.logits.detach(), teacher.boxes.detach().to(student.boxes)
    seen = wanted.sigmoid().amax(-1)
    soft = (wanted / temperature).sigmoid()
    divided = student.logits / temperature
    # In log space, so that no score becomes 0 and no logarithm infinite.
    scores = -(soft * F.logsigmoid(divided) + (1 - soft) * F.logsigmoid(-divided)).sum((1, 2))
    counted = torch.where(seen >= confident, seen, 0)
    apart = generalized_box_iou_loss(student.boxes, boxes, reduction="none")
    by_image = temperature**2 * scores / seen.sum(1).clamp(min=1) + (counted * apart).sum(1) / counted.sum(1).clamp(min=1)
    mean: Tensor = by_image.mean()
    return mean


def imitation(student: Outputs, teacher: Outputs, batch: object, temperature: float, size: tuple[int, int], confident: float) -> Tensor:
    """`imitation_loss` of what both networks gave for images of `size`. Raises UserError where their places or classes differ."""
    ours, theirs = student.reading, teacher.reading
    check_comparable(ours, theirs)
    return imitation_loss(
        ours.dense(several(student.prediction), size), theirs.dense(several(teacher.prediction), size), temperature, confident
    )


def check_comparable(student: Reading, teacher: Reading) -> None:
    """Raise UserError unless both say the same number of classes at the same places."""
    if student.num_classes != teacher.num_classes:
        raise UserError(f"method kd: the student knows {student.num_classes} classes and the teacher {teacher.num_classes}")
    if student.places != teacher.places:
        ours, theirs = (f"{of} at strides {', '.join(map(str, strides))}" for of, strides in (student.places, teacher.places))
        raise UserError(
            f"method kd compares two detectors place by place; the student has {ours}, the teacher {theirs}: "
            "use networks of one family and the same levels, or a method that looks at feature maps (mgd, fgd, pkd, cwd)"
        )
