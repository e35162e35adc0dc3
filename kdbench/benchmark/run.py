"""The whole path of an experiment: teacher, its cached outputs, the students' searches and finals.

Every step is keyed by its content, and what the results folder already holds is not done again:
the same command after any interruption goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdbench.benchmark.cache import cache_spec, fill_cache, on_ray
from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.pair import Pair, PairWork, axes_of
from kdbench.benchmark.recall import Recall, weights_of
from kdbench.benchmark.watch import Phase, Watch
from kdbench.boards.cautions import chance_caution, ema_caution
from kdbench.data.decoding import DECODED_FIRST, check_decodable, not_shown
from kdbench.data.loader import check_views
from kdbench.data.views import Augment
from kdbench.distributed.cluster import check_fits_here, device_here, nodes_of, slots_of
from kdbench.errors import KDBenchError, RunFailed, UserError
from kdbench.experiment import Experiment, Recipe, Runtime, TeacherRef, TeacherSpec, Unit, content_hash, validated, worker_bounds
from kdbench.methods.build import MethodSpec, method_class, params_of
from kdbench.models.build import ModelSpec, check_model_name
from kdbench.models.outputs import Shapes
from kdbench.models.taps import tap_shapes
from kdbench.models.weight_files import check_declared
from kdbench.models.weights import inherited, state_sha256, taken_of, tensors_sha256
from kdbench.records.record import RunRecord
from kdbench.records.seals import seal
from kdbench.search.space import Choice
from kdbench.search.study import FIRST_AT_RANDOM, drawn_at_random
from kdbench.storage.folder import local_path
from kdbench.storage.layout import Layout
from kdbench.storage.lease import Lease, leased
from kdbench.storage.locks import Held, locked
from kdbench.storage.scratch import clear_scratch
from kdbench.storage.working_copy import fetch, forget_folder, holder, origin, store_at
from kdbench.tasks.base import Task
from kdbench.tasks.build import TaskSpec, build_task, task_facts
from kdbench.tasks.networks import as_teacher, outputs_facts
from kdbench.tracking import NoTracker, Tracker
from kdbench.training.assembly import assemble
from kdbench.training.cache.outputs import view_count
from kdbench.training.checkpoint import file_sha256, save_weights, write_atomically
from kdbench.training.earlier_keys import Asked, EarlierData, draws_noise, has_dropout
from kdbench.training.evaluate import targets_of
from kdbench.training.keys import given_teacher_key, teacher_protocol
from kdbench.training.optimization import check_optimization
from kdbench.training.outcome import measured_teacher
from kdbench.training.precision import Memo, question, settled
from kdbench.training.profiling import StepProfile, profile_steps
from kdbench.training.rehearsal import Rehearsal
from kdbench.training.session import LocalSession
from kdbench.training.teacher import tensors_for
from kdbench.training.work import Work, run_here

_PROFILED_STEPS = 30
_OPTIONS_TOGETHER = 6  # of a searched key that are tried with those of another key before a run


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


def check(experiment: Experiment, ledger: Ledger) -> _Built:
    """Everything that can be known to be wrong before the first step; the networks, built. Raises UserError."""
    check_fits_here(experiment.runtime)
    task, own = build_task(experiment.task), build_task(experiment.task_of("teacher"))
    check_plan(experiment, task, own)
    teacher = experiment.teacher
    with torch.random.fork_rng(devices=[]):
        students = [task.build_model(student) for student in experiment.students]
        network = None
        if teacher is not None:
            read = {"weights": _existing(teacher.weights)} if isinstance(teacher.weights, Path) else {}
            network = own.build_model(teacher.model.model_copy(update=read))
            if own is not task:
                as_teacher(network, own, task)  # which refuses what has no use
            for spec, model in zip(experiment.students, students, strict=True):
                if spec.weights == "teacher":
                    inherited(model, network.state_dict(), name=spec.label, of=teacher.model.label)
    built = _Built(experiment, task, own, students, network)
    if not ledger.layout.lock(experiment.name).exists():  # what ran here before is not looked at again where nothing is left to do
        built.check_images(ledger.watch)
    ledger.store.check_writable()  # last: it makes the folder, of which nothing should be left where the experiment is wrong
    return built


def check_plan(experiment: Experiment, task: Task, own: Task) -> None:
    """What can be known to be wrong on any machine. own: the teacher's task, `task` itself or another. Raises UserError."""
    check_choices(experiment, type(task))
    _check_taught(experiment, task, own)
    _check_labels(experiment, task)
    for recipe in (experiment.recipe, *_searched(experiment)):
        check_views(task.splits().transfer, recipe.augment)
    check_views(own.splits().learned_by("teacher"), experiment.teacher_recipe().augment)
    for part in (part for each in (task, own) for part in (each.splits().val, each.splits().test)):  # which are never augmented
        check_views(part, Augment())


def _check_taught(experiment: Experiment, task: Task, own: Task) -> None:
    """Raise UserError where the task says what its teacher learns from, and it has none that learns that."""
    says = "teacher_share and teacher_classes say what the teacher learns from"
    for each in dict.fromkeys((task, own)):
        if each.splits().teacher is None:
            continue
        key = "task" if each is task else "teacher.task"
        if experiment.teacher is None:
            raise UserError(f"{key}: {says}, and {experiment.name} has no teacher; leave them out")
        if experiment.teacher.weights is not None:
            raise UserError(f"{key}: {says}, and teacher.weights are given, so the teacher learns nothing; leave one of the two out")
        if each is not own:
            raise UserError(f"{key}: {says}, and the teacher has a task of its own; write them in teacher.task")


def _check_labels(experiment: Experiment, task: Task) -> None:
    """Raise UserError for a method that reads labels that the samples which students learn from don't have."""
    transfer = task.splits().transfer
    missing = transfer.without_label
    for method in experiment.methods if missing else ():
        kind = method_class(method)
        imitates = task.imitation_needs_labels and "imitation" in kind.reads & task.gives
        if kind.needs_labels or imitates:
            which = "none of them has any" if missing == len(transfer) else f"{missing} of them have none"
            raise UserError(
                f"method {method.label} reads the labels of the {len(transfer)} samples that students learn from, and {which}; leave the "
                "method out, or set task.transfer to labelled samples"
            )


@lru_cache(maxsize=2)  # of students and of a teacher with another task
def check_images(task: Task) -> str:
    """Look at the images once a process: at those that only evaluation needs, and at a sample of a large training set.

    A broken training image beyond the sample is found in the first epoch, which needs all of them.

    Returns:
        The line of `not_shown` on all parts.

    Raises:
        UserError: an image can't be decoded.
    """
    splits = task.splits()
    return not_shown(
        {
            "training": check_decodable(splits.train, "training", sample=len(splits.train) > DECODED_FIRST),
            "validation": check_decodable(splits.val, "validation"),
            "test": check_decodable(splits.test, "test"),
            **({"transfer": check_decodable(splits.apart, "transfer", sample=True)} if splits.apart is not None else {}),
        }
    )


def check_choices(experiment: Experiment, task: type[Task]) -> None:
    """What can be known to be wrong without any data: models, methods, their parameters and recipes. Raises UserError."""
    for model in [*experiment.students, *([experiment.teacher.model] if experiment.teacher else [])]:
        check_model_name(model.name)
    for method in experiment.methods:
        kind = method_class(method)
        params_of(method)
        axes_of(method, experiment.search, experiment.recipe)
        if not kind.supports(task.gives):
            given = ", ".join(sorted(task.gives)) or "nothing that methods know"
            raise UserError(f"method {method.name} reads {' or '.join(sorted(kind.reads))}; networks of task {task.name} give {given}")
        if (kind.needs_teacher or kind.needs_teacher_network) and experiment.teacher is None:
            raise UserError(f"method {method.name} learns from a teacher, and {experiment.name} names none; add `teacher: {{model: ...}}`")
    fewest, most = worker_bounds(experiment.runtime.workers)
    for recipe in (experiment.recipe, experiment.teacher_recipe(), *_searched(experiment)):
        check_optimization(recipe)
        if recipe.warmup_epochs >= recipe.epochs:
            raise UserError(
                f"recipe.warmup_epochs: {recipe.warmup_epochs:g} is as long as the training of {recipe.epochs} epochs, which would never "
                "reach its learning rate; lower warmup_epochs or raise epochs"
            )
        _check_shares(recipe, fewest, most)


def slow_averages(experiment: Experiment, teacher_images: int, student_images: int) -> list[str]:
    """A warning for each moving average, searched ones too, that would be mostly the weights of a training's first step."""
    students = [experiment.recipe, *searched_recipes(experiment), *searched_recipes(experiment, together=2)]
    trained = [("students", recipe, student_images) for recipe in students]
    if experiment.teacher is not None and experiment.teacher.weights is None:
        trained.append(("the teacher", experiment.teacher_recipe(), teacher_images))
    fewest: dict[tuple[str, float | None], int] = {}  # steps of the shortest training with this average
    for whose, recipe, images in trained:
        steps = recipe.epochs * max(1, images // recipe.batch_size)
        fewest[whose, recipe.ema] = min(steps, fewest.get((whose, recipe.ema), steps))
    found = [ema_caution(decay, steps, whose) for (whose, decay), steps in fewest.items()]
    return [caution for caution in found if caution]


def random_axes(experiment: Experiment) -> list[str]:
    """A line for each way in which the sampler of a search falls back to random numbers: see `search.study.drawn_at_random`."""
    search = experiment.search
    if search is None:
        return []
    spaces = {method.label: axes_of(method, search, experiment.recipe) for method in experiment.methods}
    drawn = {label: drawn_at_random(search.sampler, axes, search.trials) for label, axes in spaces.items()}
    if not any(drawn.values()):
        return []
    needed = FIRST_AT_RANDOM[search.sampler]
    if search.trials <= needed:
        return [
            f"search.sampler: {search.sampler} draws its first {needed} trials at random, and search.trials is {search.trials}, "
            "so this search is a random one"
        ]
    named = "; ".join(f"{label}: {', '.join(names)}" for label, names in drawn.items() if names)
    return [f"search.sampler: {search.sampler} can't learn where to search these parameters, which are drawn at random: {named}"]


def _check_shares(recipe: Recipe, fewest: int, most: int) -> None:
    """Raise UserError where a batch can't be cut among the workers. Where their number may change, the parts need not be equal."""
    if fewest == most and recipe.batch_size % most:
        raise UserError(
            f"recipe.batch_size: {recipe.batch_size} can't be cut into {most} equal parts, one a worker; make it a multiple of {most}"
        )
    if recipe.batch_size < most:
        raise UserError(f"recipe.batch_size: {recipe.batch_size} images are too few for {most} workers, runtime.workers.max")
    if fewest < most and recipe.accumulate > 1:
        raise UserError("recipe.accumulate needs a fixed number of workers, and runtime.workers is a range; use accumulate: 1")


def _searched(experiment: Experiment) -> Iterator[Recipe]:
    yield from searched_recipes(experiment)
    yield from searched_recipes(experiment, together=2)


def searched_recipes(experiment: Experiment, together: int = 1) -> Iterator[Recipe]:
    """The recipe at every option and at both ends of every range that a search may try.

    Args:
        experiment: what is searched.
        together: how many keys differ from the recipe's own at the same time. What one key allows may depend on another.

    Raises:
        UserError: one of them is no recipe.
    """
    also = experiment.search.also if experiment.search else {}
    ends: dict[str, Sequence[Any]] = {key: d.options if isinstance(d, Choice) else (d.low, d.high) for key, d in also.items()}
    if together > 1:  # of many options the extreme ones
        ends = {key: _extremes(options) for key, options in ends.items()}
    for keys in combinations(ends, together):
        for values in product(*(ends[key] for key in keys)):
            changed = {key.removeprefix("recipe."): value for key, value in zip(keys, values, strict=True)}
            yield validated(Recipe, {**experiment.recipe.model_dump(), **changed}, f"search.also.{keys[0]}")


def _extremes(options: Sequence[Any]) -> Sequence[Any]:
    """The least and the greatest of numbers; of other options the first few."""
    if all(isinstance(option, int | float) for option in options):
        return sorted({min(options), max(options)})
    return options[:_OPTIONS_TOGETHER]


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


def _run(experiment: Experiment, ledger: Ledger, built: _Built, search_only: bool) -> Summary:
    pairs = _pairs(experiment, ledger, built, may_train=True)
    queue = InTurn([PairWork(pair, ledger, search_only) for pair in pairs], ledger.watch)
    try:
        if not queue.done:
            built.check_images(ledger.watch)
            built.rehearse()
            with _cached_outputs([(work.pair, work.unfinished) for work in queue.queues], experiment, ledger):
                _empty(queue, experiment, ledger)
        ledger.catch_up()
        ledger.tell_of_other_code()
    finally:
        ledger.close()
        for work in queue.queues:
            work.close()
    seal(ledger.store, "tune" if search_only else "run")
    if queue.done and not ledger.failures:
        forget_folder(ledger.layout.checkpoints(experiment.name))
    tuned = {work.pair.student.label: {c.spec.label: c.tuned for c in work.contenders} for work in queue.queues}
    protocols = tuple(dict.fromkeys(pair.board_hash for pair in pairs))
    return Summary(ledger.trained, ledger.found, tuple(ledger.failures), tuned, protocols)


def _pairs(experiment: Experiment, ledger: Ledger, built: _Built, may_train: bool) -> list[Pair]:
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
    taught = _ready_teacher(asked_teacher, ledger, built, network, may_train) if network is not None else None
    teacher, predictions = taught or (None, None)
    shapes = [(ours, built.theirs) for ours in built.ours]
    return [
        _pair(asked, ledger, spec, model, teacher, predictions, of_both, task, built)
        for spec, model, of_both in zip(experiment.students, students, shapes, strict=True)
    ]


class _Built:
    """The networks of an experiment, each built once. They are let go of when all that is trained has been rehearsed."""

    def __init__(self, experiment: Experiment, task: Task, own: Task, students: Sequence[nn.Module], teacher: nn.Module | None) -> None:
        """own: the teacher's task, `task` itself or another. teacher: the network of that task."""
        self.experiment, self.task, self.own = experiment, task, own
        self.students, self.network = students, teacher
        self.done = self.looked = False

    @cached_property
    def theirs(self) -> Shapes | None:
        """Every place of the teacher that a method can look at; None where there is no teacher."""
        return tap_shapes(self.as_teacher(self.network), self.task.example("teacher")) if self.network is not None else None

    @cached_property
    def ours(self) -> tuple[Shapes, ...]:
        """Every place of each student."""
        return tuple(tap_shapes(student, self.task.example()) for student in self.students)

    def check_images(self, watch: Watch) -> None:
        """Look at the images the first time that it is asked for, and say what of them is not shown. Raises UserError for a broken one."""
        if not self.looked:
            self.looked = True
            for task in dict.fromkeys((self.task, self.own)):
                if unseen := check_images(task):
                    watch.note(unseen)

    def as_teacher(self, network: nn.Module) -> nn.Module:
        """The teacher's network as the students' batches go into it."""
        return network if self.own is self.task else as_teacher(network, self.own, self.task)

    def rehearse(self, teacher_too: bool = False) -> None:
        """Rehearse all that the experiment trains, the first time that it is asked for.

        teacher_too: whether the teacher is trained here and now. Raises UserError for what can't work.
        """
        if self.done:
            return
        device = device_here(self.experiment.runtime)
        if self.network is not None and teacher_too:
            Rehearsal(self.experiment, self.own, [], device).teacher(self.network, tap_shapes(self.network, self.own.example("teacher")))
        rehearsal = Rehearsal(self.experiment, self.task, [self.experiment.recipe, *searched_recipes(self.experiment)], device)
        network = self.as_teacher(self.network) if self.network is not None else None
        for spec, model, ours in zip(self.experiment.students, self.students, self.ours, strict=True):
            rehearsal.student(spec, model, ours, self.theirs, network)
        self.done, self.students, self.network = True, (), None

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where a measurement inside fails, the rehearsal says what is wrong with the network."""
        try:
            yield
        except KDBenchError:
            raise
        except Exception:
            self.rehearse(teacher_too=True)
            raise


def _empty(work: Work, experiment: Experiment, ledger: Ledger, searching: bool | None = None) -> None:
    """In this process, or on Ray, for all that is to do."""
    runtime = experiment.runtime
    if not needs_ray(runtime, experiment.search is not None if searching is None else searching):
        run_here(work, ledger.layout, device_here(runtime))
        return
    from kdbench.distributed.cluster import started

    slots = ledger.held.enter_context(started(runtime))
    if slots.short:
        ledger.watch.note(f"{slots.short}: waiting for nodes to join the cluster at {runtime.address}")
    from kdbench.distributed.tune import run_with_tune

    run_with_tune(work, ledger.layout, runtime, slots, experiment.name)


def needs_ray(runtime: Runtime, searching: bool) -> bool:
    """One worker, no cluster, no search and one training at a time: no Ray. On several GPUs several trainings run at once."""
    if not runtime.single or runtime.address is not None or searching:
        return True
    slots = slots_of(runtime, nodes_of(runtime))
    return (slots.concurrent if slots.gpus else runtime.concurrent or 1) > 1


# --- teacher ---------------------------------------------------------------------------------------------------------


def _ready_teacher(asked: Asked, ledger: Ledger, built: _Built, model: nn.Module, may_train: bool) -> tuple[TeacherRef, str | None]:
    """The teacher, trained, and where the store has its predictions for the test part. Its metric is made known first of all.

    It comes from the results folder or from its weights file, or is trained now. One of another task predicts another test part and is
    measured in another unit: its students are told neither. asked: of the teacher's task.
    """
    experiment, splits, task = asked.experiment, asked.data.splits, built.own
    spec = experiment.teacher
    assert spec is not None
    ledger.watch.progress("teacher", 0, 1)
    asked_recipe, device = experiment.teacher_recipe(), device_here(experiment.runtime)
    memo = _memo(ledger, experiment.task_of("teacher"), experiment, spec.model, asked_recipe)
    with built.explaining():
        recipe = settled(asked_recipe, model, task.example("teacher"), len(splits.learned_by("teacher")), device, memo)
    unit = _teacher_unit(experiment, spec, recipe, task, model)
    fits = partial(_ready_to_train, built, ledger.watch) if may_train else partial(_refuse, experiment, ledger)
    given = _saved(model, ledger.layout.teacher(unit.key)) if spec.weights == "pretrained" else spec.weights
    check_first: Callable[[], None] = built.rehearse if may_train else _nothing
    recall = Recall(asked, ledger)
    record, weights = _given(recall, given, unit, task, check_first) if given else _trained(recall, unit, task, model, fits)
    ledger.watch.progress("teacher", 1, 1)
    other = "" if task is built.task else f" on its own task, {task.name} on {task.data_name}"
    ledger.watch.note(f"teacher {spec.model.label}: test {task.primary} {record.test_metric:.2f}{other}")
    chance = task.chance(targets_of(splits.test)) if record.chance_metric is None else record.chance_metric
    if caution := chance_caution(spec.model.label, record.test_metric, chance, task.higher_is_better):
        ledger.watch.note(f"warning: {caution}")
    assert record.teacher_sha is not None
    reference = _reference(unit, weights, record.teacher_sha, record.teacher_state)
    if not other:
        return reference.model_copy(update={"metric": record.test_metric}), record.predictions_uri
    return reference.model_copy(update={"task": unit.task, "task_facts": content_hash(outputs_facts(task, unit.task))}), None


def _reference(unit: Unit, weights: Path, sha: str, state: str | None) -> TeacherRef:
    """A teacher as its students name it. unit: its training, or what that would have been."""
    recipe = unit.recipe
    return TeacherRef(
        model=unit.student, weights=weights, sha=sha, state=state, precision=recipe.precision, memory_format=recipe.memory_format
    )


def _loaded_state(unit: Unit, weights: Path, task: Task) -> str:
    """What a file of weights is in the teacher's network. Raises UserError where it does not fit."""
    with torch.random.fork_rng(devices=[]):
        return state_sha256(task.build_model(unit.student.model_copy(update={"weights": weights})))


def _ready_to_train(built: _Built, watch: Watch) -> None:
    """Look at what the teacher's training needs. Raises UserError for what can't work."""
    built.rehearse(teacher_too=True)
    built.check_images(watch)


def _refuse(experiment: Experiment, ledger: Ledger) -> None:
    raise UserError(
        f"{experiment.name}: its teacher is not trained yet in {ledger.layout.location}; "
        "train it with kdbench run, or name a file with teacher.weights"
    )


def _teacher_unit(experiment: Experiment, spec: TeacherSpec, recipe: Recipe, task: Task, model: nn.Module) -> Unit:
    learned, of_task = task.splits().learned_hash_of("teacher"), experiment.task_of("teacher")
    return Unit(
        role="teacher",
        experiment=experiment.name,
        protocol_hash=teacher_protocol(task_facts(of_task, "teacher"), task.data_name, learned, recipe),
        data_hash=learned,
        task=of_task,
        task_version=task.version,
        student=spec.model,
        student_init=_initial_content(spec.model, model),
        method=MethodSpec(name="none", label="teacher"),
        recipe=recipe,
        seed=spec.seed,
        data_seed=experiment.data_seed,
        workers=experiment.runtime.workers,
        checkpoint_seconds=experiment.runtime.checkpoint_seconds,
    )


def _initial_content(spec: ModelSpec, model: nn.Module) -> str | None:
    """What a network of `spec` begins with, where that was read from a file."""
    return state_sha256(model) if spec.weights is not None else None


def _trained(recall: Recall, unit: Unit, task: Task, model: nn.Module, check_first: Callable[[], None]) -> tuple[RunRecord, Path]:
    ledger = recall.ledger
    noise, told = draws_noise(has_dropout(model), unit.method), partial(_reloaded, unit, task, ledger.layout)
    record = recall.find(unit, recall.asked.rule.teacher_key(unit), noise=noise, teacher_of=told)
    if record is not None:
        ledger.found_again(unit, record)
        return record, weights_of(record, ledger.layout)
    check_first()
    work = TeacherWork(unit, task, ledger)
    _empty(work, recall.asked.experiment, ledger, searching=False)
    assert work.record is not None, "a queue that was emptied without an error has its record"
    return work.record, weights_of(work.record, ledger.layout)


def _saved(pretrained: nn.Module, path: Path) -> Path:
    """timm's weights as they are, in a file like any teacher's, so that they stay what they are."""
    if not fetch(path).exists():
        save_weights(pretrained.state_dict(), path)
    return path


def _nothing() -> None:
    """Nothing is trained, so nothing is rehearsed."""


def _reloaded(unit: Unit, task: Task, layout: Layout, record: RunRecord) -> dict[str, Any]:
    """What a record says of the teacher whose training it is, which takes loading what that left."""
    assert record.teacher_sha is not None
    weights = weights_of(record, layout)
    state = _loaded_state(unit, weights, task)
    return {"teacher_state": state, "teacher_id": _reference(unit, weights, record.teacher_sha, state).identity}


def _given(recall: Recall, path: Path, unit: Unit, task: Task, check_first: Callable[[], None]) -> tuple[RunRecord, Path]:
    ledger = recall.ledger
    weights = _existing(path)
    state = _loaded_state(unit, weights, task)  # first: what holds no weights is not read to its end
    sha = file_sha256(weights)
    identity = _reference(unit, weights, sha, state).identity
    key = given_teacher_key(task_facts(unit.task, "teacher"), identity, unit.student.label)
    weights = _reachable(weights, ledger.layout, content_hash([key, sha]))
    told = {"teacher_sha": sha, "teacher_state": state, "teacher_id": identity}
    record = recall.given(unit, key, recall.asked.rule.teacher_key(unit, sha), **told)
    if record is None:
        check_first()
        session = LocalSession(device=device_here(recall.asked.experiment.runtime))
        measured = measured_teacher(unit, weights, session, ledger.layout, key)
        record = ledger.append(unit, measured.model_copy(update=told))
    return record.model_copy(update={"teacher_sha": sha}), weights  # the same tensors may have come in another file


def _existing(path: Path) -> Path:
    """Where a file of weights is. Raises UserError where there is none, or no regular file."""
    weights = local_path(path, "teacher.weights").resolve()
    if not weights.exists():
        raise UserError(f"teacher.weights: there is no file {weights}")
    check_declared(weights)
    return weights


def _reachable(weights: Path, layout: Layout, key: str) -> Path:
    """A file of this machine's as all machines find it: where results are at an address, a copy of it goes there."""
    copy_ = layout.teacher(key).with_suffix(weights.suffix)
    if origin(layout.root) is None or weights.is_relative_to(layout.root):
        return weights
    if not fetch(copy_).exists():
        write_atomically(copy_, lambda temporary: temporary.write_bytes(weights.read_bytes()))
    return copy_


class TeacherWork:
    """A queue of one (`training.work.Work`). Without a teacher nothing can go on, so its failure is the run's."""

    def __init__(self, unit: Unit, task: Task, ledger: Ledger) -> None:
        self.unit, self.task, self.ledger = unit, task, ledger
        self.started = False
        self.record: RunRecord | None = None

    @property
    def done(self) -> bool:
        return self.record is not None

    def next(self) -> Unit | None:
        self.started, before = True, self.started
        return None if before else self.unit

    def report(self, unit: Unit, metrics: Mapping[str, float]) -> bool:
        self.ledger.epoch(unit, metrics, self.task.primary)
        return False

    def resumed(self, unit: Unit, place: str) -> None:
        self.ledger.resumed(unit, place)

    def finish(self, unit: Unit, record: RunRecord) -> None:
        if record.status != "ok":
            raise RunFailed(f"{record.failure}; lower teacher.recipe.lr, or set teacher.recipe.clip_grad")
        self.record = self.ledger.append(unit, record, **_reloaded(unit, self.task, self.ledger.layout, record))

    def crash(self, unit: Unit, reason: str, died: bool = False) -> None:
        raise RunFailed(reason)


# --- students --------------------------------------------------------------------------------------------------------


def _pair(
    asked: Asked,
    ledger: Ledger,
    student: ModelSpec,
    model: nn.Module,
    teacher: TeacherRef | None,
    teacher_predictions: str | None,
    shapes: tuple[Shapes, Shapes | None],
    task: Task,
    built: _Built,
) -> Pair:
    experiment, splits = asked.experiment, asked.data.splits
    memo = _memo(ledger, experiment.task, experiment, student, experiment.recipe)
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
        begun = _initial_content(student, model)
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


def _memo(ledger: Ledger, task: TaskSpec, experiment: Experiment, model: ModelSpec, recipe: Recipe) -> Memo:
    """Where the choices are kept that were measured for this model on this task and device, for what the recipe asks."""
    device = str(device_here(experiment.runtime))
    earlier = [model.model_dump(mode="json"), task.model_dump(mode="json"), device]
    place = [model.model_dump(mode="json", exclude={"weights"}), task_facts(task), device]
    return Memo(ledger.layout.choice(content_hash([*place, question(recipe)])), earlier=ledger.layout.choice(content_hash(earlier)))


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
