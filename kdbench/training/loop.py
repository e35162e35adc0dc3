"""The only training loop. A laptop, a Tune trial and each worker of a cluster run this function; it imports no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from kdbench.data.batch import Batch
from kdbench.errors import Diverged
from kdbench.experiment import Unit
from kdbench.methods.base import Progress
from kdbench.models.outputs import Outputs
from kdbench.records.record import RunRecord
from kdbench.storage.layout import Layout
from kdbench.tasks.by_class import is_of_class
from kdbench.training.assembly import Training, assemble, share_buffers
from kdbench.training.distiller import TOTAL, Shown, Weights, check_same_terms
from kdbench.training.evaluate import check_numbers, predict, targets_of
from kdbench.training.outcome import finished_record
from kdbench.training.precision import autocast, placed_inputs
from kdbench.training.randomness import begin_step
from kdbench.training.session import Session
from kdbench.training.teacher import teacher_here


def fit(unit: Unit, session: Session, layout: Layout) -> RunRecord:
    """Train what `unit` describes, from its last checkpoint if there is one, and measure it.

    Weights and test predictions of final units are written below `layout`; the record is returned, not stored.
    Raises Diverged where a loss is no longer finite, UserError where the pair can't work.
    """
    torch.set_num_threads(session.threads)
    unit = found_here(unit, layout)
    run = assemble(unit, session)
    kept = session.resume()
    if kept is not None and kept["unit"] == unit.key:
        run.restore(kept)
        session.resumed(_standing(run))
    if run.worker_counts[-1:] != [session.world_size]:
        run.worker_counts.append(session.world_size)
    for epoch in range(run.epoch, unit.recipe.epochs):
        if epoch == run.stage.stop:
            run.begin_next_stage()
        train_epoch(run, epoch)
        metrics = close_epoch(run)
        last = epoch + 1 == unit.recipe.epochs
        session.report(metrics, run.state if _due(run) and not last else None)
    return finished_record(run, layout)


def found_here(unit: Unit, layout: Layout) -> Unit:
    """The unit with the places of its files as they are on this machine."""
    teacher = teacher_here(unit.teacher, layout) if unit.teacher is not None else None
    return unit.model_copy(update={"teacher": teacher})


def _standing(run: Training) -> str:
    """Where a restored training stands, for people."""
    inside = f", step {run.step + 1} of {run.loader.steps_per_epoch}" if run.step else ""
    before, now = run.worker_counts[-1:], run.session.world_size
    workers = f", with {now} worker{'s' if now > 1 else ''} instead of {before[0]}" if before and before[0] != now else ""
    return f"epoch {run.epoch + 1} of {run.unit.recipe.epochs}{inside}{workers}"


def train_epoch(run: Training, epoch: int) -> None:
    """The rest of one epoch, from `run.step` on. Loss values stay on the device until the epoch is over."""
    run.wrapped.train()
    start = time.monotonic()
    for batch in run.loader.batches(epoch, run.step):
        losses = train_step(run, batch)
        run.sums = losses if run.sums is None else run.sums + losses
        run.step += 1
        now = time.monotonic()
        run.passed(now - start)
        start = now
        if run.step < run.loader.steps_per_epoch and _due(run):
            _checkpoint(run)


def train_step(run: Training, batch: Batch) -> Tensor:
    """One optimizer step on one global batch (this worker's share of it); returns each loss term's mean, in the order of `run.terms`."""
    recipe = run.unit.recipe
    done = run.total_steps
    at = run.progress
    begin_step(run.unit.seed, done, run.session.rank, None if run.distiller.coupled else run.generator)
    factor = run.schedule(run.stage_steps)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
    pieces = list(_micro_batches(batch, recipe.accumulate))
    shown: list[Shown | None] = [None] * len(pieces)
    if run.distiller.method.makes_batches and _asks_others(run, pieces):
        pieces = [_placed(run, piece) for piece in pieces]
        shown = [run.distiller.show(piece, at, run.loader.shares) for piece in pieces]  # which says how much of it counts
    counted = [piece if one is None else one[0] for piece, one in zip(pieces, shown, strict=True)]
    losses = []
    for position, (piece, one, weights) in enumerate(zip(pieces, shown, _weights(run, pieces, counted), strict=True)):
        with run.session.without_exchange(run.wrapped) if position + 1 < len(pieces) else nullcontext():
            losses.append(_backward(run, piece, one, at, weights))
    if recipe.clip_grad is not None:
        for optimizer in run.stepped:
            run.scaler.unscale_(optimizer)
        stepped = {id(one) for optimizer in run.stepped for group in optimizer.param_groups for one in group["params"]}
        # Not of a part that the method steps itself: it may still hold the gradients of its own loss.
        torch.nn.utils.clip_grad_norm_([one for one in run.wrapped.parameters() if id(one) in stepped], recipe.clip_grad)
    for optimizer in run.stepped:
        run.scaler.step(optimizer)
    run.scaler.update()
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    if run.average is not None:
        run.average.update_parameters(run.distiller.student)
    return torch.stack(losses).sum(0)


def _micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    if count == 1:
        yield batch
        return
    for rows in torch.arange(len(batch)).chunk(count):
        yield batch.changed(itemgetter(slice(int(rows[0]), int(rows[-1]) + 1)))


def _placed(run: Training, batch: Batch) -> Batch:
    return replace(batch, inputs=placed_inputs(batch.inputs, run.unit.recipe.precision, run.unit.recipe.memory_format))


def _asks_others(run: Training, pieces: Sequence[Batch]) -> bool:
    """Whether what a micro-batch counts is known only together with the others and the other workers."""
    return not run.distiller.task.counts_samples and (run.session.world_size > 1 or len(pieces) > 1)


def _weights(run: Training, pieces: Sequence[Batch], shown: Sequence[Batch]) -> list[Weights]:
    """What each of this worker's micro-batches counts in the batch of all workers. All call together, at every step.

    shown: what the student sees in place of each.
    """
    task, workers = run.distiller.task, run.session.world_size
    whole = sum(run.loader.shares) if workers > 1 else sum(map(len, pieces))
    by_samples = [Weights(len(piece) * workers / whole) for piece in pieces]
    if not _asks_others(run, pieces) or shown[0].target is None:
        return by_samples
    counted = [task.weight(piece) for piece in shown]
    # Some of a task's counts may be known without the device, such as the number of samples.
    values = [list(one.values()) if isinstance(one, dict) else [one] for one in counted]
    device = run.session.device
    mine = torch.stack([torch.stack([value.to(device, torch.float64) for value in of_piece]) for of_piece in values])
    mine = mine if isinstance(counted[0], dict) else mine[:, 0]
    everyones = run.session.gather(mine.sum(0)[None]).sum(0)
    factors = mine.clamp(min=1) * workers / everyones.clamp(min=1)
    return [
        replace(weights, counted=dict(zip(one, factor, strict=True)) if isinstance(one, dict) else factor)
        for weights, one, factor in zip(by_samples, counted, factors, strict=True)
    ]


def _backward(run: Training, batch: Batch, shown: Shown | None, at: Progress, weights: Weights) -> Tensor:
    """Add the gradients of one micro-batch; returns its loss terms, weighted. shown: what the student sees in its place, where known."""
    batch = batch if shown is not None else _placed(run, batch)
    teacher: Outputs | None = run.teacher(batch) if run.teacher is not None else None
    casting = autocast(run.unit.recipe.precision, run.session.device)
    terms: dict[str, Tensor] = run.wrapped(batch, teacher, at, casting, run.loader.shares, weights, shown)
    run.scaler.scale(terms[TOTAL]).backward()
    if run.terms:
        check_same_terms(f"method {run.unit.method.name} on task {run.task.name}, step {at.step + 1}", terms, run.terms)
    else:
        run.terms = tuple(terms)
    return torch.stack([terms[name].detach() for name in run.terms])


def mean_losses(run: Training) -> dict[str, float]:
    """Each term's mean over the epoch and over all workers, who must agree on whether training goes on."""
    assert run.sums is not None, "an epoch has at least one step"
    everywhere = run.session.gather(run.sums.double()[None] / run.step).mean(0)
    return {f"train_{name}": value for name, value in zip(run.terms, everywhere.tolist(), strict=True)}


def close_epoch(run: Training) -> dict[str, float]:
    """Read the epoch's losses, validate, remember the best weights, and move on to the next epoch. Returns the epoch's row of the curve."""
    start = time.monotonic()
    unit, task = run.unit, run.task
    losses = mean_losses(run)
    where = f"in epoch {run.epoch + 1} of {unit.recipe.epochs} (lr {unit.recipe.lr:g})"
    if not math.isfinite(losses["train_total"]):
        raise Diverged(f"{unit.title}: the loss became {losses['train_total']} {where}")
    share_buffers(run.evaluated, run.session)  # what they measure together is the network that is saved
    prediction = predict(run.evaluated, run.splits.val, run.session, unit.recipe.precision, task, run.distiller.role)
    check_numbers(prediction, f"{unit.title}: of the validation predictions {where}")
    metrics = task.metrics(prediction, targets_of(run.splits.val))
    value = metrics[task.primary]
    if not math.isfinite(value):
        raise Diverged(f"{unit.title}: the validation {task.primary} became {value} {where}")
    if unit.recipe.weights == "best" and (value if task.higher_is_better else -value) > run.best_value:
        run.best_value = value if task.higher_is_better else -value
        run.best = {name: tensor.detach().cpu().clone() for name, tensor in run.evaluated.state_dict().items()}
    run.epoch, run.step, run.sums = run.epoch + 1, 0, None
    run.passed(time.monotonic() - start)
    row = {"epoch": float(run.epoch), "lr": run.optimizers[0].param_groups[0]["lr"], "seconds": run.seconds}
    row |= losses | {f"val_{name}": number for name, number in metrics.items() if not is_of_class(name)}
    run.curve.append(row)
    return row


def _checkpoint(run: Training) -> None:
    """Keep a checkpoint in the middle of an epoch. The losses so far are the mean of all workers', so that any number can add to them."""
    state, several = run.state, run.session.world_size > 1
    sums = run.session.gather(run.sums[None]).mean(0) if several and run.sums is not None else run.sums

    def with_sums() -> dict[str, Any]:
        kept = state()
        kept["progress"]["sums"] = sums
        return kept

    run.session.report({}, with_sums)


def _due(run: Training) -> bool:
    """Whether enough time has passed since the last checkpoint. All workers come to the same answer, at the same step."""
    done = run.total_steps
    if done < run.ask_at:
        return False
    passed, limit = run.seconds - run.kept_at, run.unit.checkpoint_seconds
    if run.session.world_size > 1:
        # They compare their clocks at a step that they know beforehand: at each step it would cost more than a small step itself.
        clock = torch.tensor([passed], dtype=torch.float64, device=run.session.device)
        passed = run.session.gather(clock).max().item()
        a_step = passed / max(1, done - run.kept_step)
        run.ask_at = done + max(1, int((limit - (0.0 if passed >= limit else passed)) / max(a_step, 1e-9)))
    if passed < limit:
        return False
    run.kept_at, run.kept_step = run.seconds, done
    return True
