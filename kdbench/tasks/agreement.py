"""How alike two models' predictions are, for images and for pixels alike."""

from __future__ import annotations

import torch
from torch import Tensor

# The teacher's predictions that a record was compared with came from its cache, those that are kept from its own test. They are mostly the
# same numbers. Where batches of another size changed a last bit, two roundings to half precision, each of half of 2**-10 of a logit, may
# have gone different ways.
_ROUNDING = 2.0**-10
_SPACING = 2.0**-24  # between the numbers next to 0 that half precision has: the relative bound does not hold there
_SAMPLES_AT_ONCE = 256  # stored predictions are half precision and may be large; only this many are widened at a time


def agreement(prediction: Tensor, teacher: Tensor) -> dict[str, float]:
    """prediction, teacher: logits [N, C] or [N, C, H, W] of the same samples.

    Returns `agreement`, the share of samples or pixels with the same best class, and `teacher_kl`, the mean KL(teacher || student) in nats.
    """
    equal, divergence = 0, 0.0
    for student_logits, teacher_logits in zip(prediction.split(_SAMPLES_AT_ONCE), teacher.split(_SAMPLES_AT_ONCE), strict=True):
        equal += int((student_logits.argmax(1) == teacher_logits.argmax(1)).sum())
        student_log, teacher_log = student_logits.double().log_softmax(1), teacher_logits.double().log_softmax(1)
        divergence += float(torch.nn.functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True))
    places = prediction.numel() // prediction.shape[1]
    return {"agreement": equal / places, "teacher_kl": divergence / places}


def agreement_tolerance(found: dict[str, float], teacher: Tensor) -> dict[str, float]:
    """How far the numbers of `agreement` may be off for logits [N, C, ...] of a teacher that were rounded otherwise."""
    return {"agreement": _undecided(teacher), "teacher_kl": _rounding_of_kl(found["teacher_kl"], teacher)}


def _undecided(teacher: Tensor) -> float:
    """The share of the teacher's predictions [N, C, ...] whose two best classes rounding could swap: the others agree as they did."""
    if teacher.shape[1] < 2:
        return 0.0
    best, second = teacher.topk(2, dim=1).values.unbind(dim=1)
    return (best - second <= 2 * _rounding(teacher)).double().mean().item()


def _rounding_of_kl(divergence: float, teacher: Tensor) -> float:
    """How far rounding of the teacher's logits z by r can move KL(teacher || student), to first order.

    The gradient by z is p (log p/q - KL). Its absolute sum is at most 2 E|log p/q|, and that expectation at most KL + 0.74.
    """
    return _rounding(teacher).double().mean().item() * 2 * (divergence + 1)


def _rounding(teacher: Tensor) -> Tensor:
    """The most by which two roundings of one logit of a sample can differ, [N, ...] for logits [N, C, ...]."""
    return (_ROUNDING * teacher.abs().amax(dim=1)).clamp(min=_SPACING)
