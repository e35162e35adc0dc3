"""Teacher-free NKD, tf-NKD (Yang et al., 2022, arXiv 2208.10139)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.methods.base import Method, Paper, Progress, loss_precision
from kdbench.methods.logits import label_logits
from kdbench.models.outputs import Outputs
from kdbench.search.space import Range


def self_target_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """-mean_b w_b log p_b for each label of a sample; no gradient flows through its soft target w = p + v - mean_b p.

    logits: [B, C], p their softmax at the label; target: int64 [B], one label with v = 1, or soft [B, C], where the two largest
    entries are the labels and their values v; w = 0 where v = 0. The mean runs over the whole batch given.
    Returns one scalar in nats a label, float32 or wider.
    """
    logits, target = loss_precision(logits, target)
    log_p = F.log_softmax(logits, dim=1)
    if target.dim() == 1:
        return (_self_target_loss(label_logits(log_p, target), target.new_ones(target.shape)),)
    values, labels = target.sort(dim=1, descending=True, stable=True)
    return tuple(_self_target_loss(label_logits(log_p, labels[:, k]), values[:, k]) for k in (0, 1))


def _self_target_loss(log_p: Tensor, value: Tensor) -> Tensor:
    p = log_p.detach().exp()
    weight = (p + value - p.mean()).where(value != 0, 0.0)
    return -(weight * log_p).mean()


class TeacherFreeNKD(Method):
    """Be one's own teacher: weigh each sample's cross-entropy by how sure the student is of it beside the batch's mean."""

    paper = Paper(
        "Rethinking Knowledge Distillation via Cross-Entropy",
        arxiv="2208.10139",
        formula="L = w_task CE - w log q_y,  w = stop_grad(q_y + 1 - mean_batch q_y)",
        checked_against="yzd-v/cls_KD@de48db4",
    )
    needs_teacher = False
    batch_coupled = True  # the mean in the soft target: the authors' is over one worker's samples, ours over all workers'

    class Params(Method.Params):
        weight: Annotated[float, Range(0.1, 2.0), Field(ge=0)] = 1.0  # the authors have no weight: 1

    params: Params

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        losses = self_target_losses(s.logits, batch.labels)
        return {f"tf_nkd{label}": self.params.weight * loss for label, loss in enumerate(losses)}
