"""Predictions over a whole part of a data set, each sample exactly once whatever the number of workers."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdbench.data.batch import Part
from kdbench.data.columns import Columns, joined, mapped, tensors, widened
from kdbench.data.decoding import measured_target
from kdbench.data.loader import in_order
from kdbench.errors import Diverged
from kdbench.tasks.base import Role, Task
from kdbench.training.precision import autocast, placed_inputs
from kdbench.training.session import Session

_MOST_SAMPLES = 512
_MOST_NUMBERS = 512 * 3 * 224 * 224  # of all inputs of a pass


def check_numbers(prediction: Columns, whose: str) -> None:
    """Raises Diverged, with `whose` in front, where a prediction is nan: metrics would take it for an answer like any other."""
    broken = torch.stack([tensor.isnan().reshape(len(tensor), -1).any(1) for tensor in tensors(prediction)]).any(0)
    if broken.any():
        raise Diverged(f"{whose}, {int(broken.sum())} of {len(broken)} are nan")


def targets_of(part: Part) -> Columns:
    """What the predictions of a part are measured against."""
    return measured_target(part)


def at_once(task: Task, role: Role) -> int:
    """How many samples are predicted in one pass: 512, and fewer where their inputs would take more than those of 512 usual images.

    Large pictures have large maps inside of a network, and dense predictions.
    """
    example = task.example(role)
    numbers = math.prod(example) if isinstance(example, tuple) else sum(tensor[:1].numel() for tensor in tensors(example))
    return max(1, min(_MOST_SAMPLES, _MOST_NUMBERS // max(1, numbers)))


@torch.no_grad()
def predict(model: nn.Module, part: Part, session: Session, precision: str, task: Task, role: Role = "student") -> Columns:
    """What the task keeps of the model's predictions, [N, ...] in the part's order, float32 on the CPU, un-augmented.

    The model runs in eval mode, which is restored afterwards. Each worker takes every world_size-th sample; workers that have one fewer
    repeat their last, which is dropped again by position.
    """
    if part.encoded_targets:
        part = replace(part, target=None)  # which nothing here reads, so that nothing is drawn in vain
    count, world = len(part), session.world_size
    share = -(-count // world)
    rows = (torch.arange(share) * world + session.rank).clamp(max=count - 1)
    training = model.training
    model.eval()
    chunks = []
    for batch in in_order(part.select(rows) if world > 1 else part, at_once(task, role), session.device):
        with autocast(precision, session.device):
            prediction = task.predict(model, placed_inputs(task.inputs_for(role, batch.inputs), precision))
        chunks.append(widened(task.kept(prediction)))
    model.train(training)
    mine = joined(chunks)

    def everyones(rows: Tensor) -> Tensor:
        gathered = session.gather(rows).cpu()
        by_rank = gathered.reshape(world, share, *gathered.shape[1:])
        return by_rank.transpose(0, 1).reshape(world * share, *gathered.shape[1:])[:count]

    return mapped(mine, Tensor.cpu if world == 1 else everyones)
