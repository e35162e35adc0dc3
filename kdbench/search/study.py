"""The search's memory: one persistent Optuna study per method owns all state, so that a killed search is a paused one.

Nothing here knows of Ray. A trial that a killed driver left RUNNING is run again under its own number and its own parameters,
so a search that was asked for N trials holds exactly N, whatever happened on the way.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kdbench.bounded import ImplausibleFile
from kdbench.errors import UserError, in_one_line
from kdbench.search.space import Choice, Dimension, Parameter, Range
from kdbench.storage.journals import fetch_journal, read_journal_file, upload_journal, whole_lines

optuna.logging.set_verbosity(optuna.logging.ERROR)


# Trials, the default point included, that a sampler has to see before it proposes points of its own: Optuna's defaults, said explicitly.
FIRST_AT_RANDOM: Mapping[str, int] = {"tpe": 10, "cmaes": 1, "gp": 10, "qmc": 1, "nsgaii": 50, "nsgaiii": 50}

GIVEN_UP = "given_up"  # a trial's attribute: why a run left it to the next
# What Optuna's reading of a line that it did not write ends in; the latter say nothing of the line.
_FAULTS = (RecursionError, AssertionError, AttributeError, IndexError)
_NO_JOURNAL = (ValueError, KeyError, TypeError, *_FAULTS)
_CODE = "code"  # a study's attribute: the user's modules when it began, with a hash of each


def derived_seed(*parts: Any) -> int:
    """A 32-bit seed that is a pure function of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class KeyedRandomSampler(RandomSampler):
    """Random search in which trial k's value of a parameter is a function of (seed, k, name): the same after any interruption."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self._seed = seed

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        keyed = RandomSampler(seed=derived_seed(self._seed, trial.number, param_name))
        return keyed.sample_independent(study, trial, param_name, param_distribution)


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """One of Optuna's samplers, by the name an experiment uses, for trial `number` of a search with `seed`.

    A sampler is made anew for each trial, with a seed of the trial's own: all that it knows of earlier trials it reads from the study, so
    that an interruption changes nothing. What follows one sequence through a whole search (random, qmc) is seeded with the search.
    """
    samplers, own = optuna.samplers, derived_seed(seed, number)
    keyed = KeyedRandomSampler(seed)
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: samplers.TPESampler(seed=own, n_startup_trials=FIRST_AT_RANDOM["tpe"]),
        "random": lambda: keyed,
        "cmaes": lambda: samplers.CmaEsSampler(seed=own, independent_sampler=keyed, n_startup_trials=FIRST_AT_RANDOM["cmaes"]),
        "gp": lambda: samplers.GPSampler(seed=own, independent_sampler=keyed, n_startup_trials=FIRST_AT_RANDOM["gp"]),
        "qmc": lambda: samplers.QMCSampler(seed=derived_seed(seed), scramble=True, independent_sampler=keyed),
        "nsgaii": lambda: samplers.NSGAIISampler(seed=own, population_size=FIRST_AT_RANDOM["nsgaii"]),
        "nsgaiii": lambda: samplers.NSGAIIISampler(seed=own, population_size=FIRST_AT_RANDOM["nsgaiii"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # whoever names a sampler wants it; what it did is in the record
        return makers[name]()


def drawn_at_random(sampler: str, axes: Sequence[Parameter], trials: int) -> tuple[str, ...]:
    """The axes whose values a sampler draws at random, though it was chosen because it does better than that. Optuna doesn't say so.

    `cmaes` has no use for options. `cmaes`, `gp` and the genetic samplers search what all finished trials have in common, so an axis with
    a condition is drawn at random as soon as one trial lacks it. The genetic ones mutate one value of a child on average, which of a single
    axis is all there is. `qmc` searches what the first trial has. `random` does as it is told.

    Args:
        sampler: A name that `make_sampler` knows.
        axes: The space of the search.
        trials: How many the search has. The first is the default point, which no sampler draws.

    Returns:
        Names of axes; all of them where the search ends before the sampler begins to learn.
    """
    if sampler == "random" or trials < 2:  # the first trial is the default point
        return ()
    genetic = sampler in ("nsgaii", "nsgaiii")
    if trials <= FIRST_AT_RANDOM[sampler] or (genetic and len(axes) == 1):
        return tuple(axis.name for axis in axes)
    first = defaults(axes)
    return tuple(
        axis.name
        for axis in axes
        if (sampler == "cmaes" and isinstance(axis.dimension, Choice))
        or ((genetic or sampler in ("cmaes", "gp")) and axis.dimension.when is not None)
        or (sampler == "qmc" and axis.name not in first)
    )


Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (arXiv 1810.05934): of the trials that reach a rung, one in `reduction` goes on.

    Rungs are at grace_epochs * reduction^k epochs.
    """

    grace_epochs: int
    reduction: int


@dataclass(frozen=True)
class Point:
    """One trial to run: its number in the study and its parameters by dotted name."""

    number: int
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Spent:
    """What a study cost so far."""

    trials: int
    failed: int
    pruned: int
    epochs: float
    seconds: float


@dataclass(frozen=True)
class TrialBudget:
    """How many trials a search has, by what one of them cost. name: by which the study remembers it, so that a killed search goes on to it.

    trials: from the seconds and the epochs of a trial.
    """

    name: str
    trials: Callable[[float, float], int]


class MethodStudy:
    """Ask for points, tell how they went; every answer is on disk before the call returns.

    In a working copy the journal is also in the store before `ask`, `complete`, `prune` or `fail` returns. Reports of epochs follow with
    the next of these: they are said again when a trial ends.

    A search of N trials sees the study's first N and no others, so that one that continues a shorter search, or is asked again with fewer
    trials, has the budget it was given.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        axes: Sequence[Parameter],
        *,
        trials: int,
        sampler: str,
        seed: int,
        directions: Sequence[Direction] = ("maximize",),
        asha: Asha | None = None,
        budget: TrialBudget | None = None,
        before_upload: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the study `name` in the journal at `path`, or begin it with the axes' defaults as its first point.

        budget: where there is one, `trials` is the most, and how many there are follows from the cost of the first.

        before_upload: called before each write to the store; what it raises keeps that from being written.

        The caller holds the experiment's lock: a lock left in the journal's folder is a killed driver's, and is removed, as is a line
        that it began and did not end. Raises UserError where the journal is damaged otherwise.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        self.axes = tuple(axes)
        self._most, self._budget = trials, budget
        self._before_upload = before_upload
        self._sampler, self._seed, self._asha = sampler, seed, asha
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if asha is not None:
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=asha.grace_epochs, reduction_factor=asha.reduction)
        try:
            self._path = fetch_journal(path)
            _drop_unfinished_line(path)
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name=name,
                load_if_exists=True,
                directions=list(directions),
                pruner=pruner,
            )
        except OSError as error:
            if not isinstance(error, ImplausibleFile) and error.errno != errno.EIO:
                raise
            raise UserError(
                f"the journal of a search, {path}, can't be read: {error.strerror}. Move it away to have that search run again"
            ) from error
        except _NO_JOURNAL as error:
            raise UserError(
                f"the journal of a search, {path}, is damaged ({_reason(error)}): "
                "restore it from a copy, or delete it to have that search run again"
            ) from error
        if not self.study.trials:
            self.study.enqueue_trial(defaults(self.axes))
        if self._budget is not None and self._budget.name not in self.study.user_attrs:
            self._remember_trials()  # a search without a budget, or with another one, may have begun this study
        self._abandoned = [t for t in self._asked() if t.state == TrialState.RUNNING]
        self._open: dict[int, optuna.Trial] = {}
        self.held = False  # nothing more is asked for in this run

    @property
    def trials(self) -> int:
        """How many trials this search has. With a budget, as many as it takes to know, until one of them has a cost."""
        if self._budget is None:
            return self._most
        kept = self.study.user_attrs.get(self._budget.name)
        if isinstance(kept, int):
            return min(kept, self._most)
        ended = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False)[: self._most])
        return min(1 + ended, self._most)

    def _asked(self) -> list[FrozenTrial]:
        """The trials, of those that this search asked for, that were begun."""
        return [t for t in self.study.get_trials(deepcopy=False)[: self.trials] if t.state != TrialState.WAITING]

    def began_with(self, code: Mapping[str, str]) -> Mapping[str, str] | None:
        """The user's modules as they were when this search began, each with a hash of its code.

        Args:
            code: the modules as they are now, which a search without trials remembers.

        Returns:
            What was remembered; None for a search that an older version of kdbench began, which remembered nothing.
        """
        if _CODE not in self.study.user_attrs and not self._asked():
            self.study.set_user_attr(_CODE, dict(code))
        remembered: Mapping[str, str] | None = self.study.user_attrs.get(_CODE)
        return remembered

    @property
    def missing(self) -> int:
        """How many trials are still to be started in this run."""
        if self.held:
            return 0
        return self.trials - len(self._asked()) + len(self._abandoned)

    @property
    def done(self) -> bool:
        return self.missing == 0 and not self._open

    def ask(self) -> Point:
        """The next point: one that a killed driver left running, else a new one from the sampler."""
        if self._abandoned:
            abandoned = self._abandoned.pop(0)
            self.study.sampler = make_sampler(self._sampler, self._seed, abandoned.number)
            trial = optuna.Trial(self.study, abandoned._trial_id)  # optuna has no public way to take up a RUNNING trial
        else:
            self.study.sampler = make_sampler(self._sampler, self._seed, len(self._asked()))
            trial = self.study.ask()
        self._open[trial.number] = trial
        point = Point(trial.number, walk(self.axes, lambda axis: trial._suggest(axis.name, distribution(axis))))
        self._upload()
        return point

    def report(self, number: int, epoch: int, value: float, last: bool, earliest: int = 0) -> bool:
        """Keep an intermediate value; True where the trial should stop now. Its `last` epoch never stops a trial: it is finished.

        earliest: the first epoch after which this very trial may be stopped, where that is later than the study's own grace.
        """
        if len(self.study.directions) > 1:
            return False
        trial = self._open[number]
        if epoch not in self.study.get_trials(deepcopy=False)[number].intermediate_values:
            trial.report(value, epoch)
        return self._asha is not None and not last and epoch >= earliest and trial.should_prune()

    def complete(self, number: int, values: Sequence[float], seconds: float, epochs: float) -> None:
        self._close(number, TrialState.COMPLETE, values, seconds, epochs)

    def prune(self, number: int, seconds: float, epochs: float) -> None:
        self._close(number, TrialState.PRUNED, None, seconds, epochs)

    def fail(self, number: int, reason: str, seconds: float, epochs: float) -> None:
        self._open[number].set_user_attr("reason", reason)
        self._close(number, TrialState.FAIL, None, seconds, epochs)

    def give_up(self, number: int, reason: str) -> None:
        """Leave a trial whose processes keep dying to the next run, which asks for it first, under its number and at its point.

        What comes after it may depend on its value, so this run asks for nothing more. A trial that was given up by an earlier run too is
        another matter: there may be too little memory for its point, and the search goes on without it.
        """
        trial = self._open.pop(number)
        self.held |= GIVEN_UP not in trial.user_attrs
        trial.set_user_attr(GIVEN_UP, reason)
        self._upload()

    def given_up(self) -> list[str]:
        """Why trials that an earlier run or this one left to the next have not ended, one reason each."""
        return [t.user_attrs[GIVEN_UP] for t in self._asked() if t.state == TrialState.RUNNING and GIVEN_UP in t.user_attrs]

    def _close(self, number: int, state: TrialState, values: Sequence[float] | None, seconds: float, epochs: float) -> None:
        trial = self._open.pop(number)
        trial.set_user_attr("seconds", seconds)
        trial.set_user_attr("epochs", epochs)
        self.study.tell(number, values=list(values) if values is not None else None, state=state)
        if self._budget is not None and self._budget.name not in self.study.user_attrs:
            self._remember_trials()
        self._upload()

    def _remember_trials(self) -> None:
        """Write down how many trials the budget pays for, by the first trial of the study that has a cost."""
        assert self._budget is not None
        for trial in self.study.get_trials(deepcopy=False):
            epochs = trial.user_attrs.get("epochs", 0.0)
            if trial.state.is_finished() and epochs > 0:
                self.study.set_user_attr(self._budget.name, self._budget.trials(trial.user_attrs["seconds"], epochs))
                return

    def _upload(self) -> None:
        self._before_upload()
        upload_journal(self._path)

    def best(self, count: int) -> list[Mapping[str, Any]]:
        """The parameters of the `count` best finished trials, all different.

        With several objectives: of the Pareto front, ordered by the first objective. Where no trial finished, as the one that outdid
        the others failed in the end: the stopped ones, those that came farthest first.
        """
        sign = -1 if self.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
        finished = [t for t in self._asked() if t.state == TrialState.COMPLETE]
        if finished:
            ordered = sorted(self._front(finished), key=lambda t: (sign * t.values[0], t.number))
        else:
            stopped = [t for t in self._asked() if t.state == TrialState.PRUNED and t.last_step is not None]
            ordered = sorted(stopped, key=lambda t: (-(t.last_step or 0), sign * t.values[0], t.number))
        distinct: list[Mapping[str, Any]] = []
        for trial in ordered:
            if trial.params not in distinct:
                distinct.append(trial.params)
        return distinct[:count]

    def _front(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those that no other one beats in every objective; all of them where there is one objective."""
        if len(self.study.directions) == 1:
            return list(trials)
        signs = [-1 if direction == optuna.study.StudyDirection.MAXIMIZE else 1 for direction in self.study.directions]
        costs = [[sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in trials]
        return [trial for trial, cost in zip(trials, costs, strict=True) if not any(_dominates(other, cost) for other in costs)]

    def spent(self) -> Spent:
        trials = self._asked()
        states = [t.state for t in trials]
        return Spent(
            trials=sum(state.is_finished() for state in states),
            failed=states.count(TrialState.FAIL),
            pruned=states.count(TrialState.PRUNED),
            epochs=sum(t.user_attrs.get("epochs", 0.0) for t in trials),
            seconds=sum(t.user_attrs.get("seconds", 0.0) for t in trials),
        )

    def failures(self) -> list[str]:
        """Why trials failed, one reason each."""
        return [t.user_attrs.get("reason", "unknown") for t in self._asked() if t.state == TrialState.FAIL]


def _reason(error: Exception) -> str:
    return "it holds a line that no search has written" if isinstance(error, _FAULTS) else in_one_line(error)


def _dominates(cost: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `cost` is nowhere higher than `other`, and lower somewhere."""
    return all(a <= b for a, b in zip(cost, other, strict=True)) and any(a < b for a, b in zip(cost, other, strict=True))


def walk(axes: Sequence[Parameter], value_of: Callable[[Parameter], Any]) -> dict[str, Any]:
    """A point of a space, by name: the value of each axis that exists there. An axis with a condition stands after the one it looks at."""
    chosen: dict[str, Any] = {}
    for axis in axes:
        when = axis.dimension.when
        if when is None or (when.name in chosen and chosen[when.name] in when.values):
            chosen[axis.name] = value_of(axis)
    return chosen


def defaults(axes: Sequence[Parameter]) -> dict[str, Any]:
    """The point that is tried first."""
    return walk(axes, lambda axis: axis.default)


def _drop_unfinished_line(path: Path) -> None:
    """A write that a full disk or a kill cut off; Optuna would append to it, and never read the journal again."""
    if path.exists() and not (content := read_journal_file(path)).endswith(b"\n"):
        os.truncate(path, len(whole_lines(content)))


def distribution(axis: Parameter) -> BaseDistribution:
    """The Optuna distribution of an axis."""
    dimension = axis.dimension
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    if axis.integer:
        return IntDistribution(math.ceil(dimension.low), math.floor(dimension.high), log=dimension.log, step=int(dimension.step or 1))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def holds(dimension: Dimension, value: Any) -> bool:
    """Whether a default lies where it would be searched."""
    if isinstance(dimension, Range):
        return isinstance(value, int | float) and dimension.low <= value <= dimension.high
    return value in dimension.options
