"""A search as its study remembers it: trials, the best so far, and which parameters mattered. Reads the journal and never touches it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from kdbench.bounded import parse_json
from kdbench.errors import in_one_line
from kdbench.storage.journals import whole_lines

optuna.logging.set_verbosity(optuna.logging.ERROR)

FEWEST_FOR_IMPORTANCE, ENOUGH_FOR_IMPORTANCE = 5, 50  # finished trials; Optuna's documentation asks for five in the best tenth
_STATES: dict[TrialState, State] = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}

State = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One point that was tried. value: of the first objective; of a trial that was stopped early the last one that it reported."""

    number: int
    state: State
    value: float | None
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Search:
    """The trials of one method, in their order. importance: by parameter, adding up to 1; empty where `remark` says why not."""

    trials: tuple[Trial, ...]
    best: tuple[float | None, ...]  # the best finished value up to each trial
    importance: Mapping[str, float]
    remark: str | None


def read_search(journal: bytes, study_id: str, trials: int | None) -> Search | str:
    """The first `trials` trials of a study, all of them for None, or a sentence that says why there is nothing to see."""
    try:
        return _read(journal, study_id, trials)
    except Exception as error:  # whatever replaying lines that Optuna did not write ends in
        return f"The journal of the search is damaged ({in_one_line(error)})."


def _read(journal: bytes, study_id: str, trials: int | None) -> Search | str:
    study = optuna.load_study(study_name=study_id, storage=JournalStorage(_Lines(journal)))
    asked = [trial for trial in study.get_trials(deepcopy=False)[:trials] if trial.state in _STATES]
    if not asked:
        return "The search has no finished trial."
    higher = study.directions[0] == StudyDirection.MAXIMIZE
    found = tuple(Trial(t.number, _STATES[t.state], _value(t), dict(t.params)) for t in asked)
    importance, remark = _importance(study, asked)
    return Search(found, tuple(_best_so_far(found, higher)), importance, remark)


class _Lines(BaseJournalBackend):
    """The journal as it was when it was read. Optuna's own backend would make a missing file, and take a lock to write."""

    def __init__(self, content: bytes) -> None:
        self._logs = [parse_json(line) for line in whole_lines(content).splitlines()]

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError("a report only reads")


def _value(trial: FrozenTrial) -> float | None:
    values = trial.values or []
    value = values[0] if values else trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
    return value if value is not None and math.isfinite(value) else None


def _best_so_far(trials: tuple[Trial, ...], higher: bool) -> Iterator[float | None]:
    best: float | None = None
    for trial in trials:
        if trial.state == "complete" and trial.value is not None:
            best = trial.value if best is None else max(best, trial.value) if higher else min(best, trial.value)
        yield best


def _importance(study: optuna.Study, asked: list[FrozenTrial]) -> tuple[Mapping[str, float], str | None]:
    """Optuna's own evaluation (PED-ANOVA: what the best tenth of the trials has in common) of the trials that this search asked for."""
    complete = [trial for trial in asked if trial.state == TrialState.COMPLETE]
    varied = {name for trial in complete for name, value in trial.params.items() if value != complete[0].params.get(name)}
    if len(complete) < FEWEST_FOR_IMPORTANCE or not varied:
        return {}, f"{len(complete)} finished trial{'' if len(complete) == 1 else 's'}: too few to say which parameter mattered."
    # One objective, the first: given a function instead, the evaluation would take lower for better whatever the study's direction.
    first = optuna.create_study(direction=study.directions[0])
    for trial in complete:
        first.add_trial(
            optuna.trial.create_trial(
                params=trial.params, distributions=trial.distributions, value=trial.values[0], intermediate_values=trial.intermediate_values
            )
        )
    try:
        found = optuna.importance.get_param_importances(first, params=sorted(varied))
    except (ValueError, RuntimeError) as error:
        return {}, f"Optuna could not weigh the parameters ({in_one_line(error)})."
    firm = len(complete) >= ENOUGH_FOR_IMPORTANCE
    return found, None if firm else f"From {len(complete)} finished trials: a hint. {ENOUGH_FOR_IMPORTANCE} make it firm."
