"""How many finals a run trains: more for the controls, more until rows are decided, finals of several searches; and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.deploy.verification import verify
from kdbench.experiment import Experiment, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore

SMALL: dict[str, Any] = {
    "name": "small",
    "task": {"name": "classification", "data": "fashion_mnist", "val_size": 100, "transfer_size": 100},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none", "label_smoothing", {"name": "kd", "label": "kd"}],
    "teacher": {"model": "tiny_cnn", "recipe": {"epochs": 1}},
    "recipe": {"epochs": 1, "batch_size": 20, "precision": "fp32", "memory_format": "contiguous", "compile": False},
}
UNTIL = {"start": 2, "max": 4, "until": "decided"}


def small(**changes: Any) -> Experiment:
    return Experiment.model_validate({**SMALL, **changes})


def finals(results: Path) -> list[RunRecord]:
    return ResultStore(results).scan(role="final")


def seeds_of(results: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for record in finals(results):
        found.setdefault(record.label, []).append(record.seed)
    return {label: sorted(seeds) for label, seeds in found.items()}


@pytest.mark.parametrize(
    ("changes", "controls", "others"),
    [({"seeds": 2}, 4, 2), ({"seeds": 1}, 1, 1), ({"seeds": 2, "control_seeds": 3}, 3, 2), ({"seeds": 2, "control_seeds": 2}, 2, 2)],
)
def test_none_and_kd_have_more_seeds_than_the_others(tmp_path: Path, changes: dict[str, Any], controls: int, others: int) -> None:
    run(small(**changes), tmp_path, Unwatched())
    assert seeds_of(tmp_path) == {"none": [*range(controls)], "kd": [*range(controls)], "label_smoothing": [*range(others)]}
    [board] = boards(finals(tmp_path))
    assert all(row.rank is not None for row in board.rows)
    assert any("have" in note and "more seeds, which differences use" in note for note in board.notes) == (controls > others)


def test_the_number_of_seeds_changes_no_training(tmp_path: Path) -> None:
    """Finals of the same seeds are found, whatever plan they were made under."""
    run(small(seeds=2), tmp_path, Unwatched())
    for changes in ({"seeds": 2, "control_seeds": 2}, {"seeds": 1}, {"seeds": UNTIL | {"max": 2}}):
        assert run(small(**changes), tmp_path, Unwatched()).trained == 0
    assert run(small(seeds=3, control_seeds=4), tmp_path, Unwatched()).trained == 1


class Killed(Exception):
    pass


class Killing(Unwatched):
    """Ends the run after so many trainings."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.notes: list[str] = []

    def finished(self, unit: Unit, record: RunRecord) -> None:
        self.left -= 1
        if not self.left:
            raise Killed

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.slow
def test_seeds_are_added_to_undecided_rows_alone_and_a_killed_run_goes_on_to_the_same(tmp_path: Path) -> None:
    """What is decided after two seeds stays at two; every number of finals in between leads to the same ones."""
    hopeless = {"name": "kd", "label": "hopeless", "task_weight": 0.0, "kd_weight": 0.0}
    recipe, task = {**SMALL["recipe"], "epochs": 3}, {**SMALL["task"], "transfer_size": 500}
    asked = small(methods=["none", "kd", "label_smoothing", hopeless], seeds=UNTIL, recipe=recipe, task=task)
    whole = Killing(after=0)
    run(asked, tmp_path / "whole", whole)
    seeds = seeds_of(tmp_path / "whole")
    assert seeds == {"none": [0, 1, 2, 3], "kd": [0, 1, 2, 3], "label_smoothing": [0, 1, 2, 3], "hopeless": [0, 1]}
    made = sum(map(len, seeds.values()))
    assert f"tiny_cnn: decided after {made} finals; 4 seeds of every method are 16" in whole.notes

    for after in (8, 11):
        folder = tmp_path / f"killed-{after}"
        with pytest.raises(Killed):
            run(asked, folder, Killing(after))
        run(asked, folder, Unwatched())
        assert seeds_of(folder) == seeds
        assert sorted(r.test_metric for r in finals(folder)) == sorted(r.test_metric for r in finals(tmp_path / "whole"))


@pytest.mark.slow
def test_every_search_of_a_method_has_finals_of_its_own(tmp_path: Path) -> None:
    search = {"trials": 2, "sampler": "random", "scheduler": "none", "studies": 3, "top_k": 1}
    search |= {"also": {"recipe.lr": {"low": 0.001, "high": 1.0, "log": True}}}
    asked = small(methods=["none", "kd"], seeds=2, search=search, recipe={**SMALL["recipe"], "lr": 0.001})
    summary = run(asked, tmp_path, Unwatched())

    assert seeds_of(tmp_path) == {"none": [0, 1, 2, 3, 4, 5], "kd": [0, 1, 2, 3, 4, 5]}
    assert {(record.search_number, record.seed // 2) for record in finals(tmp_path)} == {(0, 0), (1, 1), (2, 2)}
    assert len({record.study_id for record in finals(tmp_path)}) == 6
    assert len({record.params["recipe.lr"] for record in finals(tmp_path) if record.label == "kd"}) > 1, "searches that differ"
    assert set(summary.tuned["tiny_cnn"]) == {"none", "none, search 2", "none, search 3", "kd", "kd, search 2", "kd, search 3"}

    [board] = boards(finals(tmp_path))
    assert board.notes[0].startswith("3 searches a method, 2 finals each")
    assert any("between searches sd" in note and "between seeds" in note for note in board.notes)
    assert all(row.rank is not None and row.seeds == 6 for row in board.rows)
    assert run(asked, tmp_path, Unwatched()).trained == 0


@pytest.mark.slow
def test_a_budget_gives_dear_trials_a_smaller_number_and_the_board_says_so(tmp_path: Path) -> None:
    """Of 5 epochs, trials of 2 epochs are paid twice; the number is in the study, so the same command trains nothing more."""
    search = {"trials": 9, "budget": {"epochs": 5}, "sampler": "random", "scheduler": "none", "top_k": 1}
    search |= {"also": {"recipe.lr": {"low": 0.001, "high": 1.0, "log": True}}}
    asked = small(methods=["none", "kd"], seeds=1, search=search, recipe={**SMALL["recipe"], "epochs": 2})
    run(asked, tmp_path, Unwatched())
    assert {(record.trials, record.search_budget["epochs"]) for record in finals(tmp_path) if record.search_budget} == {(2, 5.0)}
    [board] = boards(finals(tmp_path))
    assert "search: 5 epochs a method (none, random), which are trials: kd 2, none 2" in board.notes[0]
    assert run(asked, tmp_path, Unwatched()).trained == 0


@pytest.mark.slow
def test_the_published_defaults_stand_below_the_board_and_change_nothing_on_it(tmp_path: Path) -> None:
    search = {"trials": 3, "sampler": "random", "scheduler": "none", "top_k": 1}
    search |= {"also": {"recipe.lr": {"low": 0.001, "high": 1.0, "log": True}}}
    asked = {"methods": ["none", "kd"], "seeds": 2, "control_seeds": 2, "recipe": {**SMALL["recipe"], "lr": 0.001}}
    run(small(**asked, search=search), tmp_path, Unwatched())
    [before] = boards(finals(tmp_path))

    more = small(**asked, search=search | {"defaults": True})
    assert run(more, tmp_path, Unwatched()).trained == 4
    assert run(more, tmp_path, Unwatched()).trained == 0
    [board] = boards(finals(tmp_path))
    assert board.rows == before.rows
    assert {(row.label, row.seeds) for row in board.beside} == {("none", 2), ("kd", 2)}
    for row in board.beside:
        assert row.params["recipe.lr"] == 0.001, "the recipe's own value"
        tuned = board.row(row.label)
        assert tuned is not None
        at_default = {r.seed: r.test_metric for r in finals(tmp_path) if r.label == f"{row.label}@default"}
        assert row.ahead[0] == pytest.approx(sum(tuned.values[seed] - value for seed, value in at_default.items()) / 2)
        assert any(note.startswith(f"{row.label} at its published default: ") and "uncorrected" in note for note in board.notes)
    assert not set(board.notes) & {note for note in before.notes if "published default" in note}
    assert verify(tmp_path).problems == ()


@pytest.mark.slow
def test_the_undistilled_student_is_trained_for_what_the_best_method_took(tmp_path: Path) -> None:
    """As many epochs as were written down before the first of these trainings, whatever later runs would measure."""
    asked = {"methods": ["none", "kd", "label_smoothing"], "seeds": 2, "control_seeds": 2}
    run(small(**asked), tmp_path, Unwatched())
    [before] = boards(finals(tmp_path))

    matched, killed = small(**asked, cost_control=True), Killing(after=1)
    with pytest.raises(Killed):
        run(matched, tmp_path, killed)
    [told] = [note for note in killed.notes if note.startswith("none@cost: ")]
    epochs = int(told.split()[1])
    hours = {record.label: record.device_hours or 0.0 for record in ResultStore(tmp_path).scan() if record.role == "teacher"}
    kd, none = ([record for record in finals(tmp_path) if record.label == label] for label in ("kd", "none"))
    at_least = (sum(hours.values()) + sum(record.device_hours or 0.0 for record in kd)) / max(r.device_hours or 0.0 for r in none)
    assert min(int(at_least), 50) <= epochs <= 50, "the cache comes on top"
    assert run(matched, tmp_path, Unwatched()).trained == 1
    assert run(matched, tmp_path, Unwatched()).trained == 0

    longer = [record for record in finals(tmp_path) if record.label == "none@cost"]
    assert {(r.seed, r.recipe["epochs"], r.beside, r.beside_of, len(r.curve)) for r in longer} == {
        (0, epochs, "cost", "kd", epochs),
        (1, epochs, "cost", "kd", epochs),
    }
    [board] = boards(finals(tmp_path))
    assert board.rows == before.rows
    assert [(row.kind, row.label, row.seeds, row.cut) for row in board.beside] == [("cost", "kd", 2, epochs == 50)]
    cut = ", cut at 50 times its epochs" if epochs == 50 else ""
    said = f"the undistilled student trained for what teacher, cache, search and finals of kd took ({epochs} epochs{cut}): "
    assert any(note.startswith(said) for note in board.notes)
    assert verify(tmp_path).problems == ()
