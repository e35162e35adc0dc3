"""Arithmetic on class logits that several methods share: hard labels, the classes beside the label, means over labelled positions."""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench.data.columns import Columns, alone, tensors
from kdbench.errors import UserError
from kdbench.models.outputs import Shapes

IGNORED_PIXEL = 255  # the target of a segmentation pixel that has no class


def hard_labels(target: Tensor) -> Tensor:
    """int64 [B] class indices of hard labels [B], or of the largest entry of soft labels [B, C]."""
    return target.argmax(dim=1) if target.dim() == 2 else target


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: of each row of logits [B, C], the entry of its label, int64 [B]."""
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def other_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, C - K]: logits [B, C] without each row's labels, int64 [B] or [B, K] with no two alike in a row, the rest in order.

    The entries are left out, not masked by a large negative number: exact at any logits, with shapes that are known beforehand.
    """
    left_out = labels.reshape(len(labels), -1).sort(dim=1).values
    columns = torch.arange(logits.shape[1] - left_out.shape[1], device=logits.device).expand(len(labels), -1)
    for label in left_out.split(1, dim=1):
        columns = columns + (columns >= label)
    return logits.gather(1, columns)


def mean_over(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of values [B, ...] where valid, a boolean of the same shape, is true; of all where it is None; 0 where nothing is valid."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def labelled_pixels(target: Columns | None) -> Tensor | None:
    """Boolean [B, H, W], true where a dense int64 target has a class; None without labels or for those of whole images, which all count."""
    if target is None or not alone(target):
        return None
    (labels,) = tensors(target)
    return labels != IGNORED_PIXEL if labels.dim() == 3 else None


def require_same_classes(method: str, student: Shapes, teacher: Shapes | None) -> None:
    """Raise UserError unless teacher and student give logits of one shape with at least two classes."""
    if teacher is None:
        raise UserError(f"method {method!r} needs a teacher")
    if student.logits != teacher.logits:
        shapes = f"the student gives {list(student.logits)}, the teacher {list(teacher.logits)}"
        raise UserError(f"method {method!r} compares logits class by class: {shapes}")
    if student.logits[0] < 2:
        raise UserError(f"method {method!r} needs at least two classes, the models give {student.logits[0]}")
