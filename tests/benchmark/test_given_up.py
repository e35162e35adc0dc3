"""What was given up as its processes kept dying: nothing follows from it, and the same command ends at the undisturbed board."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from kdbench.benchmark import emptying
from kdbench.benchmark.run import Summary, run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.training import work

EXPERIMENT = Experiment.model_validate(
    {
        "name": "given-up",
        "task": {"name": "classification", "data": {"name": "shapes", "train": 60, "test": 20, "target": "class"}, "val_size": 20},
        "students": [{"name": "tiny_cnn", "width": 2}],
        "methods": ["none", "label_smoothing"],
        "recipe": {"epochs": 1, "batch_size": 20, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "search": {"trials": 3, "sampler": "tpe", "scheduler": "none", "top_k": 2, "also": {"recipe.lr": {"low": 0.01, "high": 0.3}}},
        "seeds": 2,
        "control_seeds": 2,
    }
)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, whose part ends where a unit is given up."""
    monkeypatch.setattr(emptying, "needs_ray", lambda *_: False)


def dying(monkeypatch: pytest.MonkeyPatch, folder: Path, dies: Callable[[Unit], bool]) -> Summary:
    """A run in which the processes of some units keep dying."""
    attempt = work.attempt
    with monkeypatch.context() as here:
        here.setattr(work, "attempt", lambda unit, *rest: work.given_up(unit.title, "its process") if dies(unit) else attempt(unit, *rest))
        return run(EXPERIMENT, folder, Unwatched())


def on_record(folder: Path) -> list[tuple[Any, ...]]:
    return sorted((r.label, r.role, r.seed, str(r.params), str(r.metrics), r.val_metric, r.trials) for r in ResultStore(folder).scan())


def finals(folder: Path) -> list[RunRecord]:
    return sorted(ResultStore(folder).scan(role="final"), key=lambda record: (record.label, record.seed))


def trials(folder: Path) -> list[list[tuple[int, str, dict[str, Any], float | None]]]:
    found = []
    for journal in (folder / "studies").glob("*.journal"):
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        asked = optuna.load_study(study_name=None, storage=storage).trials
        found.append([(trial.number, trial.state.name, trial.params, trial.value) for trial in asked])
    return sorted(found, key=str)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as here:
        here.setattr(emptying, "needs_ray", lambda *_: False)
        assert run(EXPERIMENT, folder, Unwatched()).failures == ()
    return folder


@pytest.mark.parametrize(
    ("title", "left"),
    [
        ("none trial 0", []),  # of `none`, which finals the first run leaves
        ("none trial 2", []),
        ("none check seed 2000000", []),
        ("none seed 1", [0]),
    ],
)
def test_the_same_command_ends_at_the_undisturbed_board(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, left: list[int]
) -> None:
    summary = dying(monkeypatch, tmp_path, lambda unit: unit.title == title)
    assert {reason.partition(":")[0] for reason in summary.failures} == {title}
    assert [(record.label, record.seed) for record in finals(tmp_path)] == [
        *(("label_smoothing", seed) for seed in (0, 1)),
        *(("none", seed) for seed in left),
    ]
    assert run(EXPERIMENT, tmp_path, Unwatched()).failures == ()
    assert trials(tmp_path) == trials(undisturbed)
    assert on_record(tmp_path) == on_record(undisturbed)


def test_a_point_that_two_runs_gave_up_does_not_hold_up_the_search_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(unit: Unit) -> bool:
        return unit.title == "none trial 1"

    assert len(dying(monkeypatch, tmp_path, dies).failures) == 1
    for _ in range(2):
        assert len(dying(monkeypatch, tmp_path, dies).failures) == 1
        assert [(record.label, record.trials) for record in finals(tmp_path)] == [("label_smoothing", 3)] * 2 + [("none", 2)] * 2
    assert run(EXPERIMENT, tmp_path, Unwatched()).failures == ()
    assert {state for study in trials(tmp_path) for _, state, _, _ in study} == {"COMPLETE"}


def test_where_every_trial_is_given_up_no_final_is_put_on_record_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(4):
        dying(monkeypatch, tmp_path, lambda unit: unit.role == "trial")
    assert {state for study in trials(tmp_path) for _, state, _, _ in study} == {"RUNNING"}
    assert on_record(tmp_path) == []
