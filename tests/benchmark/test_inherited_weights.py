"""A student with `weights: teacher` begins with the teacher's tensors, whatever its method, and its key says which they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.deploy.export import export
from kdbench.deploy.verification import verify
from kdbench.errors import UserError
from kdbench.experiment import Experiment, TeacherRef, load_experiment, to_yaml, validated
from kdbench.models.build import ModelSpec
from kdbench.models.weights import state_sha256
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.assembly import assemble
from kdbench.training.session import LocalSession
from tests.console import Kdbench
from tests.training.test_loop import assert_equal_weights, weights_of
from tests.training.units import STUDENT, killed_and_continued, layout, saved_teacher, unit

TASK = {"name": "classification", "data": {"name": "shapes", "train": 80, "test": 20, "target": "class", "size": 16}, "val_size": 20}
TEACHER = {"name": "cifar_resnet14", "width": 4}
ASKED: dict[str, Any] = {
    "name": "inherited",
    "task": TASK,
    "teacher": {"model": TEACHER, "recipe": {"epochs": 2}},
    "students": [{**TEACHER, "label": "same", "weights": "teacher"}, {"name": "cifar_resnet8", "width": 4, "weights": "teacher"}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 20, "lr": 1e-9, "weight_decay": 0, "precision": "fp32", "memory_format": "contiguous"},
    "seeds": 1,
}  # fmt: skip


class Notes(Unwatched):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes]:
    """A run, and a second one that finds everything."""
    folder, notes = tmp_path_factory.mktemp("results"), Notes()
    assert run(Experiment.model_validate(ASKED), folder, notes).trained == 5
    again = run(Experiment.model_validate(ASKED), folder, Unwatched())
    assert (again.trained, again.found) == (0, 5)
    return folder, notes


def finals(folder: Path) -> list[RunRecord]:
    return [record for record in ResultStore(folder).scan() if record.role == "final"]


def test_students_begin_with_what_they_share_with_the_teacher_also_without_distilling(done: tuple[Path, Notes]) -> None:
    """The learning rate is next to nothing, so that the parameters are still those of the beginning."""
    folder, notes = done
    [teacher] = [load_file(path) for path in (folder / "teachers").rglob("*.safetensors")]
    for record in finals(folder):
        [path] = [path for path in (folder / "students").rglob("*.safetensors") if record.unit_key in str(path)]
        student = load_file(path)
        parameters = [name for name in student if "running" not in name and "num_batches" not in name]
        assert parameters
        for name in parameters:
            assert torch.allclose(student[name], teacher[name], atol=1e-6), (record.student, record.method, name)
    assert "student same begins with 92 of its 92 tensors from cifar_resnet14" in notes.lines
    assert "student cifar_resnet8 begins with 56 of its 56 tensors from cifar_resnet14" in notes.lines


def test_the_record_holds_the_content_that_was_taken_and_verify_derives_the_key(done: tuple[Path, Notes], tmp_path: Path) -> None:
    folder, _ = done
    records = finals(folder)
    assert {(r.student, r.method) for r in records} == {(s, m) for s in ("same", "cifar_resnet8") for m in ("none", "kd")}
    assert {r.student_init for r in records if r.student == "same"} == {
        r.teacher_state for r in ResultStore(folder).scan() if r.role == "teacher"
    }
    assert len({r.student_init for r in records}) == 2

    found = verify(folder)
    assert (found.problems, found.unkeyed) == ((), 0)
    exported = export(records[0], folder, "safetensors", tmp_path / "student.safetensors")
    assert exported.path.exists()


def test_a_file_with_the_teachers_weights_is_the_same_beginning(tmp_path: Path) -> None:
    """So it is the same training, with the same key."""
    ref = saved_teacher(tmp_path)
    task = build_task(TaskSpec.model_validate(unit().task.model_dump()))
    named = ModelSpec(name="tiny_cnn", label="student", weights=ref.weights, **ref.model.options)
    by_file = assemble(unit(teacher=ref, student=named.model_dump()), LocalSession()).distiller.student
    by_word = assemble(unit(teacher=ref, student=named.model_dump() | {"weights": "teacher"}), LocalSession()).distiller.student
    assert state_sha256(by_word) == state_sha256(by_file) == state_sha256(task.build_model(named))


def test_another_architecture_takes_what_agrees_and_draws_the_rest_as_ever(tmp_path: Path) -> None:
    ref = saved_teacher(tmp_path)  # width 8
    torch.manual_seed(0)
    narrow = {"name": "tiny_cnn", "width": 4}
    plain = assemble(unit(teacher=ref, student=narrow), LocalSession()).distiller.student.state_dict()
    begun = assemble(unit(teacher=ref, student={**narrow, "weights": "teacher"}), LocalSession()).distiller.student.state_dict()
    teacher = load_file(ref.weights)
    shared = {name for name in plain if plain[name].shape == teacher[name].shape}

    assert "fc.bias" in shared
    assert "fc.weight" not in shared
    for name in plain:
        assert torch.equal(begun[name], teacher[name] if name in shared else plain[name]), name


def test_a_killed_training_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    ref = saved_teacher(tmp_path, model=STUDENT)
    whole = unit(teacher=ref, student={**STUDENT, "weights": "teacher"}, checkpoint_seconds=0)
    from kdbench.training.loop import fit

    fit(whole, LocalSession(), layout(tmp_path / "whole"))
    killed_and_continued(whole, tmp_path / "continued", 3)
    assert_equal_weights(weights_of(tmp_path / "whole", whole), weights_of(tmp_path / "continued", whole))
    drawn = unit(teacher=ref, student=STUDENT, checkpoint_seconds=0)
    fit(drawn, LocalSession(), layout(tmp_path / "drawn"))
    name = "features.0.weight"
    assert not torch.equal(weights_of(tmp_path / "whole", whole)[name], weights_of(tmp_path / "drawn", drawn)[name])


def test_the_key_holds_the_content_and_not_the_word() -> None:
    ref = TeacherRef(model=ModelSpec(name="tiny_cnn"), weights=Path("a.safetensors"), sha="0" * 64)
    begun = {"student": {"name": "tiny_cnn", "weights": "teacher"}, "student_init": "1" * 64}
    key = unit(teacher=ref, **begun).key

    assert key == "8954cd23652779dc"
    assert unit(teacher=ref, **begun | {"student": {"name": "tiny_cnn", "weights": "other.pt"}}).key == key
    assert unit(teacher=ref, **begun | {"student_init": "2" * 64}).key != key
    assert unit(teacher=ref, student={"name": "tiny_cnn"}).key != key


def test_other_weights_of_the_teacher_than_where_the_run_began_are_refused(tmp_path: Path) -> None:
    ref = saved_teacher(tmp_path)
    student = {"name": "tiny_cnn", "width": 8, "label": "student", "weights": "teacher"}
    with pytest.raises(UserError, match="the weights that student begins with, teacher, are others here than where the run began"):
        assemble(unit(teacher=ref, student=student, student_init="1" * 64), LocalSession())
    with pytest.raises(UserError, match="weights: teacher needs a teacher"):
        assemble(unit(student=student), LocalSession())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"teacher": None, "methods": ["none"]}, "students: 'same' has weights: teacher, and the file has no `teacher:`; add one"),
        ({"teacher": {"model": {**TEACHER, "weights": "teacher"}}}, "model.weights: teacher is for students"),
    ],
)
def test_a_teacher_that_is_missing_or_is_to_begin_as_itself_is_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError) as refused:
        validated(Experiment, {**ASKED, **changes}, "x.yaml")
    assert error in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_networks_that_share_nothing_are_refused_before_the_teacher_is_trained_and_in_a_dry_run(kdbench: Kdbench, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(to_yaml(Experiment.model_validate({**ASKED, "students": [{"name": "vgg8", "weights": "teacher"}]})))
    for options in (["--dry-run"], ["--results", str(tmp_path / "results")]):
        ended = kdbench("run", str(file), *options)
        assert ended.code == 2
        [line] = ended.err.strip().splitlines()[-1:]
        assert line == (
            "kdbench: students: vgg8 has weights: teacher, but none of its parameters has the name and shape of one of cifar_resnet14's; "
            "remove `weights`, or name a file"
        )
    assert not (tmp_path / "results").exists()


def test_a_dry_run_says_how_much_is_taken(kdbench: Kdbench, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(to_yaml(Experiment.model_validate(ASKED)))
    assert load_experiment(file) == Experiment.model_validate(ASKED)
    ended = kdbench("run", str(file), "--dry-run")
    assert ended.code == 0, ended.err
    assert "begins with 56 of its 56 tensors from the teacher" in ended.out
