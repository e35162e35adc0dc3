"""The whole path of an experiment: teacher, its cached outputs, the students' searches and finals.

Every step is keyed by its content, and what the results folder already holds is not done again:
the same command after any interruption goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdbench.benchmark.cache import cache_spec, fill_cache, on_ray
from kdbench.benchmark.checks import check_plan, random_axes, slow_averages
from kdbench.benchmark.emptying import empty, needs_ray
from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.networks import Networks, memo_of
from kdbench.benchmark.pair import Pair, PairWork
from kdbench.benchmark.teacher import existing_weights, initial_content, ready_teacher
from kdbench.benchmark.watch import Phase, Watch
from kdbench.distributed.cluster import check_fits_here, device_here
from kdbench.errors import UserError
from kdbench.experiment import Experiment, TeacherRef, Unit
from kdbench.methods.build import MethodSpec
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Shapes
from kdbench.models.weights import inherited, taken_of, tensors_sha256
from kdbench.records.record import RunRecord
from kdbench.records.seals import seal
from kdbench.storage.layout import Layout
from kdbench.storage.lease import Lease, leased
from kdbench.storage.locks import Held, locked
from kdbench.storage.scratch import clear_scratch
from kdbench.storage.working_copy import forget_folder, holder, origin, store_at
from kdbench.tasks.base import Task
from kdbench.tasks.build import build_task
from kdbench.tasks.networks import as_teacher
from kdbench.tracking import NoTracker, Tracker
from kdbench.training.assembly import assemble
from kdbench.training.cache.outputs import view_count
from kdbench.training.earlier_keys import Asked, EarlierData, has_dropout
from kdbench.training.precision import settled
from kdbench.training.profiling import StepProfile, profile_steps
from kdbench.training.session import LocalSession
from kdbench.training.teacher import tensors_for

_PROFILED_STEPS = 30


@dataclass(frozen=True)
class Summary:
    """What a run did: trainings done now, trainings found finished, what could not be finished and why, and the tuned parameters."""

    trained: int
    found: int
    failures: tuple[str, ...]
    tuned: Mapping[str, Mapping[str, Mapping[str, Any]]]  # student -> method's label -> parameters
    protocols: tuple[str, ...]  # one a student: the hashes of the boards that this experiment fills


def run(experiment: Experiment, results: Path, watch: Watch, tracker: Tracker | None = None, search_only: bool = False) -> Summary:
    """Do all of the experiment that the results folder lacks.

    Raises UserError for what can't work, before anything is trained wherever it can be known by then; RunFailed where the teacher diverges,
    a worker dies for good or the disk is full. Finished work stays on record either way.
    """
    if search_only and experiment.search is None:
        raise UserError(f"{experiment.name}: there is nothing to tune: the experiment has no `search:`")
    ledger = Ledger(experiment, results, watch, tracker or NoTracker())
    built = check(experiment, ledger)
    with exclusive(ledger.layout, experiment.name, watch) as ledger.lease, ledger.held:
        clear_scratch(ledger.layout, experiment.name)
        ledger.mend(experiment.name)
        return _run(experiment, ledger, built, search_only)


def build_cache(experiment: Experiment, results: Path, watch: Watch) -> None:
    """Fill the cache for all methods of an experiment whose teacher is there already; train nothing.

    Raises UserError where there is no teacher yet, or nothing that can be cached.
    """
    if experiment.teacher is None:
        raise UserError(f"{experiment.name}: there is nothing to cache: the experiment has no `teacher:`")
    if view_count(experiment.recipe) is None:
        raise UserError("recipe.views: null shows a new view every epoch, so nothing can be cached; set a number of views")
    ledger = Ledger(experiment, results, watch, NoTracker())
    built = check(experiment, ledger)
    with ledger.held:
        pairs = _pairs(experiment, ledger, built, may_train=False)
        with _cached_outputs([(pair, experiment.methods) for pair in pairs], experiment, ledger):
            pass


def check(experiment: Experiment, ledger: Ledger) -> Networks:
    """Everything that can be known to be wrong before the first step; the networks, built. Raises UserError."""
    check_fits_here(experiment.runtime)
    task, own = build_task(experiment.task), build_task(experiment.task_of("teacher"))
    check_plan(experiment, task, own)
    teacher = experiment.teacher
    with torch.random.fork_rng(devices=[]):
        students = [task.build_model(student) for student in experiment.students]
        network = None
        if teacher is not None:
            read = {"weights": existing_weights(teacher.weights)} if isinstance(teacher.weights, Path) else {}
            network = own.build_model(teacher.model.model_copy(update=read))
            if own is not task:
                as_teacher(network, own, task)  # which refuses what has no use
            for spec, model in zip(experiment.students, students, strict=True):
                if spec.weights == "teacher":
                    inherited(model, network.state_dict(), name=spec.label, of=teacher.model.label)
    built = Networks(experiment, task, own, students, network)
    if not ledger.layout.lock(experiment.name).exists():  # what ran here before is not looked at again where nothing is left to do
        built.check_images(ledger.watch)
    ledger.store.check_writable()  # last: it makes the folder, of which nothing should be left where the experiment is wrong
    return built


@contextmanager
def exclusive(layout: Layout, name: str, watch: Watch) -> Iterator[Lease | None]:
    """Hold an experiment's lock, on this machine and, for results at an address, with a lease on all.

    Raises UserError where another process does.
    """
    lease = None
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(layout.lock(name)))
            address = origin(layout.root)
            if address is not None:
                lease = stack.enter_context(leased(store_at(address), name, holder(layout.root), watch.note))
        except Held as held:
            raise UserError(f"{name} is already running in this results folder ({held.holder})") from None
        yield lease


def profile(experiment: Experiment, results: Path, watch: Watch) -> dict[str, StepProfile]:
    """Where the time of a step goes, for every method on every student: label -> profile. Trains no student and puts nothing on record.

    The teacher is made ready as `run` does, since its outputs are a part of a step. The traces are in the results folder.
    """
    ledger = Ledger(experiment, results, watch, NoTracker())
    built = check(experiment, ledger)
    profiles = {}
    with exclusive(ledger.layout, experiment.name, watch), ledger.held:
        pairs = _pairs(experiment, ledger, built, may_train=True)
        built.rehearse()
        with _cached_outputs([(pair, experiment.methods) for pair in pairs], experiment, ledger):
            for pair, spec in product(pairs, experiment.methods):
                session = LocalSession(device=device_here(experiment.runtime), threads=experiment.runtime.cpus_per_worker)
                torch.set_num_threads(session.threads)
                training = assemble(pair.sample(spec), session)
                name = spec.label if len(experiment.students) == 1 else f"{spec.label} · {pair.student.label}"
                profiles[name] = profile_steps(training, _PROFILED_STEPS, ledger.layout.profile(experiment.name, name))
                watch.progress("profile", len(profiles), len(experiment.methods) * len(experiment.students))
    ledger.close()
    return profiles


def _run(experiment: Experiment, ledger: Ledger, built: Networks, search_only: bool) -> Summary:
    pairs = _pairs(experiment, ledger, built, may_train=True)
    queue = InTurn([PairWork(pair, ledger, search_only) for pair in pairs], ledger.watch)
    try:
        if not queue.done:
            built.check_images(ledger.watch)
            for work in queue.queues:
                work.near_duplicates = built.near_duplicates
            built.rehearse()
            with _cached_outputs([(work.pair, work.unfinished) for work in queue.queues], experiment, ledger):
                empty(queue, experiment, ledger)
        for work in queue.queues:
            if work.saved is not None:
                ledger.watch.note(work.saved)
        ledger.catch_up()
        ledger.tell_of_other_code()
    finally:
        ledger.close()
        for work in queue.queues:
            work.close()
    seal(ledger.store, "tune" if search_only else "run")
    if queue.done and not ledger.failures:
        forget_folder(ledger.layout.checkpoints(experiment.name))
    tuned = {work.pair.student.label: {c.title: c.tuned for c in work.contenders if c.beside is None} for work in queue.queues}
    protocols = tuple(dict.fromkeys(pair.board_hash for pair in pairs))
    return Summary(ledger.trained, ledger.found, tuple(ledger.failures), tuned, protocols)


def _pairs(experiment: Experiment, ledger: Ledger, built: Networks, may_train: bool) -> list[Pair]:
    """The experiment's teacher, trained now if need be, with each of its students."""
    task, own, students, network = built.task, built.own, built.students, built.network
    asked = Asked(experiment, task.version, EarlierData(task.splits()))
    asked_teacher = asked if own is task else Asked(experiment, own.version, EarlierData(own.splits()))
    for reading in dict.fromkeys(each.source.reading for each in (task, own) if each.source is not None and each.source.reading):
        ledger.watch.note(reading)
    for line in random_axes(experiment):
        ledger.watch.note(line)
    for caution in slow_averages(experiment, len(own.splits().learned_by("teacher")), len(task.splits().transfer)):
        ledger.watch.note(f"warning: {caution}")
    taught = ready_teacher(asked_teacher, ledger, built, network, may_train) if network is not None else None
    teacher, predictions = taught or (None, None)
    shapes = [(ours, built.theirs) for ours in built.ours]
    return [
        _pair(asked, ledger, spec, model, teacher, predictions, of_both, task, built)
        for spec, model, of_both in zip(experiment.students, students, shapes, strict=True)
    ]


def _pair(
    asked: Asked,
    ledger: Ledger,
    student: ModelSpec,
    model: nn.Module,
    teacher: TeacherRef | None,
    teacher_predictions: str | None,
    shapes: tuple[Shapes, Shapes | None],
    task: Task,
    built: Networks,
) -> Pair:
    experiment, splits = asked.experiment, asked.data.splits
    memo = memo_of(ledger, experiment.task, experiment, student, experiment.recipe)
    with built.explaining():
        recipe = settled(experiment.recipe, model, task.example(), len(splits.transfer), device_here(experiment.runtime), memo)
    caching = teacher is not None and view_count(recipe) is not None
    if teacher is not None and caching:
        spec = cache_spec(asked, teacher, recipe, ledger.layout)
        teacher = teacher.model_copy(update={"cache": ledger.layout.cache(spec.key)})
    if student.weights == "teacher" and teacher is not None:
        taken = tensors_for(model, student.label, teacher, task)
        ledger.watch.note(f"student {student.label} begins with {taken_of(taken, model)} from {teacher.model.label}")
        begun: str | None = tensors_sha256(taken)
    else:
        begun = initial_content(student, model)
    return Pair(asked, student, teacher, teacher_predictions, task, recipe, begun, has_dropout(model), *shapes)


@contextmanager
def _cached_outputs(wanted: Iterable[tuple[Pair, Sequence[MethodSpec]]], experiment: Experiment, ledger: Ledger) -> Iterator[None]:
    """While this is open these methods find the outputs of their pair's teacher in the cache."""
    with ExitStack() as stack:
        elsewhere = partial(on_ray, ledger.held, experiment.runtime, needs_ray(experiment.runtime, experiment.search is not None))
        for pair, methods in wanted:
            taps = pair.teacher_taps(methods)
            if taps and pair.teacher is not None and pair.teacher.cache is not None:
                spec = cache_spec(pair.asked, pair.teacher, pair.recipe, ledger.layout)
                stack.enter_context(fill_cache(spec, taps, ledger.layout, ledger.watch, device_here(experiment.runtime), elsewhere))
        yield


class InTurn:
    """Several pairs' queues as one: the first that has something to start goes first."""

    def __init__(self, queues: Sequence[PairWork], watch: Watch) -> None:
        self.queues = queues
        self._watch = watch
        self._owner: dict[str, PairWork] = {}
        self._show()

    @property
    def done(self) -> bool:
        return all(queue.done for queue in self.queues)

    def next(self) -> Unit | None:
        for queue in self.queues:
            unit = queue.next()
            if unit is not None:
                self._owner[unit.key] = queue
                return unit
        return None

    def report(self, unit: Unit, metrics: Mapping[str, float]) -> bool:
        return self._owner[unit.key].report(unit, metrics)

    def resumed(self, unit: Unit, place: str) -> None:
        self._owner[unit.key].resumed(unit, place)

    def finish(self, unit: Unit, record: RunRecord) -> None:
        self._owner[unit.key].finish(unit, record)
        self._show()

    def crash(self, unit: Unit, reason: str, died: bool = False) -> None:
        self._owner[unit.key].crash(unit, reason, died)
        self._show()

    def _show(self) -> None:
        phases: tuple[Phase, ...] = ("search", "check", "final")
        for phase in phases:
            counts = [queue.counts()[phase] for queue in self.queues]
            self._watch.progress(phase, sum(done for done, _ in counts), sum(total for _, total in counts))
