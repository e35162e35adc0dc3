"""Optimizers, learning-rate schedules and the moving average, by name."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdbench.catalogue import nearest
from kdbench.errors import UserError, in_one_line
from kdbench.experiment import Recipe
from kdbench.methods.base import Method, OwnOptimizer

OPTIMIZERS = ("sgd", "adamw")
DECAY_RATE = 0.1  # of step and multistep, where the recipe names none: timm's
Schedule = Callable[[int], float]


def check_optimization(recipe: Recipe) -> None:
    """Raise UserError where the recipe's optimizer or schedule can't be made: an unknown name, or settings that do not go together."""
    try:
        make_schedule(recipe, 1, make_optimizer([nn.Parameter(torch.zeros(1))], recipe))
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        raise UserError(
            f"recipe.optimizer: {recipe.optimizer!r} with schedule {recipe.schedule!r} can't be made: {in_one_line(error)}"
        ) from error


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe, undecayed: Collection[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """SGD and AdamW are torch's, anything else timm's, with the learning rate, momentum and weight decay of the recipe.

    Args:
        parameters: frozen ones are left out.
        recipe: the settings.
        undecayed: those of the parameters whose weight decay is 0. They are a group of their own, the second one.

    Raises:
        UserError: for a name that neither library has.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p not in undecayed]},
        {"params": [p for p in trained if p in undecayed], "weight_decay": 0.0},
    ]
    chosen: list[Any] = [group for group in groups if group["params"]] if undecayed else trained
    name = recipe.optimizer.lower()
    if name == "sgd":
        return torch.optim.SGD(
            chosen, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay, fused=True
        )
    if name == "adamw":
        return torch.optim.AdamW(chosen, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    from timm.optim._optim_factory import create_optimizer_v2, list_optimizers

    names = [str(known) for known in list_optimizers()]
    if name not in names:
        raise UserError(f"recipe.optimizer: unknown optimizer {recipe.optimizer!r}{nearest(name, [*OPTIMIZERS, *names])}")
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        chosen, opt=name, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )
    return optimizer


def make_optimizers(module: nn.Module, own: Sequence[OwnOptimizer], recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """The recipe's optimizer of all of `module` that has none of its own, then those of the parts that have."""
    apart = {parameter for one in own for parameter in one.part.parameters()}
    undecayed = _undecayed(module) if recipe.no_decay_on_norms else frozenset()
    rest = make_optimizer((parameter for parameter in module.parameters() if parameter not in apart), recipe, undecayed)
    return rest, *(make_optimizer(one.part.parameters(), recipe.model_copy(update=dict(one.changes)), undecayed) for one in own)


def handed_over(optimizers: Sequence[torch.optim.Optimizer], method: Method) -> tuple[torch.optim.Optimizer, ...]:
    """Give a method those of `make_optimizers` that it steps itself; returns the others.

    Raises UserError where such a method is not batch-coupled: its workers would part ways.
    """
    first, *parts = optimizers
    by_method = [own.by_method for own in method.own_optimizers()]
    theirs = tuple(optimizer for optimizer, its in zip(parts, by_method, strict=True) if its)
    if theirs and not method.batch_coupled:
        raise UserError(
            f"method {type(method).__name__} steps a part of its own, which all workers must do alike; let it say `batch_coupled = True`"
        )
    method.use_optimizers(theirs)
    return first, *(optimizer for optimizer, its in zip(parts, by_method, strict=True) if not its)


def _undecayed(module: nn.Module) -> frozenset[nn.Parameter]:
    """Norms, biases, other parameters below two dimensions, and what a part's `no_weight_decay()` names: as timm chooses them."""
    from timm.optim._param_groups import param_groups_weight_decay

    named = {
        f"{path}.{name}".removeprefix(".")
        for path, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    }
    groups = param_groups_weight_decay(module, weight_decay=1.0, no_weight_decay_list=named)
    return frozenset(parameter for group in groups if not group["weight_decay"] for parameter in group["params"])


def make_schedule(recipe: Recipe, steps_per_epoch: int, optimizer: torch.optim.Optimizer) -> Schedule:
    """The learning rate's factor at each optimizer step, a pure function of the step, so that resuming needs no state.

    Linear warm-up over `warmup_epochs`, then cosine or linear to zero, or constant; `multistep` with milestones, which count from the start
    of the training, warm-up included. Other names are timm's schedulers, updated once a step, and so is `multistep` without milestones.
    Raises UserError for an unknown name, and for milestones or a decay rate that the schedule would not use.
    """
    _check_decay(recipe)
    total, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
        "linear": lambda share: 1 - share,
        "constant": lambda share: 1.0,
    }
    if recipe.milestones is not None:
        decays = [round(epoch * steps_per_epoch) for epoch in recipe.milestones]
        rate = DECAY_RATE if recipe.decay_rate is None else recipe.decay_rate

        def decayed(step: int) -> float:
            return rate ** bisect_right(decays, step)
    elif recipe.schedule in shapes:
        shape = shapes[recipe.schedule]

        def decayed(step: int) -> float:
            return shape((step - warmup) / max(1, total - warmup))
    else:
        return _timm_schedule(recipe, total, warmup, optimizer, list(shapes))

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else decayed(step)

    return factor


def _check_decay(recipe: Recipe) -> None:
    """Raise UserError for keys of step-wise schedules that this recipe's schedule would not use."""
    if recipe.milestones is not None:
        if recipe.schedule != "multistep":
            raise UserError(f"recipe.milestones is for schedule multistep, not for {recipe.schedule}. Remove it, or change recipe.schedule")
        if late := [epoch for epoch in recipe.milestones if epoch >= recipe.epochs]:
            raise UserError(f"recipe.milestones: {late[0]:g} is not before the end of the training, recipe.epochs: {recipe.epochs}")
    if recipe.decay_rate is not None and recipe.schedule not in ("step", "multistep"):
        raise UserError(f"recipe.decay_rate is for the schedules step and multistep, not for {recipe.schedule}")


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
        decay_rate=DECAY_RATE if recipe.decay_rate is None else recipe.decay_rate,
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
