"""How long the steps of an experiment take on this machine: the shortest of a few, on noise."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from kdbench.benchmark.emptying import needs_ray
from kdbench.benchmark.method_costs import assembled, cacheable, random_batch
from kdbench.benchmark.outlines import Network, Opened
from kdbench.data.batch import Batch
from kdbench.distributed.cluster import device_here, nodes_of, slots_of
from kdbench.experiment import Experiment, Recipe, worker_bounds
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec
from kdbench.models.outputs import Outputs, predicted
from kdbench.models.taps import Taps
from kdbench.models.trace import generators_kept
from kdbench.tasks.base import Task
from kdbench.training.assembly import make_distiller
from kdbench.training.optimization import handed_over, make_optimizers
from kdbench.training.precision import any_loss, autocast, noise_like, placed_inputs, to_device, unmeasured

TIMED_FLOPS = 100e6  # of student and teacher together, an image: up to there every method is timed, which takes under a second each
_TIMED_BATCH = 16  # images of networks of TIMED_FLOPS; smaller ones get more, up to a worker's share of a batch, larger ones fewer
_TIMED_STEPS = 2
FORWARD_AND_BACKWARD = 3  # the gradients of inputs and of weights cost as much as the forward pass each


class Clock:
    """Measures steps as one worker of a training would take them here: on its device, with its threads, on its share of a batch.

    Nothing is measured where a cluster does the work, and no network that is too large to be built here.
    """

    def __init__(self, experiment: Experiment, opened: Opened, own: Opened) -> None:
        """opened: the students' task; own: the teacher's."""
        self.experiment, self.opened, self.own = experiment, opened, own
        runtime = experiment.runtime
        self.runs = runtime.address is None
        on_ray = needs_ray(runtime, experiment.search is not None)
        self.threads = runtime.cpus_per_worker if on_ray else torch.get_num_threads()
        self.slots = slots_of(runtime, nodes_of(runtime)).concurrent if on_ray and self.runs else 1
        self.workers = worker_bounds(runtime.workers)[1]
        self._measured: dict[tuple[str, bool], float] = {}  # seconds an image, by network and whether it is trained

    def step(
        self, spec: MethodSpec, student: Network, teacher: Network | None, *, live: bool, own_flops: float | None, networks: int
    ) -> float | None:
        """Seconds of an optimizer step with a method. own_flops: of the method's terms, an image; networks: that are trained."""
        if not self.runs or not student.small or (teacher is not None and not teacher.small):
            return None
        share = self.experiment.recipe.batch_size / self.workers
        if student.flops + (teacher.flops if teacher is not None else 0) <= TIMED_FLOPS:
            with self._as_a_worker():
                return share * _step_seconds(self.experiment, spec, student, teacher, self.opened, device_here(self.experiment.runtime))
        if own_flops is None:
            return None
        trained = self._image(student, trained=True)
        own = trained * own_flops / (FORWARD_AND_BACKWARD * student.flops)
        return share * (networks * trained + own + (self._image(teacher, trained=False) if live and teacher is not None else 0.0))

    def teacher(self, teacher: Network) -> float | None:
        """Seconds of the teacher's training."""
        if not self.runs or not teacher.small:
            return None
        recipe, image = self.experiment.teacher_recipe(), self._image(teacher, trained=True) / self.workers
        steps = recipe.epochs * (self.own.teacher_images // recipe.batch_size)
        return steps * recipe.batch_size * image + recipe.epochs * self.own.validation_images * image / FORWARD_AND_BACKWARD

    def validation(self, student: Network) -> float:
        """Seconds in which all of a training's epochs are validated; 0 where nothing is measured."""
        if not self.runs or not student.small:
            return 0.0
        images = self.experiment.recipe.epochs * self.opened.validation_images
        return images * self._image(student, trained=True) / FORWARD_AND_BACKWARD / self.workers

    def _image(self, network: Network, trained: bool) -> float:
        """Seconds an image of a training step or of a forward pass: the shortest of a few, on noise."""
        key = f"{network.task.data_name} {network.spec.model_dump_json()}", trained
        if key not in self._measured:
            with self._as_a_worker():
                self._measured[key] = _image_seconds(network, self.experiment.recipe, trained, device_here(self.experiment.runtime))
        return self._measured[key]

    @contextmanager
    def _as_a_worker(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with generators_kept(device_here(self.experiment.runtime)):
                yield
        finally:
            torch.set_num_threads(before)


def _timed_images(recipe: Recipe, flops: float) -> int:
    return min(recipe.batch_size, max(2, int(_TIMED_BATCH * TIMED_FLOPS / flops)))


def _image_seconds(network: Network, recipe: Recipe, trained: bool, device: torch.device) -> float:
    """Seconds an image; a small batch is taken as long, for its size, as a large one."""
    recipe = unmeasured(recipe)
    precision, memory_format = recipe.precision, recipe.memory_format
    model = to_device(copy.deepcopy(network.real), precision, memory_format, device).train(trained)
    count = _timed_images(recipe, network.flops)
    inputs = placed_inputs(noise_like(network.task.example(network.role), count, device), precision, memory_format)
    times = []
    with torch.set_grad_enabled(trained):
        for _ in range(1 + _TIMED_STEPS):
            start = time.perf_counter()
            with autocast(precision, device):
                prediction = predicted(model, inputs)
            if trained:
                any_loss(prediction).backward()
            times.append(_since(start, device))
    return min(times[1:]) / count


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _step_seconds(
    experiment: Experiment, spec: MethodSpec, student: Network, teacher: Network | None, opened: Opened, device: torch.device
) -> float:
    """Seconds an image: the shortest of a few whole steps on noise."""
    recipe, task = experiment.recipe, opened.task
    recipe = unmeasured(recipe)
    precision = recipe.precision
    network = to_device(copy.deepcopy(teacher.real), precision, recipe.memory_format, device) if teacher is not None else None
    base = to_device(copy.deepcopy(student.real), precision, recipe.memory_format, device)
    method, trained = assembled(spec, opened, student, base, teacher, network)
    peers = [copy.deepcopy(base) for _ in range(method.peer_count)]
    distiller = make_distiller(trained, method, task, recipe, device, peers, spec.name).train()
    optimizers = make_optimizers(distiller, method.own_optimizers(), recipe)
    stepped = handed_over(optimizers, method)
    flops = student.flops + (teacher.flops if teacher is not None else 0)
    batch = random_batch(opened, _timed_images(recipe, flops)).to(device)
    batch = replace(batch, inputs=placed_inputs(batch.inputs, precision, recipe.memory_format))
    theirs = _teacher_outputs(network, method, task, batch, precision)
    live = teacher is not None and method.needs_teacher and not cacheable(method, teacher, experiment, opened.student_images)
    times = []
    for step in range(1 + _TIMED_STEPS):
        start = time.perf_counter()
        if live:
            theirs = _teacher_outputs(network, method, task, batch, precision)
        terms = distiller(batch, theirs, Progress(1.0, 1 + step, 10), autocast(precision, device))
        terms["total"].backward()
        for optimizer in stepped:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        times.append(_since(start, device))
    return min(times[1:]) / len(batch)


@torch.no_grad()
def _teacher_outputs(network: nn.Module | None, method: Method, task: Task, batch: Batch, precision: str) -> Outputs | None:
    if network is None or not method.needs_teacher:
        return None
    with autocast(precision, batch.index.device):
        return Taps(network.eval(), method.teacher_taps)(task.inputs_for("teacher", batch.inputs))
