"""What can be known to be wrong with an experiment, or unwise, before anything of it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import Any

from kdbench.benchmark.pair import axes_of
from kdbench.boards.cautions import ema_caution
from kdbench.data.decoding import DECODED_FIRST, check_decodable, not_shown
from kdbench.data.loader import check_views
from kdbench.data.views import Augment
from kdbench.errors import UserError
from kdbench.experiment import Experiment, Recipe, validated, worker_bounds
from kdbench.methods.build import method_class, params_of
from kdbench.models.build import check_model_name
from kdbench.search.study import FIRST_AT_RANDOM, drawn_at_random
from kdbench.tasks.base import Task
from kdbench.training.optimization import check_optimization

_OPTIONS_TOGETHER = 6  # of a searched key that are tried with those of another key before a run


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
    """Raise UserError where a task says what somebody learns from who does not learn it: a teacher that is not there, or students."""
    if own is not task and experiment.teacher is not None and experiment.teacher.task is not None:
        of_students = sorted((experiment.teacher.task.model_extra or {}).keys() & {"transfer", "transfer_size", "labelled"})
        if of_students:
            raise UserError(f"teacher.task: {of_students[0]} says what students learn from; write it in task, or leave it out")
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
        if method_class(method).needs_labels:
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
    ends: dict[str, Sequence[Any]] = {key: dimension.ends for key, dimension in also.items()}
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
