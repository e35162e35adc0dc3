"""How alike two models' predictions are, for images and for pixels alike."""

from __future__ import annotations

import torch
from torch import Tensor

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
