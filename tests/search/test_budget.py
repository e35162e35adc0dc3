"""A search with a budget: how many trials it has follows from what the first one cost, once, and for a killed search too."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdbench.experiment import Budget
from kdbench.search.space import Parameter, Range
from kdbench.search.study import MethodStudy, TrialBudget

AXES = (Parameter("recipe.lr", Range(0.01, 1.0, log=True), 0.1, False),)
NAME = "trials within 100 epochs"


def opened(path: Path, trials: int = 20, asked: list[tuple[float, float]] | None = None) -> MethodStudy:
    def count(seconds: float, epochs: float) -> int:
        if asked is not None:
            asked.append((seconds, epochs))
        return int(100 / seconds)

    budget = TrialBudget(NAME, count)
    return MethodStudy(path / "s.journal", "s", AXES, trials=trials, sampler="random", seed=0, budget=budget)


def test_until_the_first_trial_has_a_cost_no_other_one_is_asked_for(tmp_path: Path) -> None:
    study = opened(tmp_path)
    assert (study.trials, study.missing) == (1, 1)
    first = study.ask()
    assert (study.missing, study.done) == (0, False)
    study.complete(first.number, [1.0], seconds=25.0, epochs=5.0)
    assert (study.trials, study.missing, study.done) == (4, 3, False)


def test_the_number_is_kept_and_a_killed_search_goes_on_to_it(tmp_path: Path) -> None:
    study, asked = opened(tmp_path), []
    study.complete(study.ask().number, [1.0], seconds=25.0, epochs=5.0)
    study.ask()
    again = opened(tmp_path, asked=asked)
    assert (again.trials, again.missing) == (4, 3)  # one was left running
    for _ in range(3):
        again.complete(again.ask().number, [2.0], seconds=1.0, epochs=5.0)
    assert again.done
    assert asked == [], "the cost of later trials does not count"


def test_a_trial_that_failed_at_once_has_no_cost(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.fail(study.ask().number, "no", seconds=0.5, epochs=0.0)
    assert (study.trials, study.missing) == (2, 1)
    study.prune(study.ask().number, seconds=50.0, epochs=1.0)
    assert (study.trials, study.done) == (2, True)


def test_a_search_has_at_most_the_trials_that_were_asked_for(tmp_path: Path) -> None:
    study = opened(tmp_path, trials=3)
    study.complete(study.ask().number, [1.0], seconds=1.0, epochs=5.0)
    assert study.trials == 3
    assert opened(tmp_path, trials=200).trials == 100


@pytest.mark.parametrize(
    ("budget", "seconds", "epochs", "trials"),
    [
        (Budget(epochs=200), 99.0, 2.0, 20),  # a trial has 10 epochs, whatever was trained of it
        (Budget(epochs=5), 99.0, 10.0, 1),
        (Budget(device_hours=0.5), 180.0, 10.0, 5),  # two workers: 0.1 device-hours
        (Budget(device_hours=0.5), 18.0, 1.0, 5),  # stopped after a tenth of its epochs
        (Budget(device_hours=0.01), 3600.0, 10.0, 1),
        (Budget(device_hours=1e9), 0.0, 10.0, 10**18),
    ],
)
def test_what_a_budget_pays_for(budget: Budget, seconds: float, epochs: float, trials: int) -> None:
    assert budget.trials(seconds, epochs, whole=10, workers=2) == trials


def test_a_study_that_was_begun_without_a_budget_has_the_trials_that_its_first_one_pays_for(tmp_path: Path) -> None:
    plain = MethodStudy(tmp_path / "s.journal", "s", AXES, trials=6, sampler="random", seed=0)
    for number in range(6):
        plain.complete(plain.ask().number, [float(number)], seconds=25.0 + number, epochs=5.0)
    study = opened(tmp_path)
    assert (study.trials, study.missing, study.spent().trials) == (4, 0, 4)
    assert study.done
    assert opened(tmp_path, trials=3).trials == 3
