"""The search's memory: exactly as many trials as were asked for, each ended, whatever was killed on the way. No Ray here."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ValidationError

from kdbench.errors import RunFailed, UserError
from kdbench.experiment import Search
from kdbench.search.space import Choice, Parameter, Range, When, space_of
from kdbench.search.study import FIRST_AT_RANDOM, Asha, MethodStudy, derived_seed, drawn_at_random, holds

SAMPLERS: tuple[str, ...] = get_args(Search.model_fields["sampler"].annotation)
LR = Parameter("recipe.lr", Range(0.01, 1.0, log=True), 0.1)
WEIGHT = Parameter("weight", Range(0.0, 2.0), 1.0)
AXES = (LR, WEIGHT)
REPOSITORY = Path(__file__).parents[2]


def open_study(folder: Path, axes: tuple[Parameter, ...] = AXES, **options: Any) -> MethodStudy:
    return MethodStudy(folder / "study.journal", "study", axes, **{"trials": 6, "sampler": "random", "seed": 0} | options)


def score(params: Mapping[str, Any]) -> float:
    """Best at lr 0.3 and weight 1.5."""
    return -abs(params["recipe.lr"] - 0.3) - abs(params.get("weight", 1.5) - 1.5)


def search(study: MethodStudy, count: int | None = None) -> list[dict[str, Any]]:
    """Ask and tell until the study, or `count`, is through; the points that were asked."""
    asked: list[dict[str, Any]] = []
    while not study.done and (count is None or len(asked) < count):
        point = study.ask()
        asked.append(dict(point.params))
        study.complete(point.number, [score(point.params)], 1.0, 2.0)
    return asked


def trials_of(study: MethodStudy) -> list[FrozenTrial]:
    return study.study.trials


def states(study: MethodStudy) -> list[TrialState]:
    return [trial.state for trial in trials_of(study)]


# --- points and their number -----------------------------------------------------------------------------------------


def test_a_derived_seed_is_the_first_32_bits_of_the_hash_of_what_it_is_derived_from() -> None:
    digest = hashlib.sha256(b"(7, 3, 'recipe.lr')").hexdigest()
    assert derived_seed(7, 3, "recipe.lr") == int(digest[:8], 16)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_point_is_the_defaults(tmp_path: Path, sampler: str) -> None:
    assert search(open_study(tmp_path, sampler=sampler), 1) == [{"recipe.lr": 0.1, "weight": 1.0}]


def test_over_several_openings_exactly_as_many_trials_run_as_were_asked_for(tmp_path: Path) -> None:
    for count in (1, 3, 1):
        search(open_study(tmp_path), count)
    assert open_study(tmp_path).missing == 1
    search(open_study(tmp_path))
    again = open_study(tmp_path)
    assert again.done
    assert states(again) == [TrialState.COMPLETE] * 6


def test_a_study_makes_the_folders_that_its_journal_is_to_lie_in(tmp_path: Path) -> None:
    assert search(open_study(tmp_path / "results" / "studies"), 1)
    assert (tmp_path / "results" / "studies" / "study.journal").exists()


@pytest.mark.parametrize(("line", "kind"), [("nonsense", "JSONDecodeError"), ("{}", "KeyError"), ("[]", "TypeError")])
def test_a_line_that_is_no_entry_of_a_journal_is_named_as_damage(tmp_path: Path, line: str, kind: str) -> None:
    search(open_study(tmp_path), 1)
    with (tmp_path / "study.journal").open("a") as journal:
        journal.write(line + "\n")
    with pytest.raises(UserError, match=rf"the journal of a search, .*study\.journal, is damaged \({kind}"):
        open_study(tmp_path)


def test_what_runs_is_not_missing_and_not_done(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=2)
    first, second = study.ask(), study.ask()
    assert study.missing == 0
    assert not study.done
    study.complete(second.number, [0.0], 1.0, 1.0)
    study.fail(first.number, "no reason", 0.0, 0.0)
    assert study.done


def test_a_longer_search_continues_a_shorter_one(tmp_path: Path) -> None:
    short = search(open_study(tmp_path, trials=3))
    rest = search(open_study(tmp_path, trials=5))
    assert short + rest == search(open_study(tmp_path / "at once", trials=5))


def test_a_shorter_search_sees_no_trial_that_it_did_not_ask_for(tmp_path: Path) -> None:
    points = search(open_study(tmp_path, trials=6))
    short = open_study(tmp_path, trials=2)
    assert short.done
    assert short.best(10) == sorted(points[:2], key=score, reverse=True)
    assert short.spent().trials == 2


def test_random_points_depend_on_seed_number_and_name_alone(tmp_path: Path) -> None:
    whole = search(open_study(tmp_path / "whole"))
    parts = [point for count in (2, 1, 3) for point in search(open_study(tmp_path / "parts"), count)]
    one_axis = search(open_study(tmp_path / "one", (LR,)))
    other_seed = search(open_study(tmp_path / "seed", seed=1))
    assert whole == parts
    assert [point["recipe.lr"] for point in whole] == [point["recipe.lr"] for point in one_axis]
    assert len({point["recipe.lr"] for point in whole + other_seed[1:]}) == 11


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_after_an_interruption_as_if_there_had_been_none(tmp_path: Path, sampler: str) -> None:
    options = {"sampler": sampler, "trials": 12}  # tpe and gp begin after ten, cmaes has left its first generation
    whole = search(open_study(tmp_path / "whole", **options))
    parts = [point for count in (1, 4, 5, 2) for point in search(open_study(tmp_path / "parts", **options), count)]
    assert len(whole) == 12
    assert parts == whole
    assert len({point["recipe.lr"] for point in whole}) == 12


def test_qmc_follows_one_sequence_that_the_seed_decides(tmp_path: Path) -> None:
    weights = [point["weight"] for point in search(open_study(tmp_path, trials=9, sampler="qmc"))][1:]
    assert sorted(int(weight / 0.25) for weight in weights) == list(range(8))  # one point in each eighth: what a Sobol sequence is for
    other = search(open_study(tmp_path / "seed", trials=9, sampler="qmc", seed=1))
    assert weights != [point["weight"] for point in other][1:]


def test_tpe_uses_what_it_learned(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=40, sampler="tpe")
    points = search(study)
    early, late = points[1:11], points[-10:]
    assert sum(map(score, late)) / 10 > sum(map(score, early)) / 10 + 0.3


def test_trials_that_run_at_the_same_time_get_different_points(tmp_path: Path) -> None:
    for sampler in SAMPLERS:
        study = open_study(tmp_path / sampler, sampler=sampler)
        points = [study.ask() for _ in range(4)]
        assert len({point.params["recipe.lr"] for point in points}) == 4, sampler
        assert [point.number for point in points] == [0, 1, 2, 3]


# --- killed ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import optuna
from kdbench.search.study import MethodStudy
from kdbench.search.space import Choice, Parameter, Range
axes = AXES
study = MethodStudy(Path(sys.argv[1]) / "study.journal", "study", axes, trials=6, sampler=sys.argv[2], seed=0)
first = study.ask()
study.complete(first.number, [0.0], 1.0, 1.0)
suggested = 0
suggest = optuna.Trial._suggest
def dying(*arguments):
    global suggested
    if suggested == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    suggested += 1
    return suggest(*arguments)
optuna.Trial._suggest = dying
study.ask()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("sampler", "parameters"), [("random", 0), ("random", 1), ("random", 2), ("tpe", 1), ("cmaes", 2)])
def test_a_trial_killed_after_some_of_its_parameters_runs_again_under_its_number_at_its_point(
    tmp_path: Path, sampler: str, parameters: int
) -> None:
    command = [sys.executable, "-c", KILLED.replace("AXES", repr(AXES)), str(tmp_path), sampler, str(parameters)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    study = open_study(tmp_path, sampler=sampler)
    assert states(study) == [TrialState.COMPLETE, TrialState.RUNNING]
    before = dict(trials_of(study)[1].params)
    assert len(before) == parameters
    assert study.missing == 5
    point = study.ask()
    assert point.number == 1
    assert {name: point.params[name] for name in before} == before
    study.complete(1, [0.0], 1.0, 1.0)
    search(study)
    assert states(study) == [TrialState.COMPLETE] * 6
    if sampler == "random":
        assert [trial.params for trial in trials_of(study)] == search(open_study(tmp_path / "undisturbed"))


def test_two_trials_left_running_are_both_run_again(tmp_path: Path) -> None:
    lost = [open_study(tmp_path)]
    points = [lost[0].ask(), lost[0].ask()]
    lost[0].report(points[1].number, 1, 0.5, last=False)
    study = open_study(tmp_path)
    assert [study.ask(), study.ask()] == points
    assert study.missing == 4
    study.report(points[1].number, 1, 0.5, last=False)  # an epoch that is trained again is no second value
    for point in points:
        study.complete(point.number, [0.0], 1.0, 1.0)
    search(study)
    assert states(study) == [TrialState.COMPLETE] * 6


def test_a_killed_drivers_lock_does_not_block(tmp_path: Path) -> None:
    search(open_study(tmp_path), 2)
    lock = tmp_path / "study.journal.lock"
    lock.symlink_to(tmp_path / "study.journal")
    search(open_study(tmp_path))
    assert not lock.is_symlink()


# --- how trials end --------------------------------------------------------------------------------------------------


def test_a_pruned_trial_keeps_its_intermediate_values(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    point = study.ask()
    for epoch, value in ((1, 40.0), (2, 45.0)):
        study.report(point.number, epoch, value, last=False)
    study.prune(point.number, 3.0, 2.0)
    trial = trials_of(open_study(tmp_path))[0]
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 40.0, 2: 45.0}


def test_a_failed_trial_keeps_its_reason_and_its_cost(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.fail(study.ask().number, "the loss became nan", 2.5, 1.0)
    again = open_study(tmp_path)
    assert again.failures() == ["the loss became nan"]
    assert states(again)[0] == TrialState.FAIL
    assert (again.spent().failed, again.spent().seconds, again.spent().epochs) == (1, 2.5, 1.0)
    assert again.missing == 5


def test_a_trial_that_was_given_up_is_asked_for_first_by_the_next_run_and_nothing_comes_in_between(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=3)
    search(study, 1)
    given_up = study.ask()
    study.give_up(given_up.number, "its process died 3 times")
    assert (study.missing, study.done, study.given_up()) == (0, True, ["its process died 3 times"])
    again = open_study(tmp_path, trials=3)
    assert again.ask() == given_up
    assert again.ask().number == 2  # which was never given up
    assert again.given_up() == ["its process died 3 times"]
    again = open_study(tmp_path, trials=3)
    assert again.ask() == given_up
    again.complete(given_up.number, [score(given_up.params)], 1.0, 1.0)
    search(again)
    assert again.given_up() == []
    assert states(again) == [TrialState.COMPLETE] * 3
    undisturbed = open_study(tmp_path / "undisturbed", trials=3)
    search(undisturbed)
    assert [(t.params, t.values) for t in trials_of(again)] == [(t.params, t.values) for t in trials_of(undisturbed)]


def test_a_search_goes_on_without_a_trial_that_two_runs_gave_up_and_every_later_run_tries_it_again(tmp_path: Path) -> None:
    """There may be too little memory for its point."""
    point = None
    for run in range(3):
        study = open_study(tmp_path, trials=3)
        asked = study.ask()
        assert point in (None, asked)
        point = asked
        study.give_up(asked.number, "its process died 3 times")
        assert study.missing == [0, 2, 0][run]
        search(study)
    assert states(study) == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.COMPLETE]
    assert study.done
    assert len(study.best(3)) == 2


def test_what_is_raised_before_an_upload_keeps_it_from_the_store(machine: Any, bucket: str, object_storage: Any) -> None:
    def taken_over() -> None:
        raise RunFailed("another machine took this experiment over")

    path, allowed = machine("here").study("q"), [True]
    study = MethodStudy(path, "q", AXES, trials=3, sampler="random", seed=0, before_upload=lambda: None if allowed[0] else taken_over())
    search(study, 1)
    point = study.ask()
    before, allowed[0] = object_storage.objects(bucket), False
    for write in (
        study.ask,
        lambda: study.complete(point.number, [1.0], 1.0, 1.0),
        lambda: study.give_up(point.number + 1, "its process died"),
    ):
        with pytest.raises(RunFailed):
            write()
    assert object_storage.objects(bucket) == before != {}


def test_spent_adds_up_all_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    search(study, 3)
    study.prune(study.ask().number, 0.5, 1.0)
    study.fail(study.ask().number, "", 0.25, 0.0)
    study.ask()  # which runs, and has cost nothing yet
    spent = open_study(tmp_path).spent()
    assert (spent.trials, spent.failed, spent.pruned, spent.epochs, spent.seconds) == (5, 1, 1, 7.0, 3.75)


# --- successive halving ----------------------------------------------------------------------------------------------


def run_curves(study: MethodStudy, curves: list[list[float]]) -> list[int]:
    """Train each curve to its end or until it is stopped; the epochs that each got."""
    lengths = []
    for curve in curves:
        point = study.ask()
        for epoch, value in enumerate(curve, 1):
            if study.report(point.number, epoch, value, last=epoch == len(curve)):
                study.prune(point.number, 1.0, epoch)
                break
        else:
            study.complete(point.number, [curve[-1]], 1.0, len(curve))
        lengths.append(epoch)
    return lengths


def test_a_trial_is_not_stopped_before_it_may_be_and_then_at_once_where_it_is_worse(tmp_path: Path) -> None:
    study = open_study(tmp_path, asha=Asha(grace_epochs=2, reduction=2))
    assert run_curves(study, [[9.0] * 12, [1.0] * 12]) == [12, 2]
    late = study.ask()
    stopped = [epoch for epoch in range(1, 12) if study.report(late.number, epoch, 1.0, last=False, earliest=7)]
    assert stopped[0] == 7  # the rungs of 2 and 4 epochs are behind it


def test_halving_stops_the_worse_at_rungs_and_never_before_grace(tmp_path: Path) -> None:
    study = open_study(tmp_path, asha=Asha(grace_epochs=3, reduction=2))
    good, bad, middling = [9.0] * 12, [1.0] * 12, [8.0] * 6 + [1.0] * 6
    assert run_curves(study, [good, bad, bad, middling]) == [12, 3, 3, 6]


def test_halving_lets_a_trial_through_that_is_at_its_last_epoch(tmp_path: Path) -> None:
    study = open_study(tmp_path, asha=Asha(grace_epochs=1, reduction=2))
    assert run_curves(study, [[5.0, 6.0, 7.0, 8.0], [6.0, 7.0, 8.0, 1.0]]) == [4, 4]
    assert states(study)[:2] == [TrialState.COMPLETE] * 2


def test_halving_with_a_grace_as_long_as_the_training_stops_nobody(tmp_path: Path) -> None:
    study = open_study(tmp_path, asha=Asha(grace_epochs=4, reduction=2))
    assert run_curves(study, [[9.0] * 4, [1.0] * 4, [0.0] * 4]) == [4, 4, 4]


def test_halving_of_a_cost_stops_the_higher(tmp_path: Path) -> None:
    study = open_study(tmp_path, asha=Asha(grace_epochs=1, reduction=2), directions=["minimize"])
    assert run_curves(study, [[1.0] * 4, [9.0] * 4, [0.5] * 4]) == [4, 1, 4]


def test_without_a_scheduler_nothing_is_stopped(tmp_path: Path) -> None:
    assert run_curves(open_study(tmp_path), [[9.0] * 4, [0.0] * 4]) == [4, 4]


def test_where_the_best_failed_the_stopped_ones_are_what_is_left(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=4, asha=Asha(grace_epochs=1, reduction=2))
    winner = study.ask()
    study.report(winner.number, 1, 9.0, last=False)
    run_curves(study, [[1.0] * 4, [2.0] * 4, [1.5] * 4])
    study.fail(winner.number, "the loss became nan", 0.0, 1.0)
    assert states(study) == [TrialState.FAIL, *[TrialState.PRUNED] * 3]
    trials = trials_of(study)
    assert study.best(2) == [trials[2].params, trials[3].params]


def test_of_the_stopped_those_that_came_farthest_are_first_whatever_they_reached(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=4, asha=Asha(grace_epochs=1, reduction=2))
    curves = {1: [9.0], 3: [1.0, 2.0, 3.0], 2: [2.0, 4.0]}  # by their lengths
    params = {}
    for length, curve in curves.items():
        point = study.ask()
        params[length] = point.params
        for epoch, value in enumerate(curve, 1):
            study.report(point.number, epoch, value, last=False)
        study.prune(point.number, 1.0, length)
    study.prune(study.ask().number, 0.0, 0.0)  # before its first epoch ended
    assert study.best(4) == [params[3], params[2], params[1]]


# --- the best --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "order"), [("maximize", [2, 0, 1]), ("minimize", [1, 0, 2])])
def test_best_is_best_first_in_the_studys_direction(tmp_path: Path, direction: Any, order: list[int]) -> None:
    study = open_study(tmp_path, directions=[direction], trials=5)
    points = [study.ask() for _ in range(5)]
    for point, value in zip(points, [2.0, 1.0, 3.0], strict=False):
        study.complete(point.number, [value], 1.0, 1.0)
    study.prune(points[3].number, 1.0, 1.0)
    study.fail(points[4].number, "", 0.0, 0.0)
    assert study.best(3) == [points[number].params for number in order]
    assert study.best(1) == [points[order[0]].params]


def test_the_best_are_all_different(tmp_path: Path) -> None:
    study = open_study(tmp_path, (Parameter("form", Choice(("kl", "mse")), "kl"),), trials=8)
    points = []
    for value in range(8):
        points.append(study.ask())
        study.complete(points[-1].number, [float(value)], 1.0, 1.0)
    best = study.best(5)
    assert best == [points[-1].params, next(p.params for p in reversed(points) if p.params != points[-1].params)]


def test_a_search_in_which_all_failed_has_no_best(tmp_path: Path) -> None:
    study = open_study(tmp_path, trials=2)
    for _ in range(2):
        study.fail(study.ask().number, "", 0.0, 0.0)
    assert study.best(3) == []


SEVERAL = [sampler for sampler in SAMPLERS if sampler != "cmaes"]


@pytest.mark.parametrize("sampler", SEVERAL)
def test_of_several_objectives_the_best_is_the_pareto_front_by_the_first(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, directions=["maximize", "minimize"], sampler=sampler, trials=12)
    values = [[90.0, 5.0], [80.0, 1.0], [70.0, 2.0], [95.0, 9.0], [95.0, 10.0]]
    points = []
    for value in [*values, *[[1.0, 100.0]] * 7]:
        point = study.ask()
        assert not study.report(point.number, 1, value[0], last=False)
        points.append(point.params)
        study.complete(point.number, value, 1.0, 1.0)
    assert study.best(10) == [points[3], points[0], points[1]]


def test_a_sampler_that_knows_one_objective_is_refused_for_several() -> None:
    with pytest.raises(ValidationError, match="cmaes knows one objective"):
        Search(trials=3, sampler="cmaes", scheduler="none", objectives=("train_seconds",))
    assert Search(trials=3, scheduler="none", objectives=("train_seconds",)).objectives == ("train_seconds",)


# --- spaces ----------------------------------------------------------------------------------------------------------


class Conditional(BaseModel):
    """Written down before what it depends on, as a subclass's field comes after its base's whatever their sense."""

    temperature: Annotated[float, Range(1.0, 8.0, when=When("form", ("kl",)))] = 4.0
    margin: Annotated[float, Range(0.1, 1.0, when=When("form", ("hinge",)))] = 0.5
    form: Annotated[str, Choice(("kl", "hinge"))] = "kl"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_parameter_with_a_condition_is_there_where_the_condition_holds(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, (LR, *space_of(Conditional())), trials=14, sampler=sampler)
    points = search(study)
    assert points[0] == {"recipe.lr": 0.1, "form": "kl", "temperature": 4.0}
    assert {point["form"] for point in points} == {"kl", "hinge"}
    for point in points:
        assert point.keys() == {"recipe.lr", "form", "temperature" if point["form"] == "kl" else "margin"}


def test_a_condition_on_a_pinned_parameter_is_settled(tmp_path: Path) -> None:
    axes = space_of(Conditional(form="hinge"), fixed=frozenset({"form"}))
    assert [axis.name for axis in axes] == ["margin"]
    points = search(open_study(tmp_path, (LR, *axes)))
    assert points[0]["margin"] == 0.5
    assert len({point["margin"] for point in points}) == 6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_choices_may_be_of_any_plain_type_or_none(tmp_path: Path, sampler: str) -> None:
    options = (None, "all", 2, 0.5, False)
    axes = (LR, Parameter("clip", Choice(options), None))
    for count in (7, None):
        points = search(open_study(tmp_path, axes, trials=12, sampler=sampler), count)
        assert all(any(point["clip"] is option or point["clip"] == option for option in options) for point in points)
    found = [trial.params["clip"] for trial in trials_of(open_study(tmp_path, axes, trials=12))]
    assert found[0] is None
    assert len({repr(value) for value in found}) >= 3
    assert {repr(value) for value in found} <= {repr(option) for option in options}


class Whole(BaseModel):
    layers: Annotated[int, Range(0.5, 3.9)] = 2
    views: Annotated[int | None, Range(2, 64, log=True)] = 4
    share: Annotated[float, Range(0.0, 1.0, step=0.25)] = 0.5
    width: Annotated[int, Range(8, 64, step=8)] = 16


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_range_of_whole_numbers_gives_whole_numbers_inside_it(tmp_path: Path, sampler: str) -> None:
    study, points = open_study(tmp_path, space_of(Whole()), trials=12, sampler=sampler), []
    while not study.done:
        point = study.ask()
        points.append(dict(point.params))
        study.complete(point.number, [float(point.params["layers"])], 1.0, 1.0)
    assert points[0] == {"layers": 2, "views": 4, "share": 0.5, "width": 16}
    for params in points:
        assert all(type(params[name]) is int for name in ("layers", "views", "width"))
        assert 1 <= params["layers"] <= 3
        assert 2 <= params["views"] <= 64
        assert params["width"] % 8 == 0
        assert (params["share"] / 0.25).is_integer()


# --- samplers that fall back to random numbers -----------------------------------------------------------------------

A_NUMBER = Parameter("number", Range(0.0, 1.0), 0.5)
ANOTHER = Parameter("another", Range(1.0, 10.0, log=True), 2.0)
OPTIONS = Parameter("options", Choice(("a", "b")), "a")
WITH_THE_DEFAULT = Parameter("with_a", Range(0.0, 1.0, when=When("options", ("a",))), 0.5)
WITHOUT_THE_DEFAULT = Parameter("with_b", Range(0.0, 1.0, when=When("options", ("b",))), 0.5)
SPACES = {
    "one number": (A_NUMBER,),
    "one choice": (OPTIONS,),
    "both": (A_NUMBER, ANOTHER, OPTIONS),
    "a condition that the default meets": (A_NUMBER, OPTIONS, WITH_THE_DEFAULT),
    "a condition that it does not meet": (A_NUMBER, OPTIONS, WITHOUT_THE_DEFAULT),
}


@pytest.fixture
def at_random(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, str]]:
    """(trial, parameter) for each value that one of Optuna's samplers left to random numbers."""
    drawn: set[tuple[int, str]] = set()
    original = RandomSampler.sample_independent

    def spied(self: RandomSampler, study: Any, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        drawn.add((trial.number, name))
        return original(self, study, trial, name, distribution)

    monkeypatch.setattr(RandomSampler, "sample_independent", spied)
    return drawn


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "random"])
def test_exactly_the_axes_that_are_said_to_be_drawn_at_random_are(
    tmp_path: Path, at_random: set[tuple[int, str]], sampler: str, space: str
) -> None:
    axes, first = SPACES[space], FIRST_AT_RANDOM[sampler]
    trials = first + 6
    study = open_study(tmp_path, axes, trials=trials, sampler=sampler)
    while study.missing:
        point = study.ask()
        study.complete(point.number, [float(point.params.get("number", 0.0))], 1.0, 1.0)
    had = [trial.params for trial in trials_of(study)]
    stated = drawn_at_random(sampler, axes, trials)
    for axis in axes:
        # A condition is no hindrance until one trial does not meet it.
        begins = max(first, next((number for number, params in enumerate(had) if axis.name not in params), -1) + 1)
        asked = {number for number in range(begins, trials) if axis.name in had[number]}
        assert asked, axis
        random = {number for number in asked if (number, axis.name) in at_random}
        assert (random == asked) == (axis.name in stated), (axis.name, sorted(asked - random))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "random"])
def test_a_search_that_ends_before_its_sampler_learns_is_said_to_be_random(
    tmp_path: Path, at_random: set[tuple[int, str]], sampler: str
) -> None:
    first = FIRST_AT_RANDOM[sampler]
    study = open_study(tmp_path, SPACES["both"], trials=first + 1, sampler=sampler)
    while study.missing:
        point = study.ask()
        study.complete(point.number, [float(point.params["number"])], 1.0, 1.0)
    numeric = {(number, "number") for number in range(1, first)}
    assert numeric == {drawn for drawn in at_random if drawn[1] == "number" and drawn[0] < first}
    if first > 1:
        assert set(drawn_at_random(sampler, SPACES["both"], first)) == {"number", "another", "options"}
    assert "number" not in drawn_at_random(sampler, SPACES["both"], first + 1)
    assert drawn_at_random(sampler, SPACES["both"], 1) == ()


def test_random_search_is_what_was_asked_for() -> None:
    assert drawn_at_random("random", SPACES["both"], 3) == ()


def test_a_default_lies_in_a_range_with_its_ends_or_among_the_options() -> None:
    inside, outside = [1, 1.0, 2.5, 3], [0.99, 3.01, "2", None]
    assert [value for value in inside + outside if holds(Range(1, 3), value)] == inside
    assert [value for value in ("kl", "mse", None) if holds(Choice(("kl", None)), value)] == ["kl", None]
