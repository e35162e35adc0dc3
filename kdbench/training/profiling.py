"""Where the time of a training step goes: data, teacher, student, method, backward pass, optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kdbench.data.batch import Batch
from kdbench.models.outputs import Outputs
from kdbench.training.assembly import Training
from kdbench.training.loop import train_step

PARTS = ("data", "teacher", "student forward", "method", "backward", "optimizer", "other")
_WARM_UP = 3  # steps that are not counted: the first ones allocate memory and choose kernels
_TRACED = 5  # steps in the trace: a file that a viewer still opens


@dataclass(frozen=True)
class StepProfile:
    """Mean milliseconds of each of PARTS in a step, and the number of steps that they are a mean of."""

    milliseconds: dict[str, float]
    steps: int

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


def profile_steps(run: Training, steps: int, trace: Path) -> StepProfile:
    """Train `steps` steps with a clock at the borders of their parts, then a few more under torch's profiler, whose trace is written.

    `student forward` holds its peers' and the task's own loss, `backward` the gradients of student and method together. On a GPU every
    border waits for the device, so that a part's time is its own; a step is then longer than in training. The trace is Chrome's format,
    for chrome://tracing or Perfetto.
    """
    run.wrapped.train()
    batches = _endless(run)
    for _ in range(_WARM_UP):
        train_step(run, next(batches))
    clock = _Clock(run)
    with clock.attached():
        for _ in range(steps):
            clock.step(batches)
    devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.session.device.type == "cuda" else [])]
    with profile(activities=devices) as profiler:
        for _ in range(_TRACED):
            train_step(run, next(batches))
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return StepProfile({part: 1e3 * seconds / steps for part, seconds in clock.seconds.items()}, steps)


def _endless(run: Training) -> Iterator[Batch]:
    """The training's epochs over and over: the teacher's cache has no views of later ones."""
    while True:
        for epoch in range(run.unit.recipe.epochs):
            yield from run.loader.batches(epoch)


class _Clock:
    """Charges the time between two borders to the part that ends there. The loop itself knows nothing of it: hooks are the borders."""

    def __init__(self, run: Training) -> None:
        self.run = run
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0

    def charge(self, part: str) -> None:
        if self.run.session.device.type == "cuda":
            torch.cuda.synchronize(self.run.session.device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now

    def step(self, batches: Iterator[Batch]) -> None:
        self._last = time.perf_counter()
        batch = next(batches)
        self.charge("data")
        train_step(self.run, batch)
        self.charge("other")

    def attached(self) -> ExitStack:
        """Set the borders; they are gone when the stack closes."""
        run, borders = self.run, ExitStack()
        border = self._border
        method = run.distiller.method
        borders.callback(setattr, run, "teacher", run.teacher)
        if run.teacher is not None:
            run.teacher = _TimedTeacher(run.teacher, self)  # type: ignore[assignment]
        borders.enter_context(run.wrapped.register_forward_pre_hook(border("other")))
        borders.enter_context(method.register_forward_pre_hook(border("student forward")))
        borders.enter_context(method.register_forward_hook(border("method")))
        borders.enter_context(run.wrapped.register_forward_hook(border("method")))
        for handle in (
            run.optimizers[0].register_step_pre_hook(border("backward")),
            run.optimizers[-1].register_step_post_hook(border("optimizer")),
        ):
            borders.callback(handle.remove)
        return borders

    def _border(self, part: str) -> Callable[..., None]:
        def charge(*_: Any) -> None:
            self.charge(part)

        return charge


class _TimedTeacher:
    """A teacher whose time is charged to it."""

    def __init__(self, teacher: Callable[[Batch], Outputs], clock: _Clock) -> None:
        self._teacher, self._clock = teacher, clock

    def __call__(self, batch: Batch) -> Outputs:
        self._clock.charge("data")
        outputs = self._teacher(batch)
        self._clock.charge("teacher")
        return outputs
