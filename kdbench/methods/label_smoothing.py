"""Label smoothing (Szegedy et al., CVPR 2016, arXiv 1512.00567): the control that softens labels without a teacher."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.logits import labelled_pixels, mean_over
from kdbench.models.outputs import Outputs
from kdbench.search.space import Range


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy to q'_k = (1 - smoothing) q_k + smoothing / C, where q is the label's own distribution (section 7).

    logits: [B, C] or [B, C, H, W]; target: int64 [B], soft [B, C] or int64 [B, H, W], where pixels of 255 are left out.
    Returns a scalar in nats, float32 or wider.
    """
    logits, target = loss_precision(logits, target)
    log_q = F.log_softmax(logits, dim=1)
    valid = labelled_pixels(target)
    if target.dim() == 2:
        own = -(target * log_q).sum(dim=1)
    else:
        classes = target if valid is None else target.where(valid, 0)
        own = -log_q.gather(1, classes.unsqueeze(1)).squeeze(1)
    return mean_over((1 - smoothing) * own - smoothing * log_q.mean(dim=1), valid)


class LabelSmoothing(Method):
    """Cross-entropy to labels mixed with the uniform distribution, in place of the task's own."""

    paper = Paper(
        "Rethinking the Inception Architecture for Computer Vision",
        arxiv="1512.00567",
        venue="CVPR 2016",
        formula="L = -sum_k ((1 - eps) 1[k = y] + eps / C) log q_k",
    )
    reads = frozenset({"class logits", "pixel logits"})
    weighs_as_task = frozenset({"smoothed_ce"})
    needs_teacher = False

    class Params(Method.Params):
        task_weight: Annotated[float, Field(ge=0)] = 0.0  # the smoothed loss replaces the task's
        smoothing: Annotated[float, Range(0.01, 0.4), Field(ge=0, lt=1)] = 0.1

    params: Params

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return {"smoothed_ce": smoothed_cross_entropy(s.logits, batch.labels, self.params.smoothing)}
