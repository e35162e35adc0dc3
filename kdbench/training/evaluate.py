"""Predictions over a whole part of a data set, each sample exactly once whatever the number of workers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.data.batch import Part
from kdbench.data.loader import in_order
from kdbench.errors import Diverged
from kdbench.models.outputs import predicted
from kdbench.training.precision import autocast, images_for
from kdbench.training.session import Session


def check_numbers(prediction: Tensor, whose: str) -> None:
    """Raises Diverged, with `whose` in front, where a prediction is nan: metrics would take it for an answer like any other."""
    if broken := int(prediction.isnan().flatten(1).any(1).sum()):
        raise Diverged(f"{whose}, {broken} of {len(prediction)} are nan")


@torch.no_grad()
def predict(model: nn.Module, part: Part, session: Session, precision: str, batch_size: int = 512) -> Tensor:
    """The model's predictions [N, ...] in the part's order, float32 on the CPU, un-augmented, in eval mode (restored afterwards).

    Each worker takes every world_size-th sample; workers that have one fewer repeat their last, which is dropped again by position.
    """
    count, world = len(part), session.world_size
    share = -(-count // world)
    rows = (torch.arange(share) * world + session.rank).clamp(max=count - 1)
    training = model.training
    model.eval()
    chunks = []
    for batch in in_order(part.select(rows) if world > 1 else part, batch_size, session.device):
        with autocast(precision, session.device):
            prediction = predicted(model, images_for(batch.inputs, precision))
        chunks.append(prediction.float() if precision != "fp64" else prediction)
    model.train(training)
    mine = torch.cat(chunks)
    if world == 1:
        return mine.cpu()
    joined = session.gather(mine).cpu()
    by_rank = joined.reshape(world, share, *joined.shape[1:])
    return by_rank.transpose(0, 1).reshape(world * share, *joined.shape[1:])[:count]
