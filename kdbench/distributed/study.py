"""The search's memory: one persistent Optuna study per method owns all state, so that a killed search is a paused one.

Nothing here knows of Ray. A trial that a killed driver left RUNNING is run again under its own number and its own parameters,
so a search that was asked for N trials holds exactly N, whatever happened on the way.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kdbench.errors import UserError, in_one_line
from kdbench.search_space import Choice, Dimension, Parameter, Range

optuna.logging.set_verbosity(optuna.logging.ERROR)


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


def make_sampler(name: str, seed: int) -> BaseSampler:
    """Optuna's samplers under the names an experiment uses."""
    samplers = optuna.samplers
    makers: dict[str, Any] = {
        "tpe": lambda: samplers.TPESampler(seed=seed),
        "random": lambda: KeyedRandomSampler(seed),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "qmc": lambda: samplers.QMCSampler(seed=seed),
        "nsgaii": lambda: samplers.NSGAIISampler(seed=seed),
        "nsgaiii": lambda: samplers.NSGAIIISampler(seed=seed),
    }
    return makers[name]()


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


class MethodStudy:
    """Ask for points, tell how they went; every answer is on disk before the call returns."""

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
        epochs: int = 1,
    ) -> None:
        """Open the study `name` in the journal at `path`, or begin it with the axes' defaults as its first point.

        The caller holds the experiment's lock: a lock left in the journal's folder is a killed driver's, and is removed, as is a line
        that it began and did not end. Raises UserError where the journal is damaged otherwise.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        self.axes = tuple(axes)
        self.trials = trials
        self.epochs = epochs
        self._sampler, self._seed, self._asha = sampler, seed, asha
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if asha is not None:
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=asha.grace_epochs, reduction_factor=asha.reduction)
        _drop_unfinished_line(path)
        try:
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name=name,
                load_if_exists=True,
                directions=list(directions),
                pruner=pruner,
            )
        except (ValueError, KeyError, TypeError) as error:  # what reading a line that Optuna did not write ends in
            raise UserError(
                f"the journal of a search, {path}, is damaged ({in_one_line(error)}): "
                "restore it from a copy, or delete it to have that search run again"
            ) from error
        if not self.study.trials:
            self.study.enqueue_trial({axis.name: axis.default for axis in self.axes if axis.dimension.when is None})
        self._abandoned = [t for t in self.study.trials if t.state == TrialState.RUNNING]
        self._open: dict[int, optuna.Trial] = {}

    @property
    def missing(self) -> int:
        """How many trials are still to be started."""
        begun = sum(t.state != TrialState.WAITING for t in self.study.get_trials(deepcopy=False))
        return max(0, self.trials - begun) + len(self._abandoned)

    @property
    def done(self) -> bool:
        return self.missing == 0 and not self._open

    def ask(self) -> Point:
        """The next point: one that a killed driver left running, else a new one from the sampler."""
        if self._abandoned:
            abandoned = self._abandoned.pop(0)
            self.study.sampler = make_sampler(self._sampler, derived_seed(self._seed, abandoned.number))
            trial = optuna.Trial(self.study, abandoned._trial_id)  # optuna has no public way to take up a RUNNING trial
        else:
            number = sum(t.state != TrialState.WAITING for t in self.study.get_trials(deepcopy=False))
            self.study.sampler = make_sampler(self._sampler, derived_seed(self._seed, number))
            trial = self.study.ask()
        self._open[trial.number] = trial
        return Point(trial.number, self._suggest(trial))

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for axis in self.axes:
            when = axis.dimension.when
            if when is None or chosen.get(when.name) in when.values:
                chosen[axis.name] = trial._suggest(axis.name, distribution(axis))
        return chosen

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Keep an intermediate value; True where the trial should stop now. The last epoch never stops a trial."""
        if len(self.study.directions) > 1:
            return False
        trial = self._open[number]
        if epoch not in trial.study.get_trials(deepcopy=False)[number].intermediate_values:
            trial.report(value, epoch)
        return self._asha is not None and epoch < self.epochs and trial.should_prune()

    def complete(self, number: int, values: Sequence[float], seconds: float, epochs: float) -> None:
        self._close(number, TrialState.COMPLETE, values, seconds, epochs)

    def prune(self, number: int, seconds: float, epochs: float) -> None:
        self._close(number, TrialState.PRUNED, None, seconds, epochs)

    def fail(self, number: int, reason: str) -> None:
        self._open[number].set_user_attr("reason", reason)
        self._close(number, TrialState.FAIL, None, 0.0, 0.0)

    def _close(self, number: int, state: TrialState, values: Sequence[float] | None, seconds: float, epochs: float) -> None:
        trial = self._open.pop(number)
        trial.set_user_attr("seconds", seconds)
        trial.set_user_attr("epochs", epochs)
        self.study.tell(number, values=list(values) if values is not None else None, state=state)

    def best(self, count: int) -> list[Mapping[str, Any]]:
        """The parameters of the `count` best finished trials, all different.

        With several objectives: of the Pareto front, ordered by the first objective.
        """
        finished = [t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if len(self.study.directions) > 1:
            finished = [t for t in self.study.best_trials if t.state == TrialState.COMPLETE]
        sign = -1 if self.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
        ordered = sorted(finished, key=lambda t: (sign * t.values[0], t.number))
        distinct: list[Mapping[str, Any]] = []
        for trial in ordered:
            if trial.params not in distinct:
                distinct.append(trial.params)
        return distinct[:count]

    def spent(self) -> Spent:
        trials = self.study.get_trials(deepcopy=False)
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
        return [t.user_attrs.get("reason", "unknown") for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.FAIL]


def _drop_unfinished_line(path: Path) -> None:
    """A write that a full disk or a kill cut off; Optuna would append to it, and never read the journal again."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


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
