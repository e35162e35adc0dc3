"""The only training loop. A laptop, a Tune trial and each worker of a cluster run this function; it imports no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kdbench.data.batch import Batch
from kdbench.data.loader import Loader
from kdbench.errors import Diverged, UserError
from kdbench.experiment import Recipe, Unit
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import build_method, fitted, method_class
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.taps import places, probe
from kdbench.models.weights import state_sha256
from kdbench.records.record import RunRecord
from kdbench.storage.layout import Layout
from kdbench.tasks.base import Splits, Task
from kdbench.tasks.build import build_task
from kdbench.training.cache.outputs import TeacherCache
from kdbench.training.distiller import TOTAL, Distiller, Weights, check_same_terms
from kdbench.training.evaluate import check_numbers, predict
from kdbench.training.optimization import Schedule, make_average, make_optimizers, make_schedule
from kdbench.training.outcome import finished_record
from kdbench.training.precision import autocast, compiled_call, images_for, place
from kdbench.training.randomness import begin_step, begin_streams, restore_streams, streams
from kdbench.training.session import Session
from kdbench.training.teacher import LiveTeacher, Teacher, load_teacher, open_teacher, teacher_here


@dataclass
class Training:
    """All that a training consists of while it runs; what `state` returns is all that is needed to go on."""

    unit: Unit
    session: Session
    task: Task
    splits: Splits
    distiller: Distiller
    wrapped: nn.Module  # the distiller, with gradient exchange where there are several workers
    teacher: Teacher | None
    optimizers: tuple[torch.optim.Optimizer, ...]  # the recipe's, then those of the method's parts
    schedule: Schedule
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    loader: Loader
    generator: torch.Generator
    epoch: int = 0
    step: int = 0  # inside the epoch
    sums: Tensor | None = None  # of each loss term since the epoch began, on the device, in the order of `terms`
    terms: tuple[str, ...] = ()
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_value: float = -math.inf
    seconds: float = 0.0  # spent on this training, by all processes that worked on it one after the other
    device_seconds: float = 0.0  # the same, times the workers there were
    worker_counts: list[int] = field(default_factory=list)  # how many workers took part, one number after the other
    kept_at: float = 0.0  # `seconds` when the last checkpoint was asked for
    kept_step: int = 0  # and `total_steps`
    ask_at: int = 0  # `total_steps` at which the workers compare their clocks next

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and kept: the moving average where there is one."""
        return self.average.module if self.average is not None else self.distiller.student

    @property
    def total_steps(self) -> int:
        """Optimizer steps since the training began."""
        return self.epoch * self.loader.steps_per_epoch + self.step

    def passed(self, seconds: float) -> None:
        self.seconds += seconds
        self.device_seconds += seconds * self.session.world_size

    def state(self) -> dict[str, Any]:
        """Tensors and plain values: the whole of a training at this moment, to be gone on with by any number of workers."""
        return {
            "unit": self.unit.key,
            "distiller": self.distiller.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            **streams(self.session.device, self.generator),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.distiller.load_state_dict(state["distiller"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        restore_streams(state, self.session.device, self.generator)
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self.kept_step = self.ask_at = self.total_steps


_PROGRESS = (
    "epoch",
    "step",
    "sums",
    "terms",
    "curve",
    "best",
    "best_value",
    "seconds",
    "device_seconds",
    "worker_counts",
    "kept_at",
)


def fit(unit: Unit, session: Session, layout: Layout) -> RunRecord:
    """Train what `unit` describes, from its last checkpoint if there is one, and measure it.

    Weights and test predictions of final units are written below `layout`; the record is returned, not stored.
    Raises Diverged where a loss is no longer finite, UserError where the pair can't work.
    """
    torch.set_num_threads(session.threads)
    unit = found_here(unit, layout)
    run = prepare(unit, session)
    kept = session.resume()
    if kept is not None and kept["unit"] == unit.key:
        run.restore(kept)
        session.resumed(_place(run))
    if run.worker_counts[-1:] != [session.world_size]:
        run.worker_counts.append(session.world_size)
    for epoch in range(run.epoch, unit.recipe.epochs):
        train_epoch(run, epoch)
        metrics = close_epoch(run)
        last = epoch + 1 == unit.recipe.epochs
        session.report(metrics, run.state if _due(run) and not last else None)
    return finished_record(run, layout)


def found_here(unit: Unit, layout: Layout) -> Unit:
    """The unit with the places of its files as they are on this machine."""
    teacher = teacher_here(unit.teacher, layout) if unit.teacher is not None else None
    return unit.model_copy(update={"teacher": teacher})


def _place(run: Training) -> str:
    """Where a restored training stands, for people."""
    inside = f", step {run.step + 1} of {run.loader.steps_per_epoch}" if run.step else ""
    before, now = run.worker_counts[-1:], run.session.world_size
    workers = f", with {now} worker{'s' if now > 1 else ''} instead of {before[0]}" if before and before[0] != now else ""
    return f"epoch {run.epoch + 1} of {run.unit.recipe.epochs}{inside}{workers}"


def prepare(unit: Unit, session: Session) -> Training:
    """Build everything a training needs, at its very beginning."""
    recipe = unit.recipe
    task = build_task(unit.task)
    splits = task.splits()
    check_content(unit, task, splits)
    generator = begin_streams(unit.seed)

    def fresh() -> nn.Module:
        model = task.build_model(unit.student)
        if unit.student_init is not None and state_sha256(model) != unit.student_init:
            weights = unit.student.weights
            raise UserError(f"the weights that {unit.student.label} begins with, {weights}, are others here than where the run began")
        return place(model, recipe.precision, recipe.memory_format, session.device)

    student = fresh()
    method = _fitting_method(unit, student, task, session, generator)
    peers = [fresh() for _ in range(method.peer_count)]
    check_uncut(unit.method.name, method, recipe)
    teacher = _teacher_of(unit, method, task, session)
    method.build(probe(student, task.info.image_shape, method.student_taps), _shapes_of(teacher, method, task), task.info)
    if method.needs_teacher_network:
        method.use_teacher(_network_of(teacher, unit, task, session), task.info.image_shape)
    samples = splits.train if unit.role == "teacher" else splits.transfer
    method.use_samples(samples)
    student = place(method.adapt_student(student), recipe.precision, recipe.memory_format, session.device)
    method = method.to(session.device, dtype=torch.float64 if recipe.precision == "fp64" else torch.float32)
    compiled = compiled_call(student, session.device) if recipe.compile is True else None
    distiller = Distiller(student, method, task, compiled, peers, unit.method.name)
    optimizers = make_optimizers(distiller, method.own_optimizers(), recipe)
    loader = Loader(
        samples,
        recipe.batch_size,
        augment=recipe.augment,
        views=None if unit.role == "teacher" else recipe.views,
        data_seed=unit.data_seed,
        order_seed=unit.seed,
        rank=session.rank,
        world_size=session.world_size,
        even=isinstance(unit.workers, int),
        device=session.device,
    )
    return Training(
        unit=unit,
        session=session,
        task=task,
        splits=splits,
        distiller=distiller,
        wrapped=session.prepare(distiller),
        teacher=teacher,
        optimizers=optimizers,
        schedule=make_schedule(recipe, loader.steps_per_epoch, optimizers[0]),
        scaler=torch.amp.GradScaler(session.device.type, enabled=recipe.precision == "fp16"),
        average=make_average(student, recipe),
        loader=loader,
        generator=generator,
    )


def check_uncut(name: str, method: Method, recipe: Recipe) -> None:
    """Raise UserError where micro-batches would keep the method called `name` from its whole batch."""
    if method.batch_coupled and recipe.accumulate > 1:
        raise UserError(f"method {name}: its loss compares the samples of a batch, which recipe.accumulate cuts up; use accumulate: 1")


def check_content(unit: Unit, task: Task, splits: Splits) -> None:
    """Raise UserError where this process has other data or other code than the one that described the unit: its key would lie."""
    version = method_class(unit.method).version
    if unit.task_version is not None and task.version != unit.task_version:
        raise UserError(f"task {task.name} has version {task.version} here and {unit.task_version} where the run began: update its code")
    if unit.task_version is not None and version != unit.method_version:
        raise UserError(
            f"method {unit.method.name} has version {version} here and {unit.method_version} where the run began: update its code"
        )
    if unit.data_hash is not None and splits.learned_hash != unit.data_hash:
        raise UserError(
            f"the training data of {task.data_name} have other content here than where the run began ({splits.learned_hash[:12]}..., "
            f"expected {unit.data_hash[:12]}...): give all machines the same files, and change none while a run is under way"
        )


def _fitting_method(unit: Unit, student: nn.Module, task: Task, session: Session, generator: torch.Generator) -> Method:
    """The method, its taps chosen: a benchmark's units name them; for one that does not, both networks are asked here."""
    method = build_method(unit.method, generator)
    if method.taps_chosen:
        return method
    image_shape = task.info.image_shape
    theirs = places(load_teacher(unit.teacher, task, session.device), image_shape) if unit.teacher is not None else None
    return fitted(unit.method, places(student, image_shape), theirs, generator)


def _network_of(teacher: Teacher | None, unit: Unit, task: Task, session: Session) -> nn.Module:
    """The frozen network that a live teacher runs anyway, or that is loaded beside cached outputs."""
    if isinstance(teacher, LiveTeacher):
        return teacher.model
    assert unit.teacher is not None, "a method that needs the network needs a teacher"
    return load_teacher(unit.teacher, task, session.device)


def _teacher_of(unit: Unit, method: Method, task: Task, session: Session) -> Teacher | None:
    if not method.needs_teacher:
        return None
    if unit.teacher is None:
        raise UserError(f"method {unit.method.name} learns from a teacher, and the experiment names none; add `teacher: {{model: ...}}`")
    return open_teacher(unit.teacher, task, method.teacher_taps, session.device, unit.recipe, unit.data_seed)


def _shapes_of(teacher: Teacher | None, method: Method, task: Task) -> Shapes | None:
    if teacher is None:
        return None
    if isinstance(teacher, TeacherCache):
        return teacher.shapes
    return probe(teacher.model, task.info.image_shape, method.teacher_taps)


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
            _keep(run)


def train_step(run: Training, batch: Batch) -> Tensor:
    """One optimizer step on one global batch (this worker's share of it); returns each loss term's mean, in the order of `run.terms`."""
    recipe = run.unit.recipe
    done = run.total_steps
    at = Progress(run.epoch + run.step / run.loader.steps_per_epoch, done, recipe.epochs * run.loader.steps_per_epoch)
    begin_step(run.unit.seed, done, run.session.rank, None if run.distiller.method.batch_coupled else run.generator)
    factor = run.schedule(done)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
    pieces = list(_micro_batches(batch, recipe.accumulate))
    losses = []
    for position, (piece, weights) in enumerate(zip(pieces, _weights(run, pieces), strict=True)):
        with run.session.without_exchange(run.wrapped) if position + 1 < len(pieces) else nullcontext():
            losses.append(_backward(run, piece, at, weights))
    if recipe.clip_grad is not None:
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(run.wrapped.parameters(), recipe.clip_grad)
    for optimizer in run.optimizers:
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
        where = slice(int(rows[0]), int(rows[-1]) + 1)
        yield replace(batch, inputs=batch.inputs[where], target=batch.target[where], index=batch.index[where])


def _weights(run: Training, pieces: Sequence[Batch]) -> list[Weights]:
    """What each of this worker's micro-batches counts in the batch of all workers. All call together, at every step."""
    task, workers = run.task, run.session.world_size
    whole = sum(run.loader.shares) if workers > 1 else sum(map(len, pieces))
    by_samples = [Weights(len(piece) * workers / whole) for piece in pieces]
    if type(task).weight is Task.weight or (workers == 1 and len(pieces) == 1):
        return by_samples  # known without asking the others
    counted = [task.weight(piece) for piece in pieces]
    values = [torch.stack(list(one.values())) if isinstance(one, dict) else one for one in counted]
    mine = torch.stack(values).to(run.session.device, torch.float64)
    everyones = run.session.gather(mine.sum(0)[None]).sum(0)
    factors = mine.clamp(min=1) * workers / everyones.clamp(min=1)
    return [
        replace(weights, counted=dict(zip(one, factor, strict=True)) if isinstance(one, dict) else factor)
        for weights, one, factor in zip(by_samples, counted, factors, strict=True)
    ]


def _backward(run: Training, batch: Batch, at: Progress, weights: Weights) -> Tensor:
    """Add the gradients of one micro-batch; returns its loss terms, weighted."""
    recipe = run.unit.recipe
    batch = replace(batch, inputs=images_for(batch.inputs, recipe.precision, recipe.memory_format))
    teacher: Outputs | None = run.teacher(batch) if run.teacher is not None else None
    terms: dict[str, Tensor] = run.wrapped(batch, teacher, at, autocast(recipe.precision, run.session.device), run.loader.shares, weights)
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


def share_buffers(run: Training) -> None:
    """Give every worker the first one's batch statistics: what they measure together is the network that is saved."""
    if run.session.world_size > 1:
        for buffer in run.evaluated.buffers():
            buffer.copy_(run.session.gather(buffer[None])[0])


def close_epoch(run: Training) -> dict[str, float]:
    """Read the epoch's losses, validate, remember the best weights, and move on to the next epoch. Returns the epoch's row of the curve."""
    start = time.monotonic()
    unit, task = run.unit, run.task
    losses = mean_losses(run)
    where = f"in epoch {run.epoch + 1} of {unit.recipe.epochs} (lr {unit.recipe.lr:g})"
    if not math.isfinite(losses["train_total"]):
        raise Diverged(f"{unit.title}: the loss became {losses['train_total']} {where}")
    share_buffers(run)
    prediction = predict(run.evaluated, run.splits.val, run.session, unit.recipe.precision)
    check_numbers(prediction, f"{unit.title}: of the validation predictions {where}")
    metrics = task.metrics(prediction, run.splits.val.target)
    value = metrics[task.primary]
    if not math.isfinite(value):
        raise Diverged(f"{unit.title}: the validation {task.primary} became {value} {where}")
    if unit.recipe.weights == "best" and (value if task.higher_is_better else -value) > run.best_value:
        run.best_value = value if task.higher_is_better else -value
        run.best = {name: tensor.detach().cpu().clone() for name, tensor in run.evaluated.state_dict().items()}
    run.epoch, run.step, run.sums = run.epoch + 1, 0, None
    run.passed(time.monotonic() - start)
    row = {"epoch": float(run.epoch), "lr": run.optimizers[0].param_groups[0]["lr"], "seconds": run.seconds}
    row |= losses | {f"val_{name}": number for name, number in metrics.items()}
    run.curve.append(row)
    return row


def _keep(run: Training) -> None:
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
