"""One teacher and one student: per method a search, the winners' check on fresh seeds, the finals, as one queue of units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal

import torch

from kdbench.benchmark.cost_control import matched
from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.recall import Recall
from kdbench.benchmark.watch import Phase
from kdbench.boards.leaderboard import seeds_still_wanted
from kdbench.errors import UserError
from kdbench.experiment import (
    TRIAL_SEED,
    Experiment,
    Recipe,
    Search,
    TeacherRef,
    Unit,
    board_hash,
    content_hash,
    validated,
    worker_bounds,
)
from kdbench.methods.base import Method
from kdbench.methods.build import NO_OVERRIDES, MethodSpec, build_method, fitted, method_class, search_axes
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Shapes
from kdbench.records.plan import AT_COST, AT_DEFAULT, UNDISTILLED, control_of, controls_of
from kdbench.records.record import RunRecord
from kdbench.search.space import Parameter, Range, describe, is_whole
from kdbench.search.study import Asha, Direction, MethodStudy, TrialBudget, defaults, holds
from kdbench.storage.journals import fetch_journal
from kdbench.tasks.base import Splits, Task
from kdbench.tasks.build import task_facts
from kdbench.tracking import PROTOCOL_TAG
from kdbench.training.earlier_keys import Asked, draws_noise
from kdbench.training.keys import student_protocol
from kdbench.training.outcome import code_of, failed_record
from kdbench.training.stages import epochs_of

# Seeds of trials, of the winners' checks and of the finals never meet: a final is the first training on its seed.
FIRST_CANDIDATE_SEED = 2_000_000
_NOT_OF_A_STUDY = {"trials", "budget", "top_k", "confirm_seeds", "also", "studies", "defaults"}  # keys of `search` that change no trial
_APART = 1_000_003  # between the seeds of the samplers of a method's searches


@dataclass(frozen=True)
class Pair:
    """What the units of one board share."""

    asked: Asked
    student: ModelSpec
    teacher: TeacherRef | None
    teacher_predictions: str | None  # where the store has what it predicts for the test part
    task: Task
    recipe: Recipe  # nothing in it is `auto` any more
    student_init: str | None  # content of the weights that the student begins with; None where they are drawn
    dropout: bool  # whether the student has any
    student_shapes: Shapes  # every place of the two networks that a method can look at
    teacher_shapes: Shapes | None

    @property
    def experiment(self) -> Experiment:
        return self.asked.experiment

    @property
    def splits(self) -> Splits:
        return self.asked.data.splits

    @cached_property
    def task_facts(self) -> dict[str, Any]:
        return task_facts(self.experiment.task)

    @cached_property
    def protocol_hash(self) -> str:
        """What the trainings of a board share; their keys hold it."""
        cached = self.teacher is not None and self.teacher.cache is not None
        identity = self.teacher.identity if self.teacher else None
        data = self.task.data_name, self.splits.learned_hash
        return student_protocol(self.experiment, self.task_facts, *data, self.recipe, identity, cached)

    @property
    def board_hash(self) -> str:
        """What the records of a board share: the protocol, and the test part."""
        return board_hash(self.protocol_hash, self.splits.test_hash)

    def unit(
        self,
        spec: MethodSpec,
        role: Literal["trial", "candidate", "final"],
        params: Mapping[str, Any],
        seed: int,
        number: int | None = None,
    ) -> Unit:
        """The training of a method at a point of its space: keys `recipe.x` go to the recipe, the others to the method."""
        changes = {name.removeprefix("recipe."): value for name, value in params.items() if name.startswith("recipe.")}
        own = {name: value for name, value in params.items() if not name.startswith("recipe.")}
        experiment = self.experiment
        params_here = self._fitted(spec, own).params
        return Unit(
            role=role,
            experiment=experiment.name,
            protocol_hash=self.protocol_hash,
            data_hash=self.splits.learned_hash,
            task=experiment.task,
            task_version=self.task.version,
            student=self.student,
            student_init=self.student_init,
            teacher=self.teacher,
            method=MethodSpec.model_validate({"name": spec.name, "label": spec.label, **params_here.model_dump(mode="json")}),
            method_version=method_class(spec).version,
            recipe=validated(Recipe, {**self.recipe.model_dump(), **changes}, "search.also"),
            seed=seed,
            data_seed=experiment.data_seed,
            workers=experiment.runtime.workers,
            checkpoint_seconds=experiment.runtime.checkpoint_seconds,
            number=number,
        )

    def _fitted(self, spec: MethodSpec, own: Mapping[str, Any] = NO_OVERRIDES) -> Method:
        """The method with its taps chosen for the pair, at parameters of its own; not built. Without such it is made once."""
        if own:
            return fitted(spec, self.student_shapes, self.teacher_shapes, overrides=own, gives=self.task.gives)
        if spec.label not in self._as_configured:
            self._as_configured[spec.label] = fitted(spec, self.student_shapes, self.teacher_shapes, gives=self.task.gives)
        return self._as_configured[spec.label]

    @cached_property
    def _as_configured(self) -> dict[str, Method]:
        return {}

    def search_axes(self, spec: MethodSpec) -> tuple[Parameter, ...]:
        """What a search varies of the method on this pair."""
        return search_axes(spec, self.student_shapes, self.teacher_shapes, self.task.gives)

    def sample(self, spec: MethodSpec) -> Unit:
        """A training of the method, to see what it takes."""
        return self.unit(spec, "trial", {}, TRIAL_SEED, 0)

    def teacher_taps(self, specs: Sequence[MethodSpec]) -> list[tuple[str, ...]]:
        """What each of the methods that has a teacher looks at inside it."""
        methods = [self._fitted(spec) for spec in specs]
        return [method.teacher_taps for method in methods if method.needs_teacher]

    def study_id(self, spec: MethodSpec, axes: tuple[Parameter, ...], search: Search, number: int = 0) -> str:
        """Names all that decides a study's points and values, but not the number of trials: a longer search continues a shorter one.

        number: of the search, where the method has several.
        """
        return content_hash(
            {
                **({"number": number} if number else {}),
                "experiment": self.experiment.name,
                "task": self.task_facts,
                "data": self.splits.learned_hash,
                "student": [self.student.model_dump(mode="json", exclude={"weights"}), self.student_init],
                "teacher": self.teacher.identity if self.teacher else None,
                "method": [spec.label, spec.name, spec.pinned, method_class(spec).version],
                "recipe": self.recipe.model_dump(mode="json"),
                "data_seed": self.experiment.data_seed,
                "cache": self.experiment.cache.numbers,
                "workers": self.experiment.runtime.model_dump(mode="json")["workers"],
                "space": describe(axes),
                "search": search.model_dump(mode="json", exclude=_NOT_OF_A_STUDY),
            }
        )

    def open_study(
        self, spec: MethodSpec, axes: tuple[Parameter, ...], search: Search, recall: Recall, number: int
    ) -> tuple[str, MethodStudy]:
        study_id, layout = self.study_id(spec, axes, search, number), recall.ledger.layout
        if not number and not fetch_journal(layout.study(study_id)).exists():
            earlier = self.asked.study_id(self.student, self.teacher, self.recipe, spec, axes, search)
            if fetch_journal(layout.study(earlier)).exists() and recall.continues(
                earlier, self.student, self.teacher, spec.label, draws_noise(self.dropout, spec)
            ):
                study_id = earlier
        grace = self._unstoppable_epochs(spec, axes, search.grace_epochs)
        asha = Asha(grace, search.reduction) if search.scheduler == "asha" else None
        main: Direction = "maximize" if self.task.higher_is_better else "minimize"
        costs: list[Direction] = ["minimize"] * len(search.objectives)
        study = MethodStudy(
            layout.study(study_id),
            study_id,
            axes,
            trials=search.trials,
            sampler=search.sampler,
            seed=search.seed + number * _APART,
            directions=[main, *costs],
            asha=asha,
            budget=self._trial_budget(search),
            before_upload=recall.ledger.check_lease,
        )
        return study_id, study

    def _trial_budget(self, search: Search) -> TrialBudget | None:
        budget = search.budget
        if budget is None:
            return None
        _, workers = worker_bounds(self.experiment.runtime.workers)
        return TrialBudget(
            f"trials within {budget.said}", lambda seconds, epochs: budget.trials(seconds, epochs, self.recipe.epochs, workers)
        )

    def _unstoppable_epochs(self, spec: MethodSpec, axes: Sequence[Parameter], grace: int) -> int:
        """Epochs of a trial before which the search does not stop it.

        Until its method's warm-up is over, and until its last stage is under way for as long as the search lets any trial be: a fresh head
        starts low. Where a searched parameter moves the stages, until the latest beginning that an end of its range leads to.
        """
        epochs = self.recipe.epochs
        points: list[dict[str, Any]] = [{}]
        points += [{axis.name: value} for axis in axes if not axis.name.startswith("recipe.") for value in axis.ends]
        found = 0
        for point in points:
            with suppress(UserError):  # two parameters' ends may not go together
                found = max(found, _unstoppable(self._fitted(spec, point), spec.name, epochs, grace))
        return found


def _unstoppable(method: Method, name: str, epochs: int, grace: int) -> int:
    """Epochs of a training of so many before which nobody stops it: see `Pair._unstoppable_epochs`."""
    return max(epochs_of(method.stages(), epochs, name)[-1].start + grace, math.ceil(method.warmup_epochs(epochs)))


def axes_of(spec: MethodSpec, search: Search | None, recipe: Recipe, own: tuple[Parameter, ...] | None = None) -> tuple[Parameter, ...]:
    """What is searched for a method: its own parameters and the recipe keys of `search.also`; the present values are tried first.

    own: the method's axes on a pair (`Pair.search_axes`), whose defaults and ranges may differ from those that its Params say.

    Raises UserError where a present value lies outside its range, since the published default must be a point of the space.
    """
    if search is None:
        return ()
    shared = tuple(
        Parameter(
            key,
            dimension,
            getattr(recipe, key.removeprefix("recipe.")),
            is_whole(Recipe.model_fields[key.removeprefix("recipe.")].annotation),
        )
        for key, dimension in search.also.items()
    )
    axes = (*shared, *(search_axes(spec) if own is None else own))
    first = defaults(axes)
    for axis in axes:
        if axis.integer and isinstance(axis.dimension, Range):
            try:
                axis.dimension.check_whole()
            except ValueError as error:
                raise UserError(f"search.also.{axis.name}: {error}") from error
        if axis.name in first and not holds(axis.dimension, axis.default):
            raise UserError(
                f"search.also.{axis.name}: the value tried first, {axis.default!r}, is not in the space; change {axis.name} or widen it"
            )
    return axes


@dataclass
class Contender:
    """One search of a method on its way. ended: the record of each check and final that ended, None where its process died for good."""

    spec: MethodSpec
    axes: tuple[Parameter, ...]
    open_parent: Callable[[], str | None]
    seeds: range  # of its finals
    number: int = 0  # of its search, where the method has several
    beside: Literal["default", "cost"] | None = None  # why its finals are no row of the board
    beside_of: str | None = None  # the label of the row that they are compared with
    given: Mapping[str, Any] = field(default_factory=dict)  # where there is no search, the parameters of its finals
    study: MethodStudy | None = None
    study_id: str | None = None
    candidates: dict[str, tuple[int, Unit]] = field(default_factory=dict)  # by unit key: which of the best points, and the training
    finals: dict[str, Unit] | None = None  # by unit key; None until the tuned parameters are known
    started: set[str] = field(default_factory=set)
    ended: dict[str, RunRecord | None] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    parent_id: str | None = None
    held: bool = False  # a trial or a check was left to the next run, and the finals with it

    @property
    def title(self) -> str:
        """Its label, and which search of it, where that is not the first."""
        return self.spec.label + (f", search {self.number + 1}" if self.number else "")

    def parent(self) -> str | None:
        """The MLflow run that this method's runs are nested under; made when the first of them is. None while MLflow can't be reached."""
        self.parent_id = self.parent_id or self.open_parent()
        return self.parent_id

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to this run."""
        if (self.finals is None and not self.held) or (self.study is not None and not self.study.done):
            return False
        return all(key in self.ended for key in [*self.candidates, *(self.finals or {})])


class PairWork:
    """The queue (`training.work.Work`) of one pair. It remembers nothing of its own: studies and store say what is done."""

    def __init__(self, pair: Pair, ledger: Ledger, search_only: bool) -> None:
        self.pair, self.ledger, self.search_only = pair, ledger, search_only
        self.near_duplicates: int | None = None  # of the test samples, where somebody counted them
        self.search, self.plan = pair.experiment.search, pair.experiment.plan
        self._recall = Recall(pair.asked, ledger)
        self._controls = controls_of([(spec.label, spec.name) for spec in pair.experiment.methods])
        self._owners: dict[tuple[str, int | None], Contender] = {}
        self.contenders = [self._contender(spec, number) for spec in pair.experiment.methods for number in range(self.plan.searches)]
        if self.search is not None and self.search.defaults:
            self.contenders += [self._at_default(contender) for contender in self._rows if contender.axes and not contender.number]
        for contender in self.contenders:
            self._move_on(contender)
        self._look()

    def _contender(self, spec: MethodSpec, number: int) -> Contender:
        each = self.plan.seeds
        seeds = range(number * each, (number + 1) * each)
        if self.plan.searches == 1 and spec.label in self._controls:
            seeds = range(self.plan.control_seeds)
        axes = axes_of(spec, self.search, self.pair.recipe, self.pair.search_axes(spec) if self.search is not None else None)
        contender = Contender(spec, axes, partial(self._open_parent, spec, number), seeds, number)
        if self.search is not None and axes:
            contender.study_id, contender.study = self.pair.open_study(spec, axes, self.search, self._recall, number)
            now = code_of(self.pair.unit(spec, "trial", defaults(axes), TRIAL_SEED + number))
            self.ledger.compare_code(f"{self.pair.student.label} · {spec.label} (search)", now, contender.study.began_with(now))
        return contender

    @property
    def _rows(self) -> list[Contender]:
        """Those whose finals are rows of the board."""
        return [contender for contender in self.contenders if contender.beside is None]

    def _at_default(self, tuned: Contender) -> Contender:
        """The same method with the parameters that every search begins with."""
        spec = tuned.spec.model_copy(update={"label": tuned.spec.label + AT_DEFAULT})
        parent = partial(self._open_parent, spec, 0)
        return Contender(spec, tuned.axes, parent, tuned.seeds, beside="default", beside_of=tuned.spec.label, given=defaults(tuned.axes))

    def _open_parent(self, spec: MethodSpec, number: int) -> str | None:
        pair = self.pair
        tags = {"kdbench.method": spec.label, "kdbench.student": pair.student.label, PROTOCOL_TAG: pair.board_hash}
        title = f"{spec.label} · {pair.student.label}" + (f" · search {number + 1}" if number else "")
        return self.ledger.tracker.parent(title, self._parent_key(spec, number), tags)

    def _parent_key(self, spec: MethodSpec, number: int) -> str:
        told = [self.pair.board_hash, self.pair.student.model_dump(mode="json"), spec.label]
        return content_hash([*told, number] if number else told)

    @property
    def unfinished(self) -> list[MethodSpec]:
        """The methods that have something left to train."""
        left = {contender.spec.label: contender.spec for contender in self.contenders if not contender.done}
        return [*left.values()]

    @property
    def saved(self) -> str | None:
        """How many finals were not needed, where seeds are added until rows are decided; None before that is known."""
        rows = self._rows
        if not self.plan.looks or not self.done or any(not contender.finals for contender in rows):
            return None
        made, most = sum(len(contender.finals or {}) for contender in rows), self.plan.most * len(rows)
        return f"{self.pair.student.label}: decided after {made} finals; {self.plan.most} seeds of every method are {most}"

    def counts(self) -> dict[Phase, tuple[int, int]]:
        """Trainings done and in all, a phase each."""
        search, rounds = self.search, {"search": [0, 0], "check": [0, 0], "final": [0, 0]}
        for contender in self.contenders:
            if contender.study is not None and search is not None:
                trials = contender.study.trials
                _add(rounds["search"], contender.study.spent().trials, trials)
                planned = search.top_k * search.confirm_seeds if search.top_k > 1 and trials > 1 else 0
                _add(
                    rounds["check"],
                    len(contender.candidates.keys() & contender.ended),
                    planned if contender.finals is None else len(contender.candidates),
                )
            if not self.search_only:
                _add(rounds["final"], len((contender.finals or {}).keys() & contender.ended), len(contender.finals or contender.seeds))
        return {"search": tuple(rounds["search"]), "check": tuple(rounds["check"]), "final": tuple(rounds["final"])}  # type: ignore[dict-item]

    def close(self) -> None:
        """Tell MLflow which methods are through."""
        for contender in self.contenders:
            run_id = contender.parent_id or self.ledger.left_open.get(self._parent_key(contender.spec, contender.number))
            self.ledger.tracker.close_parent(run_id, "FINISHED" if contender.done and not contender.held else "KILLED")

    # --- the queue ---------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return all(contender.done for contender in self.contenders)

    def next(self) -> Unit | None:
        for contender in self.contenders:
            unit = self._next_of(contender)
            if unit is not None:
                self._owners[unit.key, unit.number] = contender
                return unit
        return None

    def _next_of(self, contender: Contender) -> Unit | None:
        if contender.study is not None and contender.study.missing:
            point = contender.study.ask()
            return self.pair.unit(contender.spec, "trial", point.params, TRIAL_SEED + contender.number, point.number)
        checks = ((key, unit) for key, (_, unit) in contender.candidates.items())
        for key, unit in chain(checks, (contender.finals or {}).items()):
            if key not in contender.started and key not in contender.ended:
                contender.started.add(key)
                return unit
        return None

    def report(self, unit: Unit, metrics: Mapping[str, float]) -> bool:
        contender = self.owner(unit)
        self.ledger.epoch(unit, metrics, self.pair.task.primary, contender.parent)
        study = contender.study
        if unit.number is None or study is None:
            return False
        epoch = int(metrics["epoch"])
        value, last = metrics[f"val_{self.pair.task.primary}"], epoch == unit.recipe.epochs
        return study.report(unit.number, epoch, value, last, self._earliest_stop(unit))

    def _earliest_stop(self, unit: Unit) -> int:
        """Rungs hold for all trials of a study; several searched parameters, or epochs, move the stages of one of them beyond these."""
        if self.search is None or self.search.scheduler != "asha":
            return 0
        return _unstoppable(build_method(unit.method, torch.Generator()), unit.method.name, unit.recipe.epochs, self.search.grace_epochs)

    def resumed(self, unit: Unit, place: str) -> None:
        self.ledger.resumed(unit, place)

    def finish(self, unit: Unit, record: RunRecord) -> None:
        contender = self.owner(unit)
        curve = self.ledger.curve_of(unit)
        if record.status != "ok" and curve:
            record = record.model_copy(update={"curve": curve, "train_seconds": curve[-1]["seconds"]})
        if unit.number is not None:
            self._finish_trial(contender, unit, unit.number, record)
        else:
            contender.ended[unit.key] = self._append(contender, unit, record)
        self._move_on(contender)
        self._look()

    def crash(self, unit: Unit, reason: str, died: bool = False) -> None:
        """Processes kept dying or code failed. That is no property of a method: nothing goes on record, and the next run tries again.

        Only a trial whose code failed counts as a point of the space that does not work.
        """
        contender = self.owner(unit)
        curve = self.ledger.curve_of(unit)
        self.ledger.drop(unit)
        if unit.number is not None and contender.study is not None and died:
            contender.study.give_up(unit.number, reason)
            self.ledger.failures.append(reason)
        elif unit.number is not None and contender.study is not None:
            contender.study.fail(unit.number, reason, curve[-1]["seconds"] if curve else 0.0, _epochs(curve))
            self.ledger.watch.note(reason)
        else:
            self.ledger.failures.append(reason)
            contender.ended[unit.key] = None
            contender.held |= died and unit.key in contender.candidates
        self._move_on(contender)
        self._look()

    def owner(self, unit: Unit) -> Contender:
        return self._owners[unit.key, unit.number]

    # --- what follows from what ended --------------------------------------------------------------------------------

    def _finish_trial(self, contender: Contender, unit: Unit, number: int, record: RunRecord) -> None:
        study, search = contender.study, self.search
        assert study is not None
        assert search is not None
        seconds, epochs = record.train_seconds or 0.0, _epochs(record.curve)
        record = record.model_copy(update={"study_id": contender.study_id, "params": _searched_params(contender, record)})
        self.ledger.note_trial(unit, record, contender.parent)
        for row in record.curve:  # a report can be lost with the process that sent it
            study.report(number, int(row["epoch"]), row[f"val_{self.pair.task.primary}"], last=True)
        if record.status == "failed":
            study.fail(number, record.failure or "unknown", seconds, epochs)
            return
        if record.status == "stopped":
            study.prune(number, seconds, epochs)
            return
        values = _objectives(record, search.objectives)
        if all(math.isfinite(value) for value in values):
            study.complete(number, values, seconds, epochs)
        else:
            study.fail(number, f"{unit.title}: of its objectives, {values}, not all are numbers", seconds, epochs)

    def _append(self, contender: Contender, unit: Unit, record: RunRecord) -> RunRecord:
        if record.status == "failed":
            self.ledger.failures.append(record.failure or unit.title)
        params = _searched_params(contender, record)
        facts = self._search_facts(contender)
        if unit.role == "final":
            facts |= {"plan": self.plan.model_dump(mode="json", exclude_defaults=True), "near_duplicates": self.near_duplicates}
        return self.ledger.append(unit, record, contender.parent, params=params, **facts)

    def _search_facts(self, contender: Contender) -> dict[str, Any]:
        """What finding the parameters cost: trials and the winners' checks."""
        if contender.beside is not None:
            return {"beside": contender.beside, "beside_of": contender.beside_of}
        number = {"search_number": contender.number} if self.plan.searches > 1 else {}
        if contender.study is None or self.search is None:
            return number
        spent, checks = contender.study.spent(), [contender.ended[key] for key in contender.candidates if key in contender.ended]
        _, workers = worker_bounds(self.pair.experiment.runtime.workers)  # of a range, the most: a trial that is stopped says not how many
        return {
            **number,
            "study_id": contender.study_id,
            "sampler": self.search.sampler,
            "scheduler": self.search.scheduler,
            "trials": spent.trials,
            "trials_failed": spent.failed,
            "search_budget": None if self.search.budget is None else self.search.budget.model_dump(mode="json", exclude_none=True),
            "epochs_spent": spent.epochs + sum(len(record.curve) for record in checks if record),
            "search_device_hours": spent.seconds * workers / 3600 + sum(record.device_hours or 0.0 for record in checks if record),
            "space": dict(describe(contender.axes)),
            "search_hash": content_hash(self.search.model_dump(mode="json")),
        }

    def _move_on(self, contender: Contender) -> None:
        """Plan the checks once the search is over, and the finals once the checks are."""
        if contender.finals is not None or (contender.study is not None and not contender.study.done):
            return
        if contender.study is None or self.search is None:
            self._plan_finals(contender, contender.given)
            return
        best = contender.study.best(self.search.top_k)
        if contender.study.held or (not best and contender.study.given_up()):
            contender.held = True
            return
        if not best:
            self._give_up(contender)
            return
        if len(best) > 1 and not contender.candidates:
            for place, params in enumerate(best):
                first = FIRST_CANDIDATE_SEED + contender.number * self.search.confirm_seeds
                for seed in range(first, first + self.search.confirm_seeds):
                    unit = self.pair.unit(contender.spec, "candidate", params, seed)
                    contender.candidates[unit.key] = place, unit
            self._look_up(contender, {key: unit for key, (_, unit) in contender.candidates.items()})
        if all(key in contender.ended for key in contender.candidates) and not contender.held:
            self._plan_finals(contender, best[self._winning_place(contender)] if contender.candidates else best[0])

    def _winning_place(self, contender: Contender) -> int:
        """The place (in the search's order) with the best mean validation metric over the fresh seeds; a failed check loses."""
        higher = self.pair.task.higher_is_better
        worst = -math.inf if higher else math.inf
        values: dict[int, list[float]] = {}
        for key, (place, _) in contender.candidates.items():
            record = contender.ended[key]
            value = record.val_metric if record is not None and record.status == "ok" else None
            values.setdefault(place, []).append(worst if value is None else value)
        means = {place: statistics.fmean(numbers) for place, numbers in values.items()}
        return (max if higher else min)(means, key=lambda place: (means[place], -place if higher else place))

    def _plan_finals(self, contender: Contender, params: Mapping[str, Any]) -> None:
        contender.tuned = params
        if self.search_only:
            contender.finals = {}
            return
        contender.finals = {}
        self._add_finals(contender, contender.seeds)

    def _add_finals(self, contender: Contender, seeds: range) -> None:
        assert contender.finals is not None
        first = self.pair.unit(contender.spec, "final", contender.tuned, seeds[0])
        # The method is fitted to the pair once, and not for each seed: that would take most of the time of a plan.
        added = {unit.key: unit for unit in (first.model_copy(update={"seed": seed}) for seed in seeds)}
        contender.finals |= added
        self._look_up(contender, added)

    def _look(self) -> None:
        """Once all finals have ended, add seeds to the rows that are not decided, and to the controls: see `boards.standings`."""
        while self.plan.looks and not self.search_only and all(contender.done and contender.finals for contender in self._rows):
            ended = [record for contender in self._rows for key, record in contender.ended.items() if key in (contender.finals or {})]
            if any(record is None for record in ended):
                return  # a process died for good: the next run trains that first
            wanted = seeds_still_wanted([record for record in ended if record is not None], self.plan, self._controls)
            if not wanted:
                break
            added = False
            for contender in self.contenders:
                seeds = range(len(contender.finals or {}), wanted.get(contender.beside_of or contender.spec.label, 0))
                if seeds and contender.finals is not None:
                    self._add_finals(contender, seeds)
                    added = True
            if not added:
                break
        self._plan_cost_control()

    def _plan_cost_control(self) -> None:
        """Once all rows are finished, train `none` for as long as the best of them took in all: see `cost_control`."""
        rows = self._rows
        if not self.pair.experiment.cost_control or self.search_only or any(each.beside == "cost" for each in self.contenders):
            return
        if not all(row.done and row.finals for row in rows):
            return
        label = control_of([(row.spec.label, row.spec.name) for row in rows], UNDISTILLED)
        undistilled = next(row for row in rows if row.spec.label == label)
        finals: dict[str, list[RunRecord]] = {}
        for row in rows:
            found = [record for key in row.finals or {} if (record := row.ended.get(key)) is not None]
            finals.setdefault(row.spec.label, []).extend(found)
        key = content_hash([self.pair.board_hash, self.pair.student.model_dump(mode="json")])
        plan = matched(self.ledger, key, finals, undistilled.spec.label, self.pair.teacher, self.pair.recipe.epochs)
        if plan is None:
            return
        spec = undistilled.spec.model_copy(update={"label": UNDISTILLED + AT_COST})
        seeds = range(len(finals[undistilled.spec.label]))
        given = {**undistilled.tuned, "recipe.epochs": plan.epochs}
        parent = partial(self._open_parent, spec, 0)
        contender = Contender(spec, undistilled.axes, parent, seeds, beside="cost", beside_of=plan.method, given=given)
        self.contenders.append(contender)
        self._move_on(contender)

    def _look_up(self, contender: Contender, units: Mapping[str, Unit]) -> None:
        """What the store already has is not trained again. units: by key."""
        for key, unit in units.items():
            earlier_key = self.pair.asked.rule.student_key(unit, self.pair.recipe)
            noise = draws_noise(self.pair.dropout, contender.spec)
            record = self._recall.find(unit, earlier_key, noise=noise, teacher_predictions=self.pair.teacher_predictions)
            if record is not None:
                contender.ended[key] = record
                self.ledger.found_again(unit, record, contender.parent)
                if record.status == "failed":
                    self.ledger.failures.append(record.failure or unit.title)

    def _give_up(self, contender: Contender) -> None:
        """No trial ended well: the finals are on record as failed, and the board says so."""
        assert contender.study is not None
        reasons = contender.study.failures()
        reason = f"{contender.spec.label}: all {len(reasons)} trials failed; the first: {reasons[0]}"
        self._plan_finals(contender, {})
        for key, unit in (contender.finals or {}).items():
            if key not in contender.ended:
                contender.ended[key] = self._append(contender, unit, failed_record(unit, reason))


def _epochs(curve: Sequence[Mapping[str, float]]) -> float:
    """How many were trained. Of a training that was gone on with, the curve may lack the first ones."""
    return curve[-1]["epoch"] if curve else 0.0


def _objectives(record: RunRecord, costs: Sequence[str]) -> list[float]:
    """What the search weighs against each other: the validation metric, then the costs, on validation too."""
    assert record.val_metric is not None
    assert record.train_seconds is not None
    return [record.val_metric, *(record.train_seconds if name == "train_seconds" else record.curve[-1][f"val_{name}"] for name in costs)]


def _searched_params(contender: Contender, record: RunRecord) -> dict[str, Any]:
    """The method's parameters, and what the search varied of the recipe."""
    varied = [name for name in dict.fromkeys([axis.name for axis in contender.axes] + [*contender.given]) if name.startswith("recipe.")]
    return record.params | {name: record.recipe[name.removeprefix("recipe.")] for name in varied}


def _add(pair: list[int], done: int, total: int) -> None:
    pair[0] += done
    pair[1] += total
