"""What an experiment would do and cost, without doing it: nothing is trained, downloaded or written.

Networks are built on torch's `meta` device, where a tensor has a shape and no memory, so that the largest one costs nothing to look at.
Methods are built and run for real, on random outputs of the shapes that the two networks have at their taps. What a run would rehearse
before its first step is rehearsed here too, where the networks are small, their weights files and the data here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kdbench.benchmark.checks import check_images, check_plan, random_axes, searched_recipes, slow_averages
from kdbench.benchmark.method_costs import activation_factor, cacheable, counted, optimizer_state
from kdbench.benchmark.outlines import META, Network, Opened, forward_cost, open_data, parameters_of
from kdbench.benchmark.pair import axes_of
from kdbench.benchmark.step_times import FORWARD_AND_BACKWARD, Clock
from kdbench.data.download import without_downloads
from kdbench.distributed.cluster import check_fits_here, device_here
from kdbench.errors import UserError
from kdbench.experiment import Experiment, Recipe, TeacherSpec, worker_bounds
from kdbench.methods.build import MethodSpec
from kdbench.models.build import ModelSpec, without_weights
from kdbench.models.weights import check_weights, inherited, taken_of
from kdbench.records.plan import controls_of
from kdbench.storage.folder import local_path
from kdbench.training.rehearsal import Rehearsal, check_sees_all
from kdbench.training.stages import epochs_by_stage


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
        opened = open_data(experiment, experiment.task, notes)
        of_teacher = experiment.task_of("teacher")
        own = opened if of_teacher == experiment.task else open_data(experiment, of_teacher, notes)
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
        clock = Clock(experiment, opened, own)
        teacher_flops, teacher_seconds = 0.0, 0.0 if clock.runs else None
        if teacher is not None and experiment.teacher is not None:
            fact = _teacher_fact(experiment.teacher, experiment.teacher_recipe())
            networks.insert(0, NetworkEstimate("teacher", teacher.spec.label, teacher.params, teacher.flops, fact))
            if experiment.teacher.weights is None:
                seen = experiment.teacher_recipe().epochs * own.teacher_images
                teacher_flops = float(FORWARD_AND_BACKWARD * teacher.flops * seen)
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


def _rehearse(experiment: Experiment, opened: Opened, own: Opened, students: Sequence[Network], teacher: Network | None) -> tuple[str, ...]:
    """Rehearse what can be; says of the rest why not. own: the teacher's task. Raises UserError for what can't work."""
    device = device_here(experiment.runtime)
    rehearsal = Rehearsal(experiment, opened.task, [experiment.recipe, *searched_recipes(experiment)], device)
    left = []

    def outlined(role: str, network: Network) -> bool:
        data = own if role == "teacher" else opened
        reason = f"data {data.task.data_name} is not here" if data.stands_in else network.lacks
        reason = reason or network.too_large
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


def _method(
    experiment: Experiment, spec: MethodSpec, student: Network, teacher: Network | None, opened: Opened, clock: Clock
) -> MethodEstimate:
    recipe, task = experiment.recipe, opened.task
    batch = recipe.batch_size
    built = counted(spec, opened, student, teacher)
    method, own, networks = built.method, built.own, 1 + built.method.peer_count
    extra = parameters_of(built.student, built.method) + method.peer_count * student.params - student.params
    forward, kept = student.forward_cost
    if parameters_of(built.student) > student.params:
        forward, kept = forward_cost(copy.deepcopy(built.student).to(META), task.example())
    forward, kept = networks * forward, networks * kept
    live = teacher is not None and method.needs_teacher and not cacheable(method, teacher, experiment, opened.student_images)
    flops = FORWARD_AND_BACKWARD * forward + (own.flops or 0.0) + (teacher.flops if live and teacher else 0)
    axes = axes_of(spec, experiment.search, recipe)
    share = batch / worker_bounds(experiment.runtime.workers)[0] / recipe.accumulate
    weights = 4.0 * (student.params + extra) * (2 + optimizer_state(recipe) + (recipe.ema is not None))
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
        memory=weights + share * (kept * activation_factor(recipe) + own.kept),
        step_seconds=clock.step(spec, student, teacher, live=live, own_flops=own.flops, networks=networks),
        validation_seconds=clock.validation(student),
        steps=recipe.epochs * (opened.student_images // batch),
        trainings=_trainings(experiment, spec.label, bool(axes)),
        stages=epochs_by_stage(method, recipe.epochs, spec.name),
    )


def _trainings(experiment: Experiment, label: str, searched: bool) -> int:
    """Searches, the winners' checks and finals of a method, as if no trial were stopped early and no row were decided early."""
    search, plan = experiment.search, experiment.plan
    controls = controls_of([(spec.label, spec.name) for spec in experiment.methods])
    finals = max(plan.most, plan.control_seeds) if label in controls else plan.most
    if search is None or not searched:
        return finals
    checks = search.top_k * search.confirm_seeds if search.top_k > 1 and search.trials > 1 else 0
    return plan.searches * (search.trials + checks) + finals + (finals // plan.searches if search.defaults else 0)
