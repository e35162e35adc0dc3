"""What changes the key of a training, the name of a search and the key of a cache entry, and what does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdbench.benchmark import pair as pairs
from kdbench.benchmark.cache import cache_spec
from kdbench.benchmark.ledger import Ledger
from kdbench.benchmark.pair import PairWork, axes_of
from kdbench.benchmark.run import _pairs, check, run
from kdbench.benchmark.teacher import teacher_unit
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.leaderboard import boards
from kdbench.boards.summary import summaries
from kdbench.bounded import read_file
from kdbench.data import image_folder, sources
from kdbench.deploy.verification import verify
from kdbench.errors import UserError
from kdbench.experiment import Experiment, TeacherRef, content_hash
from kdbench.methods.base import Method
from kdbench.methods.build import MethodSpec, fitted
from kdbench.methods.kd import KD
from kdbench.models.build import ModelSpec
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tasks import build
from kdbench.tasks.build import TaskSpec, build_task, task_facts
from kdbench.tasks.classification import Classification
from kdbench.tasks.networks import outputs_facts
from kdbench.tracking import NoTracker
from kdbench.training.assembly import assemble
from kdbench.training.cache.outputs import CacheSpec
from kdbench.training.keys import student_protocol
from kdbench.training.session import LocalSession

ASKED: dict[str, Any] = {
    "name": "keys",
    "task": {"name": "classification", "data": {"name": "image_folder", "path": "pictures", "size": 16}, "val_size": 4},
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}, "weights": "teacher.safetensors"},
    "students": [{"name": "tiny_cnn", "width": 2, "weights": "student.pt"}],
    "methods": [{"name": "kd"}],
    "recipe": {"epochs": 1, "batch_size": 4, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "search": {"trials": 2, "sampler": "random", "scheduler": "none"},
    "seeds": 1,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: red and blue pictures, a teacher's weights and the weights that a student begins with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for channel, name in ((0, "red"), (2, "blue")):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(tmp_path / "pictures" / part / name / f"{number}.png")
    torch.manual_seed(1)
    forget_data()
    save_file(network(4).state_dict(), "teacher.safetensors")
    torch.save(network(2).state_dict(), "student.pt")
    yield tmp_path
    forget_data()  # which are known by a path of this working directory


def forget_data() -> None:
    """As in a new process."""
    build._built.cache_clear()
    sources._opened.cache_clear()


def network(width: int) -> torch.nn.Module:
    task = build_task(TaskSpec.model_validate(ASKED["task"]))
    return task.build_model(ModelSpec.model_validate({"name": "tiny_cnn", "width": width}))


def experiment(changes: dict[str, Any] | None = None) -> Experiment:
    """ASKED with dotted keys changed; a number is the place in a list."""
    asked = deepcopy(ASKED)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        place: Any = asked
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[last] = value
    return Experiment.model_validate(asked)


def keys(changes: dict[str, Any] | None = None) -> dict[str, str]:
    forget_data()
    asked = experiment(changes)
    ledger = Ledger(asked, Path("results"), Unwatched(), NoTracker())
    (pair,) = _pairs(asked, ledger, check(asked, ledger), may_train=True)
    (spec,) = asked.methods
    assert asked.search is not None
    assert pair.teacher is not None
    return {
        "unit": pair.unit(spec, "final", {}, 0).key,
        "study": pair.study_id(spec, axes_of(spec, asked.search, pair.recipe), asked.search),
        "cache": cache_spec(pair.asked, pair.teacher, pair.recipe, ledger.layout).key,
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def paint(path: str) -> None:
    """Another picture of the same name, and if PNG's compression is as good, of the same size."""
    Image.new("RGB", (16, 16), (9, 9, 9)).save(path)


def _called(value: object) -> str:
    """The name of a case: the same in every process, as the order of a set is not."""
    if isinstance(value, set):
        return "-".join(sorted(value)) or "nothing"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher.model.stem_stride": 1}, {"unit", "study", "cache"}),
        ({"teacher.recipe.precision": "fp64"}, {"unit", "study", "cache"}),
        ({"teacher.recipe.memory_format": "channels_last"}, {"unit", "study", "cache"}),
        ({"teacher.model.label": "mine"}, set()),
        ({"teacher.recipe.lr": 0.9}, set()),  # a teacher that is given is not trained
        ({"task.val_size": 6}, {"unit", "study", "cache"}),
        ({"task.transfer_size": 8}, {"unit", "study", "cache"}),
        ({"task.transfer": "train"}, set()),
        ({"task.transfer": "noise"}, {"unit", "study", "cache"}),
        ({"task.labelled": 4}, {"unit", "study"}),  # the teacher's outputs are the same
        ({"task.labelled": None}, set()),
        ({"task.teacher_share": 1.0}, set()),
        ({"teacher.task": ASKED["task"]}, set()),
        ({"teacher.task": {**ASKED["task"], "val_size": 6}}, {"unit", "study", "cache"}),
        ({"task.data.path": "./pictures"}, set()),
        ({"task.data.path": "pictures/../pictures"}, set()),
        ({"task.data.test": "val"}, set()),
        ({"task.data.size": 20}, {"unit", "study", "cache"}),
        ({"task.data.in_memory": True}, {"unit", "study", "cache"}),
        ({"students.0.stem_stride": 1}, {"unit", "study"}),
        ({"students.0.label": "mine"}, {"unit", "study"}),
        ({"methods.0.label": "mine"}, {"unit", "study"}),
        ({"methods.0.temperature": 3.0}, {"unit", "study"}),
        ({"recipe.lr": 0.1}, {"unit", "study"}),
        ({"recipe.augment.flip": True}, {"unit", "study", "cache"}),
        ({"data_seed": 1}, {"unit", "study", "cache"}),
        ({"runtime.workers": 2}, {"unit", "study"}),
        ({"cache.precision": "fp32"}, {"unit", "study", "cache"}),
        ({"search.trials": 3}, {"unit"}),  # a longer search goes on with the shorter one, and its finals are chosen anew
        ({"search.sampler": "tpe"}, {"unit", "study"}),
        ({"name": "other"}, {"study"}),  # two experiments never write to one study
        ({"cache.budget_gb": 1.0}, set()),
        ({"runtime.concurrent": 2}, set()),
        ({"runtime.checkpoint_seconds": 1.0}, set()),
        ({"seeds": 2}, set()),
        ({"results": "elsewhere"}, set()),
    ],
    ids=_called,
)
def test_what_is_asked_for_changes_these_keys(changes: dict[str, Any], expected: set[str]) -> None:
    assert changed(keys(), keys(changes)) == expected


PLAIN: dict[str, Any] = {
    "task": {
        "name": "classification",
        "data": {"name": "shapes", "target": "class", "train": 60, "test": 10, "size": 16},
        "val_size": 10,
        "transfer_size": 30,
    },
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}},
    "students": [{"name": "tiny_cnn", "width": 2}],
    "recipe": {"epochs": 1, "batch_size": 10, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False},
}


def test_what_is_not_asked_for_is_in_no_key() -> None:
    """The keys were computed by the code before tasks and teachers had options on what is learned from."""
    asked = experiment({**PLAIN, "name": "plain"})
    assert asked.teacher is not None
    task, facts = build_task(asked.task), task_facts(asked.task)
    ref = TeacherRef(model=asked.teacher.model, weights=Path("elsewhere"), sha="ab", state="cd")
    assert content_hash(asked.model_dump(mode="json")) == "2b3558421e3ea5d3"
    assert content_hash(facts) == content_hash(task_facts(asked.task, "teacher")) == "9db9eb05435e639c"
    assert ref.identity == "dacaa0f459ebeae4"
    assert teacher_unit(asked, asked.teacher, asked.teacher_recipe(), task, network(4)).key == "16ca694db19d7eb2"
    assert CacheSpec(teacher=ref, task=asked.task, recipe=asked.recipe, data_seed=0).key == "af49e0058374e69a"
    learned = task.splits().learned_hash
    assert student_protocol(asked, facts, "shapes", learned, asked.recipe, ref.identity, True) == "6e8afe16d9170252"


@pytest.mark.parametrize("option", [{"teacher_share": 0.5}, {"teacher_classes": ["circle"]}])
def test_what_a_teacher_learns_from_is_in_its_key_and_not_among_the_facts_of_its_students(option: dict[str, Any]) -> None:
    plain, asked = experiment(PLAIN), experiment({**PLAIN, "task": {**PLAIN["task"], **option}})
    assert plain.teacher is not None
    keys = [teacher_unit(one, plain.teacher, plain.teacher_recipe(), build_task(one.task), network(4)).key for one in (plain, asked)]
    assert keys[0] != keys[1]
    assert task_facts(asked.task) == task_facts(plain.task)
    assert task_facts(asked.task, "teacher") != task_facts(plain.task, "teacher")


@pytest.mark.parametrize("change", [{"size": 24}, {"seed": 3}, {"test": 11}])
def test_a_teacher_of_another_task_is_named_by_what_its_network_is_told_of_its_data(change: dict[str, Any]) -> None:
    plain, asked = (TaskSpec.model_validate({**PLAIN["task"], "data": {**PLAIN["task"]["data"], **more}}) for more in ({}, change))
    here, there = (content_hash(outputs_facts(build_task(spec), spec)) for spec in (plain, asked))
    assert (here == there) == ("test" in change)  # of the test part it is told nothing


def new_picture(part: str) -> Callable[[], None]:
    return lambda: paint(f"pictures/{part}/red/0.png")


def moved_data() -> None:
    shutil.copytree("pictures", "copy")
    shutil.rmtree("pictures")
    Path("pictures").symlink_to("copy")


def touched() -> None:
    for path in Path("pictures").rglob("*.png"):
        os.utime(path, (1e9, 1e9))


def other_teacher() -> None:
    save_file(network(4).state_dict(), "teacher.safetensors")


def other_start() -> None:
    torch.save(network(2).state_dict(), "student.pt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (new_picture("train"), {"unit", "study", "cache"}),
        (new_picture("val"), {"cache"}),  # the test part: an entry holds the teacher's predictions for it
        (moved_data, set()),
        (touched, set()),
        (other_teacher, {"unit", "study", "cache"}),
        (other_start, {"unit", "study"}),
    ],
    ids=_called,
)
def test_what_files_hold_changes_these_keys(change: Callable[[], None], expected: set[str]) -> None:
    before = keys()
    change()
    assert changed(before, keys()) == expected


def test_the_version_of_a_task_changes_the_key_and_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr(Classification, "version", Classification.version + 1)
    assert changed(before, keys()) == {"unit", "study"}


def test_the_version_of_a_method_changes_the_key_and_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr(KD, "version", KD.version + 1)
    assert changed(before, keys()) == {"unit", "study"}


def test_the_kind_of_file_and_its_place_change_nothing() -> None:
    state = network(4).state_dict()
    save_file(state, "teacher.safetensors")
    torch.save(state, "teacher.pt")
    torch.save({"state_dict": state, "epoch": 3}, "teacher.ckpt")
    found = [keys({"teacher.weights": f"teacher.{kind}"}) for kind in ("safetensors", "pt", "ckpt")]
    assert found[0] == found[1] == found[2]
    Path("moved").mkdir()
    shutil.copy("student.pt", "moved/start.pt")
    assert keys({"students.0.weights": "moved/start.pt"}) == found[0]


# --- whole runs ------------------------------------------------------------------------------------------------------

WITHOUT_SEARCH = {"search": None, "methods": ["none", "kd"]}


def ran(changes: dict[str, Any] | None = None) -> tuple[int, int]:
    forget_data()
    summary = run(experiment({**WITHOUT_SEARCH, **(changes or {})}), Path("results"), Unwatched())
    assert summary.failures == ()
    return summary.trained, summary.found


def finals() -> list[RunRecord]:
    return ResultStore("results").scan(role="final")


def test_one_data_set_by_three_spellings_of_its_path_is_trained_once() -> None:
    trainings = [ran({"task.data.path": path}) for path in ("pictures", "./pictures", str(Path("pictures").resolve()))]
    assert [trained for trained, _ in trainings] == [3, 0, 0]  # the measured teacher and two students
    assert len(boards(ResultStore("results").scan())) == 1


def test_one_teacher_in_three_kinds_of_file_is_one_teacher() -> None:
    state = network(4).state_dict()
    save_file(state, "teacher.safetensors")
    torch.save(state, "teacher.pt")
    torch.save({"state_dict": state}, "teacher.ckpt")
    methods = {"safetensors": ["none", "kd"], "pt": ["none", "kd", "dkd"], "ckpt": ["none", "kd", "dkd"]}
    trained = [ran({"teacher.weights": f"teacher.{kind}", "methods": names})[0] for kind, names in methods.items()]
    assert trained == [3, 1, 0]
    records = ResultStore("results").scan()
    assert len({record.teacher_sha for record in records if record.role == "final"}) == 2  # the file that each had
    (board,) = boards(records)
    assert {row.label for row in board.rows} == {"none", "kd", "dkd"}
    assert summaries([board]) == []
    assert verify(Path("results")).problems == ()


def test_after_a_repaired_test_image_everything_is_measured_again_and_nothing_is_trained() -> None:
    asked = {"teacher.weights": None, "teacher.recipe": {"lr": 0.1}, "students.0.weights": None}
    paint("pictures/val/red/0.png")
    paint("pictures/val/red/1.png")
    assert ran(asked)[0] == 3
    before = {record.label: record for record in ResultStore("results").scan()}
    weights = {path: path.read_bytes() for path in Path("results").rglob("*.safetensors") if "predictions" not in path.parts}

    shutil.copy("pictures/val/red/2.png", "pictures/val/red/1.png")
    assert ran(asked) == (0, 3)
    records = ResultStore("results").scan()
    after = {record.label: record for record in records if record.run_id not in {known.run_id for known in before.values()}}
    assert after.keys() == before.keys()
    assert len(records) == 6
    for label, record in after.items():
        known = before[label]
        assert (record.unit_key, record.curve, record.train_seconds) == (known.unit_key, known.curve, known.train_seconds)
        assert record.test_hash != known.test_hash
        assert record.predictions_uri != known.predictions_uri
    assert after["kd"].agreement is not None
    assert after["kd"].teacher_metric == after["teacher"].test_metric
    assert {path: path.read_bytes() for path in weights} == weights
    assert ran(asked) == (0, 3)

    # What is measured again is what a training on the repaired images would have measured.
    forget_data()
    assert run(experiment({**WITHOUT_SEARCH, **asked}), Path("anew"), Unwatched()).trained == 3
    anew = {record.label: record for record in ResultStore("anew").scan()}
    assert {label: record.metrics for label, record in after.items()} == {label: record.metrics for label, record in anew.items()}
    assert after["kd"].agreement == anew["kd"].agreement

    # Two test parts are two boards, and not two pairs.
    found = boards(records)
    assert len(found) == 2
    assert len({board.protocol_hash for board in found}) == 2
    assert summaries(found) == []
    # The figures of before can't be derived again, as their images are gone; those of now can.
    problems = verify(Path("results")).problems
    assert all(any(known.run_id in problem for known in before.values()) for problem in problems)


def test_a_student_whose_weights_are_gone_is_trained_again_on_a_repaired_test_part() -> None:
    ran()
    shutil.rmtree("results/students")
    paint("pictures/val/red/0.png")
    trained, found = ran()
    assert trained == 3  # with the teacher's file, which is measured again
    assert found == 0


def test_a_process_with_other_data_than_the_units_refuses_to_train() -> None:
    asked = experiment(WITHOUT_SEARCH)
    ledger = Ledger(asked, Path("results"), Unwatched(), NoTracker())
    (pair,) = _pairs(asked, ledger, check(asked, ledger), may_train=True)
    unit = pair.unit(asked.methods[1], "final", {}, 0)
    assemble(unit, LocalSession())
    other_start()
    with pytest.raises(UserError, match=r"the weights that tiny_cnn begins with, student\.pt, are others here"):
        assemble(unit, LocalSession())
    torch.manual_seed(1)
    paint("pictures/train/red/0.png")
    forget_data()
    with pytest.raises(UserError, match="the training data of image_folder have other content here than where the run began"):
        assemble(unit, LocalSession())


def test_a_process_with_another_version_of_the_task_or_another_teacher_refuses_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = experiment(WITHOUT_SEARCH)
    ledger = Ledger(asked, Path("results"), Unwatched(), NoTracker())
    (pair,) = _pairs(asked, ledger, check(asked, ledger), may_train=True)
    unit = pair.unit(asked.methods[1], "final", {}, 0)
    other_teacher()
    with pytest.raises(UserError, match=r"the teacher's weights, .*, are others here than where the run began"):
        assemble(unit, LocalSession())
    monkeypatch.setattr(Classification, "version", Classification.version + 1)
    with pytest.raises(UserError, match="task classification has version 2 here and 1 where the run began"):
        assemble(unit, LocalSession())


def test_a_process_with_another_version_of_the_method_refuses_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = experiment(WITHOUT_SEARCH)
    ledger = Ledger(asked, Path("results"), Unwatched(), NoTracker())
    (pair,) = _pairs(asked, ledger, check(asked, ledger), may_train=True)
    unit = pair.unit(asked.methods[1], "final", {}, 0)
    monkeypatch.setattr(KD, "version", KD.version + 1)
    with pytest.raises(UserError, match=f"method kd has version {KD.version} here and {KD.version - 1} where the run began"):
        assemble(unit, LocalSession())


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_read_once_and_again_where_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    touched()
    read: list[Path] = []

    def noted(path: Path, most: int) -> bytes:
        read.append(path)
        return read_file(path, most)

    monkeypatch.setattr(image_folder, "read_file", noted)

    def content() -> str:
        read.clear()
        return image_folder.image_folder(Path("pictures"), size=16).sha256

    first = content()
    assert len(read) == 22
    assert content() == first
    assert read == []
    paint("pictures/train/red/0.png")
    os.utime("pictures/train/red/0.png", (1.1e9, 1.1e9))
    assert content() != first
    assert {path.parent.name for path in read} == {"red"}
    assert len(read) == 8
    content()
    assert read == []


def test_a_file_that_was_just_written_is_read_again_as_its_time_says_nothing_yet() -> None:
    def content() -> str:
        return image_folder.image_folder(Path("pictures"), size=16).sha256

    picture = Path("pictures/train/red/0.png")
    first, moment = content(), picture.stat().st_mtime_ns
    changed_bytes = bytearray(picture.read_bytes())
    changed_bytes[-1] ^= 1
    picture.write_bytes(changed_bytes)
    os.utime(picture, ns=(moment, moment))  # the file system's clock did not tick between the two
    assert content() != first


def test_a_memory_of_files_that_was_damaged_is_made_anew() -> None:
    touched()
    first = image_folder.image_folder(Path("pictures"), size=16).sha256
    for kept in Path("cache/kdbench/content").iterdir():
        kept.write_text('{"red": 3}')
    assert image_folder.image_folder(Path("pictures"), size=16).sha256 == first


def test_finals_are_planned_from_one_unit_and_have_the_keys_of_units_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of 1000 seeds fits each method to the pair once."""
    asked = experiment(WITHOUT_SEARCH | {"seeds": 1000, "control_seeds": 1000})
    ledger = Ledger(asked, Path("results"), Unwatched(), NoTracker())
    (pair,) = _pairs(asked, ledger, check(asked, ledger), may_train=True)
    spec = asked.methods[1]
    wanted = {replace(pair).unit(spec, "final", {}, seed).key: seed for seed in (0, 1, 999)}  # by pairs that have fitted nothing yet
    fits: list[str] = []

    def noting(spec: MethodSpec, *others: Any, **more: Any) -> Method:
        fits.append(spec.label)
        return fitted(spec, *others, **more)

    monkeypatch.setattr(pairs, "fitted", noting)
    work = PairWork(pair, ledger, search_only=False)
    assert sorted(fits) == sorted(method.label for method in asked.methods)
    finals = next(contender for contender in work.contenders if contender.spec == spec).finals
    assert finals is not None
    assert len(finals) == 1000
    assert {key: finals[key].seed for key in wanted} == wanted
