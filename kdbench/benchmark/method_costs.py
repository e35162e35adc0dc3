"""What a method needs on a pair: its taps, its parameters, FLOPs and bytes, from outlines of the networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdbench.benchmark.outlines import COUNTED_BATCH, META, Network, Opened, saved_for_backward
from kdbench.data.batch import Batch
from kdbench.data.loader import in_order
from kdbench.errors import UserError
from kdbench.experiment import Experiment, Recipe
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, fitted
from kdbench.models.outputs import Outputs, Shapes
from kdbench.models.taps import probe
from kdbench.training.assembly import fit_method
from kdbench.training.cache.outputs import view_count
from kdbench.training.cost import counted_flops
from kdbench.training.optimization import make_optimizer
from kdbench.training.precision import DTYPES


@dataclass(frozen=True)
class OwnCost:
    """What a method's own terms need, forwards and backwards, an image: FLOPs, None where they can't be counted, and kept bytes."""

    flops: float | None
    kept: float


@dataclass(frozen=True)
class BuiltMethod:
    """A method built for a pair, the student as it is trained, and the method's own cost."""

    method: Method
    student: nn.Module
    own: OwnCost


def counted(spec: MethodSpec, opened: Opened, student: Network, teacher: Network | None) -> BuiltMethod:
    """The method, built and run in outline; for real where it asks for numbers, on networks that are real up to a size."""
    try:
        with META:
            method, trained = assembled(spec, opened, student, student.outline, teacher, teacher.outline if teacher else None)
            return BuiltMethod(method, trained, _own_cost(method, trained, student, teacher, opened))
    except (UserError, RuntimeError, NotImplementedError):  # what is really wrong shows below
        pass
    base = student.real if student.small else student.outline
    network = None if teacher is None else teacher.real if teacher.small else teacher.outline
    method, trained = assembled(spec, opened, student, base, teacher, network)
    try:
        return BuiltMethod(method, trained, _own_cost(method, trained, student, teacher, opened))
    except (RuntimeError, NotImplementedError):
        if student.small and (teacher is None or teacher.small):
            raise
        return BuiltMethod(method, trained, OwnCost(None, 0.0))


def assembled(
    spec: MethodSpec, opened: Opened, student: Network, base: nn.Module, teacher: Network | None, network: nn.Module | None
) -> tuple[Method, nn.Module]:
    """The method, built for the pair, and the student as it is trained. base, network: the two networks' modules to use."""
    theirs = teacher.tap_shapes if teacher is not None else None
    outlined = torch.get_default_device() == META  # where random numbers have no values, and no generator
    generator = None if outlined else torch.Generator().manual_seed(0)
    method = fitted(spec, student.tap_shapes, theirs, generator, gives=opened.task.gives)
    if type(method).adapt_student is not Method.adapt_student:
        base = copy.deepcopy(base)
    frozen = network.eval().requires_grad_(False) if method.needs_teacher_network and network is not None else None
    return method, fit_method(method, base, student.tap_shapes, theirs, opened.task, opened.samples, frozen)


def _own_cost(method: Method, trained: nn.Module, student: Network, teacher: Network | None, opened: Opened) -> OwnCost:
    """The method's loss and its gradients on random outputs of the two networks, where torch makes tensors at the moment.

    Not known of a method that makes batches of its own: what it makes follows from real networks.
    """
    if method.makes_batches:
        return OwnCost(None, 0.0)
    example, home = opened.task.example(), torch.get_default_device()
    same = all(name in student.tap_shapes.taps for name in method.student_taps)
    shapes = student.tap_shapes if same else probe(copy.deepcopy(trained), example, method.student_taps)
    ours, *peers = (_random_outputs(shapes, method.student_taps, trained=True) for _ in range(1 + method.peer_count))
    ours.peers = tuple(peers)
    theirs = (
        _random_outputs(teacher.tap_shapes, method.teacher_taps, trained=False) if teacher is not None and method.needs_teacher else None
    )
    batch = random_batch(opened, COUNTED_BATCH).to(home)
    with counted_flops() as counter, saved_for_backward() as kept:
        terms = method.train()(ours, theirs, batch, Progress(epoch=1.0, step=1, total_steps=2))
        total = sum((term.sum() for term in terms.values()), torch.zeros(()))
        if total.requires_grad:
            total.backward()
    return OwnCost(counter.get_total_flops() / COUNTED_BATCH, sum(kept.values()) / COUNTED_BATCH)


def _random_outputs(shapes: Shapes, taps: tuple[str, ...], trained: bool) -> Outputs:
    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(COUNTED_BATCH, *shape, requires_grad=trained)

    return shapes.made(draw, taps)


def random_batch(opened: Opened, size: int) -> Batch:
    """Noise with the labels of the first samples; the first samples themselves where they are more than an image."""
    example = opened.task.example()
    with torch.device("cpu"):  # where samples have values
        few = opened.samples.select(torch.arange(min(size, opened.student_images, len(opened.samples))))
        real = next(in_order(few, size))
    return real if not isinstance(example, tuple) else replace(real, inputs=torch.rand(len(few), *example))


def cacheable(method: Method, teacher: Network, experiment: Experiment, images: int) -> bool:
    """Whether what the method reads of the teacher fits the cache, so that the teacher need not run at every step."""
    views = view_count(experiment.recipe)
    if views is None:
        return False
    shapes = [*teacher.tap_shapes.predictions, *(teacher.tap_shapes.taps[name].shape for name in method.teacher_taps)]
    numbers = sum(map(math.prod, shapes))
    width = 4 if experiment.cache.precision == "fp32" else 2
    return width * numbers * images * views <= 1e9 * experiment.cache.budget_gb


def optimizer_state(recipe: Recipe) -> float:
    """Numbers that the optimizer keeps for each weight: one for momentum, two for Adam and its kin."""
    weights = nn.Parameter(torch.zeros(64, 64))
    weights.grad = torch.ones_like(weights)
    optimizer = make_optimizer([weights], recipe)
    optimizer.step()
    return sum(value.numel() for value in optimizer.state[weights].values() if isinstance(value, Tensor)) / weights.numel()


def activation_factor(recipe: Recipe) -> float:
    """Bytes of an activation by those of float32. `auto` is counted as float32, since it may turn out so."""
    dtype: Mapping[str, torch.dtype] = DTYPES
    return torch.finfo(dtype.get(recipe.precision, torch.float32)).bits / 32
