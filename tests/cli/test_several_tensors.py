"""`kdbench run --profile` and `kdbench taps` where inputs or predictions are several tensors by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdbench.records.store import ResultStore
from tests.console import Kdbench

RECIPE = "{epochs: 1, batch_size: 12, lr: 0.01, precision: fp32, memory_format: contiguous, augment: {crop: 2}, views: 2}"
BOXES = f"""
name: boxes
task: {{name: detection, data: {{name: shapes, target: boxes, size: 32, train: 40, test: 12}}, val_size: 12, transfer_size: 24}}
teacher: {{model: {{name: tiny_fcos, width: 6}}}}
students: [{{name: tiny_fcos, width: 4}}]
methods: [none, kd, {{name: mgd, student_taps: ["level:0"], teacher_taps: ["level:0"]}}]
recipe: {RECIPE}
"""
CAPTIONS = f"""
name: captions
task: {{name: image_text, data: {{name: shapes, target: caption, size: 32, train: 40, test: 12}}, val_size: 12, transfer_size: 24}}
teacher: {{model: {{name: tiny_towers, width: 12}}}}
students: [{{name: tiny_towers, width: 8, depth: 1}}]
methods: [none, kd]
recipe: {RECIPE}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "experiment.yaml"


@pytest.mark.parametrize(("experiment", "methods"), [(BOXES, ["none", "kd", "mgd"]), (CAPTIONS, ["none", "kd"])], ids=["boxes", "captions"])
@pytest.mark.parametrize("views", ["2", "null"], ids=["cached", "live"])
def test_a_profile_charges_every_part_of_a_step(kdbench: Kdbench, file: Path, experiment: str, methods: list[str], views: str) -> None:
    file.write_text(experiment)
    results = file.parent / "results"
    ended = kdbench("run", str(file), "--profile", "--results", str(results), "--set", f"recipe.views={views}")

    assert ended.code == 0, ended.err
    table = [line.split() for line in ended.out.splitlines()]
    rows = {cells[0]: [float(cell) for cell in cells[3:] if not cell.endswith("%")] for cells in table if cells and cells[0] in methods}
    assert list(rows) == methods
    for method, (data, teacher, forward, own, backward, optimizer, _) in rows.items():
        assert min(data, forward, own, backward, optimizer) > 0
        assert (teacher > 0) == (method != "none")
        [trace] = results.rglob(f"{method}.json")
        assert json.loads(trace.read_text())["traceEvents"]
    assert {record.role for record in ResultStore(results).scan()} == {"teacher"}


@pytest.mark.parametrize(
    ("experiment", "titles", "row"),
    [
        (
            BOXES,
            [
                "teacher tiny_fcos on images 3x32x32: prediction level:0 9x8x8, level:1 9x4x4",
                "student tiny_fcos on images 3x32x32: prediction level:0 9x8x8, level:1 9x4x4",
            ],
            ["smooth.1", "level:1", "level:-1", "map", "12x4x4", "8"],
        ),
        (
            CAPTIONS,
            [
                "teacher tiny_towers on image 3x32x32, tokens 13: prediction image 32, text 32",
                "student tiny_towers on image 3x32x32, tokens 13: prediction image 32, text 32",
            ],
            ["image.blocks.0", "stage:0", "stage:-2", "block:0", "block:-2", "tokens", "16x8"],
        ),
    ],
    ids=["boxes", "captions"],
)
def test_taps_of_an_experiment_are_those_of_its_networks_on_its_data(
    kdbench: Kdbench, file: Path, experiment: str, titles: list[str], row: list[str]
) -> None:
    file.write_text(experiment)
    few, all_ = kdbench("taps", str(file)), kdbench("taps", str(file), "--all")

    assert few.code == all_.code == 0, few.err
    lines = few.out.splitlines()
    assert [line for line in lines if line.startswith(("teacher", "student"))] == titles
    assert row in [line.split() for line in lines]
    assert f"more modules can be tapped by their path: kdbench taps {file} --all" in few.out
    assert len(all_.out.splitlines()) > len(lines)


def test_taps_of_an_experiment_without_a_teacher_are_its_students(kdbench: Kdbench, file: Path) -> None:
    file.write_text(BOXES.replace("teacher:", "# teacher:").replace("methods: [none, kd,", "methods: [none] # ["))
    ended = kdbench("taps", str(file))
    assert ended.code == 0, ended.err
    assert ended.out.startswith("student tiny_fcos on images 3x32x32")


def test_a_teacher_of_another_task_is_shown_as_it_sees_the_students_images(kdbench: Kdbench, file: Path) -> None:
    """It was made for images of 32 pixels, and a student's of 16 are enlarged for it."""
    file.write_text(
        """
name: smaller
task: {name: classification, data: {name: shapes, target: class, size: 16, train: 40, test: 12}, val_size: 12}
teacher:
  model: {name: tiny_cnn, width: 6}
  task: {name: classification, data: {name: shapes, target: class, size: 32, train: 40, test: 12}, val_size: 12}
students: [{name: tiny_cnn, width: 6}]
methods: [none, kd]
"""
    )
    ended = kdbench("taps", str(file))
    assert ended.code == 0, ended.err
    sizes = [line.split()[-2] for line in ended.out.splitlines() if "stage:0" in line]
    teacher, student = ([int(side) for side in size.split("x")[1:]] for size in sizes)
    assert teacher == [2 * side for side in student]


def test_a_model_that_only_data_can_build_says_how_to_see_it(kdbench: Kdbench, file: Path) -> None:
    ended = kdbench("taps", "tiny_towers")
    assert ended.code == 2
    assert ended.err.strip() == (
        "kdbench: model 'tiny_towers' needs the option 'vocabulary'; "
        "kdbench taps EXPERIMENT.yaml shows the networks of an experiment with their options"
    )
    ended = kdbench("taps", str(file))
    assert (ended.code, len(ended.err.strip().splitlines())) == (2, 1)
    assert "there is no such file" in ended.err
