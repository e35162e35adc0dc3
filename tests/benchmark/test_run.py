"""A whole run in small: both tasks through one path, protocol and seeds as the design says, the shipped experiments readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdbench.benchmark.pair import FIRST_CANDIDATE_SEED, TRIAL_SEED
from kdbench.benchmark.run import profile, run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.cli.pages import profile_page
from kdbench.distributed.cluster import Slots
from kdbench.experiment import Experiment, Runtime, Unit, content_hash, load_experiment
from kdbench.records.store import ResultStore
from kdbench.report.rendering import render
from kdbench.storage.layout import Layout
from kdbench.tasks.build import build_task
from kdbench.training.outcome import rederive
from kdbench.training.work import Work, run_here

ROOT = Path(__file__).parents[2]

SMALL: dict[str, dict[str, Any]] = {
    "classification": {
        "task": {"name": "classification", "data": "fashion_mnist", "val_size": 200, "transfer_size": 200},
        "teacher": {"model": "tiny_cnn", "recipe": {"epochs": 1}},
        "students": [{"name": "tiny_cnn", "width": 4}],
    },
    "segmentation": {
        "task": {"name": "segmentation", "data": {"name": "shapes", "train": 120, "test": 30}, "val_size": 30},
        "teacher": {"model": "small_fcn", "recipe": {"epochs": 1}},
        "students": ["tiny_fcn"],
    },
}


def experiment(task: str, **changes: Any) -> Experiment:
    rest = {
        "name": f"small-{task}",
        "methods": ["none", "kd"],
        "recipe": {"epochs": 2, "batch_size": 20, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "seeds": 2,
        "control_seeds": changes.get("seeds", 2),
    }
    return Experiment.model_validate({**SMALL[task], **rest, **changes})


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    assert load_experiment(path).name


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(SMALL))
def test_teacher_search_finals_and_board_work_for_every_task(task: str, tmp_path: Path, ray: None) -> None:
    search = {"trials": 2, "sampler": "random", "scheduler": "none", "also": {"recipe.lr": {"low": 0.01, "high": 0.1, "log": True}}}
    asked = experiment(task, search=search)
    summary = run(asked, tmp_path, Unwatched())
    assert summary.failures == ()
    assert summary.trained == 1 + 2 * (2 + 2 + 2)  # teacher; per method two trials, two checked on a fresh seed, two finals

    store = ResultStore(tmp_path)
    records = store.scan()
    assert {record.role for record in records} == {"teacher", "candidate", "final"}
    finals = [record for record in records if record.role == "final"]
    assert sorted((record.label, record.seed) for record in finals) == [("kd", 0), ("kd", 1), ("none", 0), ("none", 1)]
    assert {record.seed for record in records if record.role == "candidate"} == {FIRST_CANDIDATE_SEED}
    assert not {0, 1} & {TRIAL_SEED, FIRST_CANDIDATE_SEED}
    assert {record.trials for record in finals} == {2}
    assert all("recipe.lr" in record.params for record in finals)
    assert all(record.test_metric is None for record in records if record.role == "candidate")
    for record in finals:
        assert record.predictions_uri is not None
        assert rederive(record, build_task(asked.task), store.read_bytes(record.predictions_uri)) == record.metrics
        assert record.agreement is not None

    (board,) = boards(records)
    assert board.task == task
    assert {row.label for row in board.rows} == {"none", "kd"}
    (shown,) = json.loads(render([board], "json"))["boards"]
    assert {row["seeds"] for row in shown["rows"]} == {2}

    again = run(asked, tmp_path, Unwatched())
    assert again.trained == 0


def test_more_seeds_train_only_the_new_ones(tmp_path: Path) -> None:
    assert run(experiment("classification", seeds=1), tmp_path, Unwatched()).trained == 1 + 2
    more = run(experiment("classification", seeds=3), tmp_path, Unwatched())
    assert (more.trained, more.found) == (4, 1 + 2)
    (board,) = boards(ResultStore(tmp_path).scan())
    assert {row.seeds for row in board.rows} == {3}


def test_protocols_are_never_mixed(tmp_path: Path) -> None:
    run(experiment("classification"), tmp_path, Unwatched())
    longer = experiment(
        "classification",
        recipe={"epochs": 3, "batch_size": 20, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    )
    run(longer, tmp_path, Unwatched())
    assert len(boards(ResultStore(tmp_path).scan())) == 2


def test_an_explicit_precision_after_an_automatic_run_is_another_protocol(tmp_path: Path) -> None:
    fast = {"epochs": 1, "batch_size": 20, "lr": 0.05}
    automatic = experiment("classification", seeds=1, recipe=fast)
    first = run(automatic, tmp_path, Unwatched())
    assert run(automatic, tmp_path, Unwatched()).trained == 0
    explicit = experiment("classification", seeds=1, recipe={**fast, "precision": "fp64", "memory_format": "channels_last"})
    second = run(explicit, tmp_path, Unwatched())
    assert (first.trained, second.trained) == (3, 3)
    assert first.protocols != second.protocols
    made = ResultStore(tmp_path).scan()
    assert sorted(record.precision for record in made if record.protocol_hash in second.protocols) == ["fp64", "fp64"]
    assert run(automatic, tmp_path, Unwatched()).trained == 0


def test_an_automatic_run_goes_by_the_measurement_of_earlier_code(tmp_path: Path) -> None:
    asked = experiment("classification", seeds=1, methods=["none"], recipe={"epochs": 1, "batch_size": 20, "lr": 0.05})
    assert asked.teacher is not None
    for model in (asked.teacher.model, *asked.students):
        key = content_hash([model.model_dump(mode="json"), asked.task.model_dump(mode="json"), "cpu"])
        (tmp_path / "choices").mkdir(exist_ok=True)
        (tmp_path / "choices" / f"{key}.json").write_text('{"precision": "bf16", "memory_format": "channels_last"}')
    run(asked, tmp_path, Unwatched())
    assert [record.precision for record in ResultStore(tmp_path).scan()] == ["bf16", "bf16"]


def test_an_experiment_without_a_teacher_ranks_teacher_free_methods(tmp_path: Path) -> None:
    alone = experiment("classification", methods=["none", "label_smoothing", "tf_nkd"], teacher=None)
    assert run(alone, tmp_path, Unwatched()).failures == ()
    (board,) = boards(ResultStore(tmp_path).scan())
    assert board.teacher is None
    assert {row.label for row in board.rows} == {"none", "label_smoothing", "tf_nkd"}
    assert all(row.gap_recovered is None for row in board.rows)


def test_a_teacher_from_a_file_is_measured_not_trained(tmp_path: Path) -> None:
    run(experiment("classification"), tmp_path / "first", Unwatched())
    (weights,) = (tmp_path / "first" / "teachers").rglob("model.safetensors")
    given = experiment("classification", teacher={"model": "tiny_cnn", "weights": str(weights)})
    run(given, tmp_path / "second", Unwatched())
    metrics = []
    for folder in ("first", "second"):
        (teacher,) = ResultStore(tmp_path / folder).scan(role="teacher")
        metrics.append((teacher.teacher_sha, teacher.test_metric))
    assert metrics[0] == metrics[1]
    assert teacher.curve == []


def test_a_profile_covers_every_method_and_puts_no_student_on_record(tmp_path: Path) -> None:
    asked = experiment("classification", methods=["none", "kd", "fitnet"])
    profiles = profile(asked, tmp_path, Unwatched())
    assert list(profiles) == ["none", "kd", "fitnet"]
    assert profiles["none"].milliseconds["teacher"] == 0
    assert profiles["kd"].milliseconds["teacher"] > 0
    assert sorted(path.stem for path in (tmp_path / "profiles" / asked.name).iterdir()) == sorted(profiles)
    assert {record.role for record in ResultStore(tmp_path).scan()} == {"teacher"}
    table = profile_page(profiles, 20).splitlines()
    assert [line.split()[0] for line in table] == ["method", *profiles]


def test_ray_is_started_once_for_the_teacher_the_search_and_the_finals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, starts, queues = False, 0, []

    def start(**options: object) -> None:
        nonlocal running, starts
        running, starts = True, starts + 1

    def stop() -> None:
        nonlocal running
        running = False

    def empty(work: Work, layout: Layout, runtime: Runtime, slots: Slots, experiment: str) -> None:
        assert running
        queues.append(type(work).__name__)
        run_here(work, layout)

    monkeypatch.setattr("ray.is_initialized", lambda: running)
    monkeypatch.setattr("ray.init", start)
    monkeypatch.setattr("ray.shutdown", stop)
    monkeypatch.setattr("kdbench.distributed.tune.run_with_tune", empty)
    summary = run(experiment("classification", runtime={"concurrent": 2}), tmp_path, Unwatched())
    assert summary.failures == ()
    assert queues == ["TeacherWork", "InTurn"]
    assert (starts, running) == (1, False)


def test_a_training_keeps_its_key_from_one_version_to_the_next_and_a_range_of_workers_is_another_training() -> None:
    parts = {
        "role": "final",
        "experiment": "test",
        "protocol_hash": "protocol",
        "task": {"name": "classification", "data": "fashion_mnist"},
        "student": "tiny_cnn",
        "method": "kd",
        "recipe": {"epochs": 2},
        "seed": 0,
    }
    keys = {str(workers): Unit.model_validate(parts | {"workers": workers}).key for workers in (1, 2, {"min": 1, "max": 2}, {"max": 2})}
    # Of records that people have. Another key here means that all of their trainings are run again.
    assert (keys["1"], keys["2"]) == ("b469e81a115923cb", "0a2af931f623d1de")
    assert len(set(keys.values())) == 3
