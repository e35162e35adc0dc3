"""What teachers and students learn from, through whole runs: noise, few labels, further parts, classes for the teacher, another task."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdbench.benchmark.dry_run import dry_run
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.board import Board
from kdbench.boards.leaderboard import boards
from kdbench.deploy.export import export
from kdbench.deploy.verification import verify
from kdbench.errors import UserError
from kdbench.experiment import Experiment
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tasks.build import build_task

DATA: dict[str, Any] = {"name": "shapes", "target": "class", "train": 120, "test": 40, "size": 16}
ASKED: dict[str, Any] = {
    "name": "samples",
    "task": {"name": "classification", "data": DATA, "val_size": 20},
    "teacher": {"model": {"name": "tiny_cnn", "width": 6}, "recipe": {"epochs": 3}},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none", "kd"],
    "recipe": {
        "epochs": 2,
        "batch_size": 20,
        "lr": 0.05,
        "weight_decay": 0.0,
        "precision": "fp32",
        "memory_format": "contiguous",
        "compile": False,
        "augment": {"crop": 2, "flip": True},
        "views": 2,
    },
    "seeds": 2,
}
OTHER: dict[str, Any] = {"name": "classification", "data": {**DATA, "size": 24, "seed": 9}, "val_size": 20}


class Noting(Unwatched):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def experiment(changes: dict[str, Any] | None = None) -> Experiment:
    """ASKED with dotted keys changed."""
    asked = deepcopy(ASKED)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        place = asked
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return Experiment.model_validate({"control_seeds": asked["seeds"], **asked})


def ran(changes: dict[str, Any], folder: Path) -> tuple[Board, dict[str, list[RunRecord]]]:
    """The board, and the records by label. All figures are those of the files, and the same command again trains nothing."""
    asked = experiment(changes)
    dry_run(asked)
    summary = run(asked, folder, Unwatched())
    assert summary.failures == ()
    records = ResultStore(folder).scan()
    assert run(asked, folder, Unwatched()).trained == 0
    (board,) = boards(records)
    by_label: dict[str, list[RunRecord]] = {}
    for record in records:
        by_label.setdefault(record.label, []).append(record)
    return board, by_label


def verified(folder: Path, records: int) -> None:
    found = verify(folder)
    assert (found.problems, found.left_out) == ((), ())
    assert (found.records, found.derived, found.keyed) == (records, records, records)


@pytest.mark.parametrize("budget", [8.0, 0.0], ids=["cached", "live"])
def test_on_noise_none_stays_as_it_began_and_kd_learns_from_the_teacher(tmp_path: Path, budget: float) -> None:
    places = {"student_taps": ["stage:-1"], "teacher_taps": ["stage:-1"]}
    methods = ["none", "kd", {"name": "at", **places}]
    board, records = ran({"task.transfer": "noise", "task.transfer_size": 60, "methods": methods, "cache": {"budget_gb": budget}}, tmp_path)
    assert {row.label for row in board.rows} == {"none", "kd", "at"}
    for record in records["none"]:
        assert {row["train_total"] for row in record.curve} == {0.0}
        assert record.test_metric is not None
        assert record.chance_metric is not None
        assert record.test_metric <= record.chance_metric
    for label in ("kd", "at"):
        curve = [row for record in records[label] for row in record.curve]
        assert all(row["train_total"] > 0 and "train_cross_entropy" not in row for row in curve)
    assert all(row["train_total"] == pytest.approx(row["train_kd"]) for record in records["kd"] for row in record.curve)
    (teacher,) = records["teacher"]
    assert all("train_cross_entropy" in row for row in teacher.curve)  # which learns from the labelled images
    assert all((record.agreement is not None) == (budget > 0) for record in records["kd"])
    verified(tmp_path, 7)


@pytest.mark.parametrize(
    "changes", [{"task.transfer": "noise", "task.transfer_size": 40}, {"task.labelled": 30}], ids=["noise", "labelled"]
)
def test_what_students_alone_see_makes_no_other_teacher(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(experiment({"seeds": 1}), tmp_path, Unwatched())
    summary = run(experiment({"seeds": 1, **changes}), tmp_path, Unwatched())
    assert (summary.trained, summary.found) == (2, 1), "two students, and the teacher of before"
    assert len([record for record in ResultStore(tmp_path).scan() if record.role == "teacher"]) == 1
    verified(tmp_path, 5)


def test_few_labels_count_in_the_loss_and_all_samples_in_distillation(tmp_path: Path) -> None:
    board, records = ran({"task.labelled": 30}, tmp_path)
    assert {row.label for row in board.rows} == {"none", "kd"}
    assert all({"train_cross_entropy", "train_kd"} <= row.keys() for record in records["kd"] for row in record.curve)
    verified(tmp_path, 5)
    _, others = ran({"task.labelled": 60}, tmp_path / "more")
    assert records["kd"][0].protocol_hash != others["kd"][0].protocol_hash


@pytest.mark.parametrize("name", ["unlabelled", "partly"])
def test_students_learn_from_a_further_part_of_a_users_data(tmp_path: Path, name: str) -> None:
    data = {"name": "tests.data.further:with_more"}
    board, records = ran({"task.data": data, "task.val_size": 10, "task.transfer": name, "seeds": 1}, tmp_path)
    assert {row.label for row in board.rows} == {"none", "kd"}
    (kd,) = records["kd"]
    assert ("train_cross_entropy" in kd.curve[0]) == (name == "partly")


def test_a_teacher_of_some_classes_or_of_a_share_is_another_teacher_of_the_same_students(tmp_path: Path) -> None:
    wanted: list[dict[str, Any]] = [{}, {"task.teacher_classes": ["circle", "square"]}, {"task.teacher_share": 0.5}]
    teachers, learned = [], []
    for place, changes in enumerate(wanted):
        _, records = ran({**changes, "seeds": 1}, tmp_path / str(place))
        verified(tmp_path / str(place), 3)
        teachers += records["teacher"]
        learned += records["kd"]
    assert len({record.unit_key for record in teachers}) == len({record.learned_hash for record in teachers}) == 3
    assert len({record.learned_hash for record in learned}) == 1
    of_two = teachers[1]
    assert of_two.artifacts_uri is not None
    network = build_task(experiment().task).build_model(experiment().teacher.model)  # type: ignore[union-attr]
    network.load_state_dict(load_file(tmp_path / "1" / of_two.artifacts_uri))
    images = build_task(experiment().task).splits().train.pixels / 255
    with torch.no_grad():
        assert int((network.eval()(images).argmax(1) > 1).sum()) < int((network(images).argmax(1) <= 1).sum())


def test_a_teacher_of_another_task_is_measured_on_its_own_and_no_gap_is_claimed(tmp_path: Path) -> None:
    places = {"student_taps": ["stage:-1"], "teacher_taps": ["stage:-1"]}
    methods = ["none", "kd", {"name": "at", **places}]
    asked = experiment({"teacher.task": OTHER, "methods": methods})
    planned = dry_run(asked)
    assert (planned.teacher_images, planned.student_images) == (100, 100)
    watch = Noting()
    assert run(asked, tmp_path, watch).failures == ()
    records = ResultStore(tmp_path).scan()
    (teacher,) = (record for record in records if record.role == "teacher")
    said = f"teacher tiny_cnn: test accuracy {teacher.test_metric:.2f} on its own task, classification on shapes"
    assert said in watch.notes
    other, own = build_task(asked.task).splits(), build_task(asked.task_of("teacher")).splits()
    assert (teacher.test_hash, teacher.learned_hash) == (own.test_hash, own.learned_hash)
    finals = [record for record in records if record.role == "final"]
    assert {record.test_hash for record in finals} == {other.test_hash}
    assert {record.teacher_metric for record in finals} == {None}
    assert all(record.agreement is not None for record in finals)
    (board,) = boards(records)
    assert (board.teacher, board.teacher_metric) == ("tiny_cnn", None)
    assert {row.gap_recovered for row in board.rows} == {None}
    verified(tmp_path, 7)
    assert run(asked, tmp_path, Unwatched()).trained == 0
    for record in (teacher, next(record for record in finals if record.label == "kd")):
        report = export(record, tmp_path, "safetensors", tmp_path / f"{record.role}.safetensors")
        assert report.inputs.startswith(f"float32 images {'3x24x24' if record is teacher else '3x16x16'}")


def test_a_teacher_of_another_task_gives_the_same_live_and_cached(tmp_path: Path) -> None:
    weights = []
    for place, cache in enumerate(({"precision": "fp32"}, {"budget_gb": 0.0})):
        asked = experiment({"teacher.task": OTHER, "methods": ["kd"], "seeds": 1, "cache": cache})
        run(asked, tmp_path / str(place), Unwatched())
        (record,) = ResultStore(tmp_path / str(place)).scan(role="final")
        assert record.artifacts_uri is not None
        weights.append(load_file(tmp_path / str(place) / record.artifacts_uri))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_another_task_on_the_same_test_part_claims_no_gap_either(tmp_path: Path) -> None:
    """Its own record has the task, the data, the label and the weights of what a board looks for."""
    asked = experiment({"teacher.task": {**ASKED["task"], "teacher_share": 0.9}, "seeds": 1})
    run(asked, tmp_path, Unwatched())
    (board,) = boards(ResultStore(tmp_path).scan())
    assert board.teacher_metric is None
    verified(tmp_path, 3)


def test_the_same_task_written_again_is_no_other_task(tmp_path: Path) -> None:
    run(experiment({"seeds": 1}), tmp_path, Unwatched())
    assert run(experiment({"seeds": 1, "teacher.task": ASKED["task"]}), tmp_path, Unwatched()).trained == 0


def test_a_teacher_of_another_task_is_read_from_a_file(tmp_path: Path) -> None:
    run(experiment({"teacher.task": OTHER, "seeds": 1}), tmp_path / "first", Unwatched())
    (teacher,) = ResultStore(tmp_path / "first").scan(role="teacher")
    assert teacher.artifacts_uri is not None
    given = {"teacher.task": OTHER, "teacher.weights": tmp_path / "first" / teacher.artifacts_uri, "seeds": 1}
    board, records = ran(given, tmp_path / "second")
    assert records["teacher"][0].test_metric == teacher.test_metric
    assert board.teacher_metric is None
    verified(tmp_path / "second", 3)


def test_the_code_of_the_teachers_own_task_is_on_record_with_its_students(tmp_path: Path) -> None:
    own = {**OTHER, "data": {"name": "tests.data.further:with_more"}, "val_size": 10}
    run(experiment({"teacher.task": own, "methods": ["kd"], "seeds": 1}), tmp_path, Unwatched())
    (kd,) = ResultStore(tmp_path).scan(role="final")
    assert kd.code is not None
    assert "tests.data.further" in kd.code


@pytest.mark.ray
@pytest.mark.slow
def test_other_processes_search_on_noise_with_a_teacher_of_another_task(tmp_path: Path, ray: None) -> None:
    search = {"trials": 2, "sampler": "random", "scheduler": "none", "top_k": 1}
    asked = experiment({"task.transfer": "noise", "teacher.task": OTHER, "search": search, "methods": ["kd"], "seeds": 1})
    assert run(asked, tmp_path, Unwatched()).failures == ()
    assert sorted(record.role for record in ResultStore(tmp_path).scan()) == ["final", "teacher"]
    verified(tmp_path, 2)


WEIGHTS = "somewhere.safetensors"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dkd on noise": (
        {"task.transfer": "noise", "methods": ["kd", "dkd"]},
        r"^method dkd reads the labels of the 100 samples that students learn from, and none of them has any; leave the method out, or set "
        r"task.transfer to labelled samples$",
    ),
    "a combination on few labels": (
        {"task.labelled": 30, "methods": ["none", "kd+nkd"]},
        r"^method kd\+nkd reads the labels of the 100 samples that students learn from, and 70 of them have none; leave the method out",
    ),
    "mixup on few labels": (
        {"task.labelled": 30, "recipe.augment": {"mixup": 0.2}},
        r"^recipe.augment.mixup mixes two images and their labels, .*, and not all of these samples have one; leave it out$",
    ),
    "cutmix on noise": (
        {"task.transfer": "noise", "recipe.augment": {"cutmix": 0.2}},
        r"^recipe.augment.cutmix mixes two images and their labels, .*, and not all of these samples have one; leave it out$",
    ),
    "noise of words": (
        {"task": {"name": "image_text", "data": {**DATA, "target": "caption"}, "val_size": 20, "transfer": "noise"}},
        "^transfer: noise makes images, and samples of data 'shapes' have the input 'tokens' of another kind; use transfer: train$",
    ),
    "a share without a teacher": (
        {"task.teacher_share": 0.5, "teacher": None, "methods": ["none"]},
        "^task: teacher_share and teacher_classes say what the teacher learns from, and samples has no teacher; leave them out$",
    ),
    "classes of a given teacher": (
        {"task.teacher_classes": [0, 1], "teacher.weights": WEIGHTS},
        "^task: teacher_share and teacher_classes say .*, and teacher.weights are given, so the teacher learns nothing; leave one of",
    ),
    "a share of the wrong task": (
        {"task.teacher_share": 0.5, "teacher.task": OTHER},
        "^task: teacher_share and teacher_classes say .*, and the teacher has a task of its own; write them in teacher.task$",
    ),
    "what students learn from, of a teacher's task": (
        {"teacher.task": {**OTHER, "labelled": 0.5}},
        "^teacher.task: labelled says what students learn from; write it in task, or leave it out$",
    ),
    "a share of another given teacher": (
        {"teacher.task": {**OTHER, "teacher_share": 0.5}, "teacher.weights": WEIGHTS},
        "^teacher.task: teacher_share and teacher_classes say .*, and teacher.weights are given",
    ),
    "a teacher of masks": (
        {
            "teacher.task": {"name": "segmentation", "data": {**DATA, "target": "mask"}, "val_size": 20},
            "teacher.model": "tiny_fcn",
        },
        r"^teacher.task: its network gives \[6, 16, 16\] for an image, data 'shapes' needs \[5\]$",
    ),
    "a teacher of words": (
        {
            "teacher.task": {"name": "image_text", "data": {**DATA, "target": "caption"}, "val_size": 20},
            "teacher.model": {"name": "tiny_towers", "width": 8},
            "recipe.augment": {},
        },
        r"^teacher.task: its network doesn't work on images \[3, 16, 16\] of data 'shapes': ",
    ),
    "a task that takes none": (
        {
            "task": {"name": "segmentation", "data": {**DATA, "target": "mask"}, "val_size": 20},
            "students": ["tiny_fcn"],
            "teacher.task": OTHER,
        },
        "^teacher.task: task segmentation takes no teacher of another task; leave teacher.task out$",
    ),
    "another unknown option": ({"teacher.task": {**OTHER, "val_sise": 3}}, "val_sise.*did you mean 'val_size'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.filterwarnings("error")
def test_what_makes_no_sense_is_refused_in_one_line_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dry: bool
) -> None:
    changes, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    asked = experiment(changes)
    with pytest.raises(UserError, match=message) as refused:
        dry_run(asked) if dry else run(asked, tmp_path / "results", Unwatched())
    assert len(str(refused.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_teachers_task_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"teacher\.task: unknown task 'clasification'; did you mean 'classification'"):
        experiment({"teacher.task": {"name": "clasification"}})
