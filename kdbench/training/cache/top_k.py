"""The few largest logits in place of all of them, for a cache of many classes: what is kept, and what it becomes again.

StoredAt are k logits, their classes, and r = log sum exp of all others. Given back, each of the other C - k classes has the logit
r - log(C - k): the k probabilities and the sum of the others are then exact at temperature 1, and the others alike. At a temperature
T > 1 the others get too much together, because a mean of powers 1/T is at most that power of the mean; `smallest_faithful` measures
how much that changes a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

BOUND = 1e-3  # the most, relative, that loss or gradient may change for `auto`
TEMPERATURES = (1.0, 4.0)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [B, C]: the k < C largest [B, k], their classes int64 [B, k], and log sum exp of all others [B]."""
    values, classes = logits.topk(k, dim=1)
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1)
    return values, classes, rest


def densified(values: Tensor, classes: Tensor, rest: Tensor, count: int) -> Tensor:
    """Logits [B, count] from what `largest` gave."""
    others = rest - math.log(count - values.shape[1])
    return others[:, None].expand(-1, count).clone().scatter_(1, classes, values)


def smallest_faithful(logits: Tensor) -> tuple[int | None, Mapping[str, float]]:
    """The smallest k = 1, 2, 4, ... that changes distillation's loss and gradient by less than BOUND, and the change at each k tried.

    logits: float [N, C], a teacher's on some images. None where no k below C / 2 does, from where on nothing would be saved.
    """
    measured: dict[str, float] = {}
    k = 1
    while 2 * k < logits.shape[1]:
        kept, classes, rest = largest(logits, k)
        rounded = kept.half().float()
        stored = kept if rounded.isinf().any() else rounded  # a cache in fp16 refuses such logits, so they are in one in fp32
        measured[str(k)] = change(logits, densified(stored, classes, rest, logits.shape[1]))
        if measured[str(k)] < BOUND:
            return k, measured
        k *= 2
    return None, measured


def change(logits: Tensor, replaced: Tensor) -> float:
    """How much KL(teacher || student) and its gradient change when the teacher's `replaced` [N, C] stand for its `logits` [N, C].

    The largest relative change over TEMPERATURES and over two students: one that knows nothing, and one as far from the teacher as the
    teacher's logits spread.
    """
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    students = (torch.zeros_like(logits), logits + logits.std() * noise)
    return max(_change(student, logits, replaced, temperature) for student in students for temperature in TEMPERATURES)


def _change(student: Tensor, logits: Tensor, replaced: Tensor, temperature: float) -> float:
    log_q = F.log_softmax(student.double() / temperature, dim=1)
    log_p, log_r = (F.log_softmax(teacher.double() / temperature, dim=1) for teacher in (logits, replaced))
    p, r, q = log_p.exp(), log_r.exp(), log_q.exp()
    loss, other = ((x * (log_x - log_q)).sum(1).mean() for x, log_x in ((p, log_p), (r, log_r)))
    gradient = (p - q).norm()
    largest_change: float = max(((other - loss).abs() / loss.abs()).item(), ((r - p).norm() / gradient).item())
    return largest_change
