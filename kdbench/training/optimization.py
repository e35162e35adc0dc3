"""Optimizers, learning-rate schedules and the moving average, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdbench.catalogue import nearest
from kdbench.errors import UserError, in_one_line
from kdbench.experiment import Recipe
from kdbench.methods.base import OwnOptimizer

OPTIMIZERS = ("sgd", "adamw")
Schedule = Callable[[int], float]


def check_optimization(recipe: Recipe) -> None:
    """Raise UserError where the recipe's optimizer or schedule can't be made: an unknown name, or settings that do not go together."""
    try:
        make_schedule(recipe, 1, make_optimizer([nn.Parameter(torch.zeros(1))], recipe))
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(
            f"recipe.optimizer: {recipe.optimizer!r} with schedule {recipe.schedule!r} can't be made: {in_one_line(error)}"
        ) from error


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD and AdamW are torch's, anything else timm's, with the learning rate, momentum and weight decay of the recipe.

    Raises UserError for a name that neither has.
    """
    parameters = [p for p in parameters if p.requires_grad]
    name = recipe.optimizer.lower()
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay, fused=True
        )
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    from timm.optim._optim_factory import create_optimizer_v2, list_optimizers

    names = [str(known) for known in list_optimizers()]
    if name not in names:
        raise UserError(f"recipe.optimizer: unknown optimizer {recipe.optimizer!r}{nearest(name, [*OPTIMIZERS, *names])}")
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        parameters, opt=name, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )
    return optimizer


def make_optimizers(module: nn.Module, own: Sequence[OwnOptimizer], recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """The recipe's optimizer of all of `module` that has none of its own, then those of the parts that have."""
    apart = {parameter for one in own for parameter in one.part.parameters()}
    rest = make_optimizer((parameter for parameter in module.parameters() if parameter not in apart), recipe)
    return rest, *(make_optimizer(one.part.parameters(), recipe.model_copy(update=dict(one.changes))) for one in own)


def make_schedule(recipe: Recipe, steps_per_epoch: int, optimizer: torch.optim.Optimizer) -> Schedule:
    """The learning rate's factor at each optimizer step, a pure function of the step, so that resuming needs no state.

    Linear warm-up over `warmup_epochs`, then cosine or linear to zero, or constant; other names are timm's schedulers, updated once a step.
    """
    total, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
        "linear": lambda share: 1 - share,
        "constant": lambda share: 1.0,
    }
    if recipe.schedule not in shapes:
        return _timm_schedule(recipe, total, warmup, optimizer, list(shapes))
    shape = shapes[recipe.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape((step - warmup) / max(1, total - warmup))

    return factor


def _timm_schedule(recipe: Recipe, total: int, warmup: int, optimizer: torch.optim.Optimizer, ours: list[str]) -> Schedule:
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    theirs = ["tanh", "step", "multistep", "poly"]  # `plateau` follows a metric, not the step, and can't be replayed
    if recipe.schedule not in theirs:
        raise UserError(f"recipe.schedule: unknown schedule {recipe.schedule!r}{nearest(recipe.schedule, [*ours, *theirs])}")
    decay = max(1, total // 3)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.schedule,
        num_epochs=total,
        decay_epochs=decay,
        decay_milestones=[decay, 2 * decay],
        warmup_epochs=warmup,
        warmup_lr=recipe.lr / max(1, warmup),
        min_lr=0.0,
        step_on_epochs=True,  # its "epoch" is our step
    )
    assert scheduler is not None
    return lambda step: scheduler._get_lr(step)[0] / recipe.lr


def make_average(student: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """An exponential moving average of the student's weights and buffers, or None where the recipe asks for none."""
    if recipe.ema is None:
        return None
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
