"""What an experiment would do and cost, without doing it: nothing is trained, downloaded or written.

Networks are built on torch's `meta` device, where a tensor has a shape and no memory, so that the largest one costs nothing to look at.
Methods are built and run for real, on random outputs of the shapes that the two networks have at their taps. What a run would rehearse
before its first step is rehearsed here too, where the networks are small, their weights files and the data here.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdbench.benchmark.pair import axes_of
from kdbench.benchmark.run import check_images, check_plan, needs_ray, random_axes, searched_recipes, slow_averages
from kdbench.data.batch import Batch, Part
from kdbench.data.download import without_downloads
from kdbench.data.facts import Facts, NotHere
from kdbench.data.loader import in_order
from kdbench.data.sources import NOISE
from kdbench.distributed.cluster import check_fits_here, device_here, nodes_of, slots_of
from kdbench.errors import UserError
from kdbench.experiment import Experiment, Recipe, TeacherSpec, worker_bounds
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, fitted
from kdbench.models.build import ModelSpec, without_weights
from kdbench.models.inputs import model_inputs
from kdbench.models.outputs import Outputs, Shapes, predicted
from kdbench.models.taps import Taps, probe, tap_shapes
from kdbench.models.trace import Example, generators_kept, samples
from kdbench.models.weights import check_weights, inherited, taken_of
from kdbench.storage.folder import local_path
from kdbench.tasks.base import Role, Task
from kdbench.tasks.build import TaskSpec, build_task, task_class
from kdbench.tasks.networks import as_teacher, outlined
from kdbench.tasks.splits import SplitOptions, validation_size
from kdbench.training.assembly import fit_method, make_distiller
from kdbench.training.cache.outputs import view_count
from kdbench.training.cost import counted_flops
from kdbench.training.optimization import handed_over, make_optimizer, make_optimizers
from kdbench.training.precision import DTYPES, any_loss, autocast, noise_like, placed_inputs, to_device, unmeasured
from kdbench.training.rehearsal import Rehearsal, check_sees_all
from kdbench.training.stages import epochs_by_stage

META = torch.device("meta")
TIMED_FLOPS = 100e6  # of student and teacher together, an image: up to there every method is timed, which takes under a second each
_TIMED_BATCH = 16  # images of networks of TIMED_FLOPS; smaller ones get more, up to a worker's share of a batch, larger ones fewer
_TIMED_STEPS = 2
_COUNTED_BATCH = 4  # more than one, as batch norms need it
_FORWARD_AND_BACKWARD = 3  # the gradients of inputs and of weights cost as much as the forward pass each
_REAL_PARAMETERS = 30_000_000  # a network up to this size is built for real: to be rehearsed, timed, and given to methods


@dataclass(frozen=True)
class NetworkEstimate:
    """flops: of one forward pass of one image, a multiply-add counted as two. fact: where weights come from."""

    role: str
    label: str
    params: int
    flops: float
    fact: str


@dataclass(frozen=True)
class MethodEstimate:
    """What one method needs on one student.

    taps: the student's places that it looks at. extra_params: trained beside the student. flops: of one optimizer step, over all workers;
    own_flops: the part of them that the method itself needs, None where it can't be counted. memory: bytes of one worker at the peak
    of a step. step_seconds: of one worker, measured here on a smaller batch; None where it was not measured. validation_seconds: of all
    of a training's epochs. trainings: searches, checks and finals. stages: epochs of each by name, where a training has several.
    """

    student: str
    label: str
    taps: tuple[str, ...]
    extra_params: int
    searched: tuple[str, ...]
    flops: float
    own_flops: float | None
    memory: float
    step_seconds: float | None
    validation_seconds: float
    steps: int
    trainings: int
    stages: Mapping[str, int]

    @property
    def total_flops(self) -> float:
        return self.flops * self.steps * self.trainings

    @property
    def total_seconds(self) -> float | None:
        """Of all its trainings one after the other, on this machine."""
        return None if self.step_seconds is None else (self.step_seconds * self.steps + self.validation_seconds) * self.trainings


@dataclass(frozen=True)
class DryRun:
    """What `kdbench run` would do. notes: what is missing for it, and where to get it.

    not_rehearsed: what was looked at in outline only, and why. slots: trainings at once. teacher_seconds: of training the teacher, 0 where
    its weights are given, None where it was not measured.
    """

    name: str
    data: str
    teacher_images: int
    student_images: int
    notes: tuple[str, ...]
    networks: tuple[NetworkEstimate, ...]
    methods: tuple[MethodEstimate, ...]
    teacher_flops: float  # of training the teacher, 0 where its weights are given
    reading: str = ""  # what was read of data in files, and what was left out
    teacher_seconds: float | None = 0.0
    not_rehearsed: tuple[str, ...] = ()
    slots: int = 1

    @property
    def seconds(self) -> float | None:
        """Of the whole run on this machine; None where a network was not measured."""
        trainings = [method.total_seconds for method in self.methods]
        known = [seconds for seconds in trainings if seconds is not None]
        if self.teacher_seconds is None or len(known) < len(trainings):
            return None
        return self.teacher_seconds + sum(known) / self.slots


def dry_run(experiment: Experiment) -> DryRun:
    """Build all that the experiment names, check all that can be checked without data, and estimate what it costs.

    Raises UserError for what can't work. What this machine alone lacks is a note where `runtime.address` names a cluster; so is, anywhere,
    a data set that a run would download.
    """
    with without_weights(), without_downloads():
        notes: list[str] = []
        opened = _open(experiment, experiment.task, notes)
        of_teacher = experiment.task_of("teacher")
        own = opened if of_teacher == experiment.task else _open(experiment, of_teacher, notes)
        check_plan(experiment, opened.task, own.task)
        notes += [f"warning: {caution}" for caution in slow_averages(experiment, own.teacher_images, opened.student_images)]
        notes += random_axes(experiment)
        both = list(dict.fromkeys((opened.task, own.task)))
        notes += [unseen for unseen in map(check_images, both) if unseen]
        reading = "; ".join(dict.fromkeys(task.source.reading for task in both if task.source is not None and task.source.reading))
        check_fits_here(experiment.runtime)
        students = [Network(opened.task, spec) for spec in experiment.students]
        teacher = Network(own.task, experiment.teacher.model, "teacher") if experiment.teacher else None
        taught = teacher.seen_by(opened.task) if teacher is not None else None
        for network in students:
            if network.spec.weights != "teacher":
                _check_file(network, network.spec.weights, "students: weights", experiment, notes)
        if teacher is not None and experiment.teacher is not None:
            if isinstance(teacher.spec.weights, Path):
                _check_file(teacher, teacher.spec.weights, "teacher.model.weights", experiment, notes)
            if isinstance(experiment.teacher.weights, Path):
                _check_file(teacher, experiment.teacher.weights, "teacher.weights", experiment, notes)
        not_rehearsed = _rehearse(experiment, opened, own, students, teacher)
        networks = [NetworkEstimate("student", n.spec.label, n.params, n.flops, _source(n.spec, n.outline, teacher)) for n in students]
        clock = _Clock(experiment, opened, own)
        teacher_flops, teacher_seconds = 0.0, 0.0 if clock.runs else None
        if teacher is not None and experiment.teacher is not None:
            fact = _teacher_fact(experiment.teacher, experiment.teacher_recipe())
            networks.insert(0, NetworkEstimate("teacher", teacher.spec.label, teacher.params, teacher.flops, fact))
            if experiment.teacher.weights is None:
                seen = experiment.teacher_recipe().epochs * own.teacher_images
                teacher_flops = float(_FORWARD_AND_BACKWARD * teacher.flops * seen)
                teacher_seconds = clock.teacher(teacher)
        methods = tuple(_method(experiment, spec, student, taught, opened, clock) for student in students for spec in experiment.methods)
        return DryRun(
            name=experiment.name,
            data=opened.task.data_name,
            teacher_images=own.teacher_images,
            student_images=opened.student_images,
            notes=tuple(notes),
            networks=tuple(networks),
            methods=methods,
            teacher_flops=teacher_flops,
            teacher_seconds=teacher_seconds,
            not_rehearsed=not_rehearsed,
            slots=clock.slots,
            reading=reading,
        )


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A task, on its data or on noise that stands in for them, and how many images the real ones have for training."""

    task: Task
    teacher_images: int  # that a teacher of this task learns from
    samples: Part  # what students learn from: labels and positions as they are, or as many of them
    validation_images: int
    stands_in: bool = False

    @property
    def student_images(self) -> int:
        return len(self.samples)


def _open(experiment: Experiment, spec: TaskSpec, notes: list[str]) -> _Opened:
    try:
        task = build_task(spec)
        splits = task.splits()
        return _Opened(task, len(splits.learned_by("teacher")), splits.transfer, len(splits.val))
    except NotHere as missing:
        if experiment.runtime.address is None and not missing.downloadable:
            raise
        notes.append(str(missing))
        return _stand_in(spec, missing.facts)


def _stand_in(spec: TaskSpec, facts: Facts) -> _Opened:
    given = spec.model_dump(mode="json")
    options = task_class(spec).Options.model_validate({key: value for key, value in given.items() if key != "name"})
    images = students = facts.train
    validation = 0
    changes: dict[str, Any] = {"data": facts.stand_in()}
    if isinstance(options, SplitOptions):
        validation = validation_size(options, facts.train, facts.name)
        images -= validation
        students = options.transfer_size or images
        if students > images and options.transfer != NOISE:
            raise UserError(f"transfer_size {students} is more than the {images} images of data {facts.name!r} that are left for training")
        changes |= {"val_size": 1, "transfer_size": None, "labelled": None if options.labelled is None else 1}
        if options.teacher_classes is not None or options.teacher_share != 1:
            changes |= {"teacher_classes": None, "teacher_share": 0.9}  # the names of classes are not known, but that there is such a part
            shown = facts.classes if options.teacher_classes is None else len(options.teacher_classes)
            images = round(images * shown / facts.classes * options.teacher_share)
    task = build_task(TaskSpec.model_validate(given | changes))
    task.data_name = facts.name
    transfer = task.splits().transfer
    rows = torch.arange(students)
    blank = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(students, -1, -1, -1)
    target = None if transfer.target is None else transfer.labels[rows % len(transfer)] if transfer.without_label else rows % facts.classes
    return _Opened(task, images, Part(blank, target, rows), validation, True)


def _check_file(network: Network, path: Path | None, where: str, experiment: Experiment, notes: list[str]) -> None:
    """Raise UserError where a file of weights does not fit, or is not here; note that where the run is a cluster's."""
    if path is None:
        return
    file = local_path(path, where)
    if file.is_file():
        check_weights(network.outline, file, name=network.spec.name, num_classes=network.task.info.num_classes)
        return
    network.lacks = f"there is no file {path}"
    if experiment.runtime.address is None:
        raise UserError(f"{where}: {network.lacks}")
    notes.append(f"{where}: {network.lacks}")


def _teacher_fact(spec: TeacherSpec, recipe: Recipe) -> str:
    if spec.weights is None:
        return f"trained here for {recipe.epochs} epochs, {_source(spec.model)}"
    if spec.weights == "pretrained":
        return "timm's weights, fetched when they are needed"
    return f"weights from {spec.weights}"


def _source(spec: ModelSpec, student: nn.Module | None = None, teacher: Network | None = None) -> str:
    """Where a network's first weights come from. Raises UserError where a student begins with its teacher's, and none of them agrees."""
    if spec.weights == "teacher" and student is not None and teacher is not None:
        taken = inherited(student, teacher.outline.state_dict(), name=spec.label, of=teacher.spec.label)
        return f"begins with {taken_of(taken, student)} from the teacher"
    if spec.weights is not None:
        return f"begins with {spec.weights}"
    return "begins with timm's weights" if spec.pretrained else "begins with random weights"


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A network as far as it has to be looked at: its shapes and costs without memory, the network itself where that is needed."""

    task: Task
    spec: ModelSpec
    role: Role = "student"
    lacks: str = ""  # what is missing for a rehearsal
    of: Network | None = None  # the network of another task that this one is for `task`

    def seen_by(self, task: Task) -> Network:
        """The network as batches of `task` go into it. Raises UserError where `task` has no use for a network of this one's task."""
        return self if task is self.task else Network(task, self.spec, self.role, self.lacks, self)

    @cached_property
    def outline(self) -> nn.Module:
        """The network without memory for its weights; the real one where its code needs numbers to build or run."""
        if self.of is not None:
            return as_teacher(self.of.outline, self.of.task, self.task)
        return outlined(self.task, self.spec, lambda: self.real)

    @cached_property
    def real(self) -> nn.Module:
        if self.of is not None:
            return as_teacher(self.of.real, self.of.task, self.task)
        return self.task.build_model(self.spec)

    @property
    def params(self) -> int:
        return _parameters(self.outline)

    @property
    def flops(self) -> float:
        return self.forward_cost[0]

    @property
    def small(self) -> bool:
        return self.params <= _REAL_PARAMETERS

    @cached_property
    def tap_shapes(self) -> Shapes:
        return tap_shapes(self.outline, self.task.example(self.role))

    @cached_property
    def forward_cost(self) -> tuple[float, float]:
        """FLOPs of a forward pass of one image, and bytes of what training keeps of it."""
        return forward_cost(self.outline, self.task.example(self.role))


def _rehearse(
    experiment: Experiment, opened: _Opened, own: _Opened, students: Sequence[Network], teacher: Network | None
) -> tuple[str, ...]:
    """Rehearse what can be; says of the rest why not. own: the teacher's task. Raises UserError for what can't work."""
    device = device_here(experiment.runtime)
    rehearsal = Rehearsal(experiment, opened.task, [experiment.recipe, *searched_recipes(experiment)], device)
    left = []

    def outlined(role: str, network: Network) -> bool:
        data = own if role == "teacher" else opened
        reason = f"data {data.task.data_name} is not here" if data.stands_in else network.lacks
        if not network.small:
            reason = reason or f"more than {_REAL_PARAMETERS:,} parameters"
        if reason:
            left.append(f"{role} {network.spec.label!r} ({reason})")
            check_sees_all(f"{role} {network.spec.label!r}", network.outline, data.task.example(network.role))
        return bool(reason)

    if teacher is not None and experiment.teacher is not None and not outlined("teacher", teacher) and experiment.teacher.weights is None:
        Rehearsal(experiment, own.task, [], device).teacher(teacher.real, teacher.tap_shapes)
    taught = teacher.seen_by(opened.task) if teacher is not None else None
    for student in students:
        if not outlined("student", student):
            theirs, network = (taught.tap_shapes, taught.real if taught.small else None) if taught is not None else (None, None)
            without = rehearsal.student(student.spec, student.real, student.tap_shapes, theirs, network)
            left += [f"method {label!r} with student {student.spec.label!r} (it needs the teacher's network)" for label in without]
    return tuple(left)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def forward_cost(model: nn.Module, example: Example) -> tuple[float, float]:
    """FLOPs of a training-mode forward pass, and bytes that are kept for its backward pass, both a sample."""
    model = copy.deepcopy(model).train()
    inputs = samples(example, _COUNTED_BATCH, device=_device(model))
    with counted_flops() as counter, _saved_for_backward() as kept:
        model(model_inputs(model, inputs))
    return counter.get_total_flops() / _COUNTED_BATCH, sum(kept.values()) / _COUNTED_BATCH


@contextmanager
def _saved_for_backward() -> Iterator[dict[int, int]]:
    """Storages that autograd keeps for the backward pass, and their bytes. Weights, which are there anyway, are left out."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's number is given to another one

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


# --- methods ---------------------------------------------------------------------------------------------------------


def _method(
    experiment: Experiment, spec: MethodSpec, student: Network, teacher: Network | None, opened: _Opened, clock: _Clock
) -> MethodEstimate:
    recipe, task = experiment.recipe, opened.task
    batch = recipe.batch_size
    built = _counted(spec, opened, student, teacher)
    method, own, networks = built.method, built.own, 1 + built.method.peer_count
    extra = _parameters(built.student, built.method) + method.peer_count * student.params - student.params
    forward, kept = student.forward_cost
    if _parameters(built.student) > student.params:
        forward, kept = forward_cost(copy.deepcopy(built.student).to(META), task.example())
    forward, kept = networks * forward, networks * kept
    live = teacher is not None and method.needs_teacher and not _cacheable(method, teacher, experiment, opened.student_images)
    flops = _FORWARD_AND_BACKWARD * forward + (own.flops or 0.0) + (teacher.flops if live and teacher else 0)
    axes = axes_of(spec, experiment.search, recipe)
    share = batch / worker_bounds(experiment.runtime.workers)[0] / recipe.accumulate
    weights = 4.0 * (student.params + extra) * (2 + _optimizer_state(recipe) + (recipe.ema is not None))
    if live and teacher is not None:
        weights += 4.0 * teacher.params
    return MethodEstimate(
        student=student.spec.label,
        label=spec.label,
        taps=method.student_taps,
        extra_params=extra,
        searched=tuple(axis.name for axis in axes),
        flops=flops * batch,
        own_flops=None if own.flops is None else own.flops * batch,
        memory=weights + share * (kept * _activation_factor(recipe) + own.kept),
        step_seconds=clock.step(spec, student, teacher, live=live, own_flops=own.flops, networks=networks),
        validation_seconds=clock.validation(student),
        steps=recipe.epochs * (opened.student_images // batch),
        trainings=_trainings(experiment, bool(axes)),
        stages=epochs_by_stage(method, recipe.epochs, spec.name),
    )


@dataclass(frozen=True)
class _Own:
    """What a method's own terms need, forwards and backwards, an image: FLOPs, None where they can't be counted, and kept bytes."""

    flops: float | None
    kept: float


@dataclass(frozen=True)
class _Built:
    """A method built for a pair, the student as it is trained, and the method's own cost."""

    method: Method
    student: nn.Module
    own: _Own


def _counted(spec: MethodSpec, opened: _Opened, student: Network, teacher: Network | None) -> _Built:
    """The method, built and run in outline; for real where it asks for numbers, on networks that are real up to a size."""
    try:
        with META:
            method, trained = _assembled(spec, opened, student, student.outline, teacher, teacher.outline if teacher else None)
            return _Built(method, trained, _own_cost(method, trained, student, teacher, opened))
    except (UserError, RuntimeError, NotImplementedError):  # what is really wrong shows below
        pass
    base = student.real if student.small else student.outline
    network = None if teacher is None else teacher.real if teacher.small else teacher.outline
    method, trained = _assembled(spec, opened, student, base, teacher, network)
    try:
        return _Built(method, trained, _own_cost(method, trained, student, teacher, opened))
    except (RuntimeError, NotImplementedError):
        if student.small and (teacher is None or teacher.small):
            raise
        return _Built(method, trained, _Own(None, 0.0))


def _assembled(
    spec: MethodSpec, opened: _Opened, student: Network, base: nn.Module, teacher: Network | None, network: nn.Module | None
) -> tuple[Method, nn.Module]:
    """The method, built for the pair, and the student as it is trained. base, network: the two networks' modules to use."""
    theirs = teacher.tap_shapes if teacher is not None else None
    outlined = torch.get_default_device() == META  # where random numbers have no values, and no generator
    method = fitted(spec, student.tap_shapes, theirs, None if outlined else torch.Generator().manual_seed(0))
    if type(method).adapt_student is not Method.adapt_student:
        base = copy.deepcopy(base)
    frozen = network.eval().requires_grad_(False) if method.needs_teacher_network and network is not None else None
    return method, fit_method(method, base, student.tap_shapes, theirs, opened.task, opened.samples, frozen)


def _parameters(*modules: nn.Module) -> int:
    """Parameters of all of them together, one that several share counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _own_cost(method: Method, trained: nn.Module, student: Network, teacher: Network | None, opened: _Opened) -> _Own:
    """The method's loss and its gradients on random outputs of the two networks, where torch makes tensors at the moment.

    Not known of a method that makes batches of its own: what it makes follows from real networks.
    """
    if method.makes_batches:
        return _Own(None, 0.0)
    example, home = opened.task.example(), torch.get_default_device()
    same = all(name in student.tap_shapes.taps for name in method.student_taps)
    shapes = student.tap_shapes if same else probe(copy.deepcopy(trained), example, method.student_taps)
    ours, *peers = (_random_outputs(shapes, method.student_taps, trained=True) for _ in range(1 + method.peer_count))
    ours.peers = tuple(peers)
    theirs = (
        _random_outputs(teacher.tap_shapes, method.teacher_taps, trained=False) if teacher is not None and method.needs_teacher else None
    )
    batch = _random_batch(opened, _COUNTED_BATCH).to(home)
    with counted_flops() as counter, _saved_for_backward() as kept:
        terms = method.train()(ours, theirs, batch, Progress(epoch=1.0, step=1, total_steps=2))
        total = sum((term.sum() for term in terms.values()), torch.zeros(()))
        if total.requires_grad:
            total.backward()
    return _Own(counter.get_total_flops() / _COUNTED_BATCH, sum(kept.values()) / _COUNTED_BATCH)


def _random_outputs(shapes: Shapes, taps: tuple[str, ...], trained: bool) -> Outputs:
    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(_COUNTED_BATCH, *shape, requires_grad=trained)

    return shapes.made(draw, taps)


def _random_batch(opened: _Opened, size: int) -> Batch:
    """Noise with the labels of the first samples; the first samples themselves where they are more than an image."""
    example = opened.task.example()
    with torch.device("cpu"):  # where samples have values
        few = opened.samples.select(torch.arange(min(size, opened.student_images, len(opened.samples))))
        real = next(in_order(few, size))
    return real if not isinstance(example, tuple) else replace(real, inputs=torch.rand(len(few), *example))


def _cacheable(method: Method, teacher: Network, experiment: Experiment, images: int) -> bool:
    """Whether what the method reads of the teacher fits the cache, so that the teacher need not run at every step."""
    views = view_count(experiment.recipe)
    if views is None:
        return False
    shapes = [*teacher.tap_shapes.predictions, *(teacher.tap_shapes.taps[name].shape for name in method.teacher_taps)]
    numbers = sum(map(math.prod, shapes))
    width = 4 if experiment.cache.precision == "fp32" else 2
    return width * numbers * images * views <= 1e9 * experiment.cache.budget_gb


def _optimizer_state(recipe: Recipe) -> float:
    """Numbers that the optimizer keeps for each weight: one for momentum, two for Adam and its kin."""
    weights = nn.Parameter(torch.zeros(64, 64))
    weights.grad = torch.ones_like(weights)
    optimizer = make_optimizer([weights], recipe)
    optimizer.step()
    return sum(value.numel() for value in optimizer.state[weights].values() if isinstance(value, Tensor)) / weights.numel()


def _activation_factor(recipe: Recipe) -> float:
    """Bytes of an activation by those of float32. `auto` is counted as float32, since it may turn out so."""
    dtype: Mapping[str, torch.dtype] = DTYPES
    return torch.finfo(dtype.get(recipe.precision, torch.float32)).bits / 32


def _trainings(experiment: Experiment, searched: bool) -> int:
    """Searches, the winners' checks and finals, as if no trial were stopped early."""
    search = experiment.search
    if search is None or not searched:
        return experiment.seeds
    checks = search.top_k * search.confirm_seeds if search.top_k > 1 and search.trials > 1 else 0
    return search.trials + checks + experiment.seeds


# --- time ------------------------------------------------------------------------------------------------------------


class _Clock:
    """Measures steps as one worker of a training would take them here: on its device, with its threads, on its share of a batch.

    Nothing is measured where a cluster does the work, and no network that is too large to be built here.
    """

    def __init__(self, experiment: Experiment, opened: _Opened, own: _Opened) -> None:
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
        own = trained * own_flops / (_FORWARD_AND_BACKWARD * student.flops)
        return share * (networks * trained + own + (self._image(teacher, trained=False) if live and teacher is not None else 0.0))

    def teacher(self, teacher: Network) -> float | None:
        """Seconds of the teacher's training."""
        if not self.runs or not teacher.small:
            return None
        recipe, image = self.experiment.teacher_recipe(), self._image(teacher, trained=True) / self.workers
        steps = recipe.epochs * (self.own.teacher_images // recipe.batch_size)
        return steps * recipe.batch_size * image + recipe.epochs * self.own.validation_images * image / _FORWARD_AND_BACKWARD

    def validation(self, student: Network) -> float:
        """Seconds in which all of a training's epochs are validated; 0 where nothing is measured."""
        if not self.runs or not student.small:
            return 0.0
        images = self.experiment.recipe.epochs * self.opened.validation_images
        return images * self._image(student, trained=True) / _FORWARD_AND_BACKWARD / self.workers

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
    experiment: Experiment, spec: MethodSpec, student: Network, teacher: Network | None, opened: _Opened, device: torch.device
) -> float:
    """Seconds an image: the shortest of a few whole steps on noise."""
    recipe, task = experiment.recipe, opened.task
    recipe = unmeasured(recipe)
    precision = recipe.precision
    network = to_device(copy.deepcopy(teacher.real), precision, recipe.memory_format, device) if teacher is not None else None
    base = to_device(copy.deepcopy(student.real), precision, recipe.memory_format, device)
    method, trained = _assembled(spec, opened, student, base, teacher, network)
    peers = [copy.deepcopy(base) for _ in range(method.peer_count)]
    distiller = make_distiller(trained, method, task, recipe, device, peers, spec.name).train()
    optimizers = make_optimizers(distiller, method.own_optimizers(), recipe)
    stepped = handed_over(optimizers, method)
    flops = student.flops + (teacher.flops if teacher is not None else 0)
    batch = _random_batch(opened, _timed_images(recipe, flops)).to(device)
    batch = replace(batch, inputs=placed_inputs(batch.inputs, precision, recipe.memory_format))
    theirs = _teacher_outputs(network, method, task, batch, precision)
    live = teacher is not None and method.needs_teacher and not _cacheable(method, teacher, experiment, opened.student_images)
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
