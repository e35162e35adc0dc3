"""Whatever is wrong, a key, a file, a disk, ends in one readable message and exit code 2 or 1, and never in a half-written result."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from kdbench import cli
from kdbench.benchmark import run as running
from kdbench.data import fashion_mnist, sources
from kdbench.distributed.study import MethodStudy
from kdbench.errors import DiskFull, UserError, in_one_line
from kdbench.experiment import Experiment, Unit, load_experiment
from kdbench.models.tiny import tiny_cnn
from kdbench.results.layout import Layout
from kdbench.results.store import ResultStore
from kdbench.search_space import Parameter, Range
from kdbench.tasks import build as tasks
from kdbench.training import precision
from kdbench.training.checkpoint import save_checkpoint, save_weights
from kdbench.training.session import LocalSession
from kdbench.training.work import Ending, attempt, pack_ending, unpack_ending
from tests.console import Ended, Kdbench

TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200},
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}, "recipe": {"lr": 0.1}},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 100, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}


# Trained in a moment, where a test has to run it many times.
TINIER = {"task": {"name": "classification", "data": {"name": "shapes", "train": 120, "test": 20, "target": "class"}, "val_size": 20}}


def write(changes: dict[str, Any], name: str = "tiny.yaml") -> str:
    """TINY with the dotted keys changed, as a file in the working directory; None takes a key away."""
    experiment: dict[str, Any] = deepcopy(TINY)
    for key, value in changes.items():
        *path, last = key.split(".")
        place = experiment
        for part in path:
            place = place.setdefault(part, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    Path(name).write_text(yaml.safe_dump(experiment))
    return name


def run(kdbench: Kdbench, changes: dict[str, Any] | None = None, *arguments: object) -> Ended:
    return kdbench("run", write(changes or {}), "--results", "results", "--no-mlflow", *arguments)


def results() -> list[str]:
    """Titles of the whole results in the working directory's results folder, and a check that there is nothing half-written beside them."""
    scraps = [path for path in Path("results").rglob("*") if ".tmp" in path.name]
    assert scraps == []
    for path in Path("results/v1").rglob("*.parquet"):
        pq.read_table(path)
    return sorted(f"{r.role} {r.label} {r.status}" for r in ResultStore("results").scan())


WHOLE = ["final kd ok", "final none ok", "teacher teacher ok"]


def assert_mistake(ended: Ended, *said: str) -> None:
    """One line, exit code 2, every part of `said` in it, and no result on disk."""
    assert_one_line(ended, 2, *said)
    assert results() == []


def assert_one_line(ended: Ended, code: int, *said: str) -> None:
    assert ended.code == code, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("kdbench: ")
    for part in said:
        assert part in ended.err


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"# nothing but a comment\n", "the file is empty"),
        (b"hello", "expected keys and values such as `name: my-experiment`, got a str"),
        (b"[1, 2]", "got a list"),
        (b"a: [1, 2\nb: 3", "line 2, column 2: not valid YAML"),
        (b"a:\n\t- b", "line 2, column 1: not valid YAML: found character '\\t'"),
        (b"name: a\nname: b", "line 2, column 1: not valid YAML: the key 'name' stands twice"),
        (b"name: a\n---\nname: b", "another document"),
        (bytes(range(256)), "can't be read as text"),
        ("name: x".encode("utf-16"), "can't be read as text"),
        (b"name: x\0", "not valid YAML: unacceptable character #x0000"),
        (b"name: !!python/object/apply:os.mkdir [made]", "line 1, column 7: not valid YAML: could not determine a constructor for the tag"),
        (b"name: 2026-13-45", "not valid YAML: month must be in 1..12"),
        (b"? [a]\n: 1", "['a'] can't be a key"),
        (b"a: " + b"[" * 5000, "not valid YAML: maximum recursion depth exceeded"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(kdbench: Kdbench, content: bytes, said: str) -> None:
    Path("broken.yaml").write_bytes(content)
    assert_mistake(kdbench("run", "broken.yaml", "--results", "results"), "broken.yaml: ", said)
    assert not Path("made").exists()


def test_a_file_that_is_not_there_is_answered_with_the_nearest(kdbench: Kdbench) -> None:
    write({}, "tiny.yaml")
    assert_mistake(kdbench("run", "tyni.yaml"), "tyni.yaml: there is no such file; did you mean 'tiny.yaml'?")


def test_a_folder_is_no_experiment(kdbench: Kdbench) -> None:
    Path("folder").mkdir()
    assert_mistake(kdbench("run", "folder"), "folder: can't be read", "Is a directory")


def test_anchors_and_merged_keys_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump({**TINY, "recipe": "RECIPE", "teacher": "TEACHER"})
    text = text.replace("recipe: RECIPE", "recipe: &base {epochs: 2, lr: 0.2}")
    text = text.replace("teacher: TEACHER", "teacher: {model: tiny_cnn, recipe: {<<: *base, lr: 0.3}}")
    (tmp_path / "merged.yaml").write_text(text)
    assert load_experiment(tmp_path / "merged.yaml").teacher_recipe().lr == 0.3


# --- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 3}, "tiny.yaml: unknown key 'seed'; did you mean 'seeds'?"),
        ({"recipe.epoch": 1}, "tiny.yaml: unknown key 'recipe.epoch'; did you mean 'epochs'?"),
        ({"runtime.worker": 1}, "unknown key 'runtime.worker'; did you mean 'workers'?"),
        ({"runtime.workers": "many"}, "runtime.workers: expected a whole number above 0, or a range such as {min: 1, max: 8}, got 'many'"),
        ({"runtime.workers": 0}, "runtime.workers: expected a whole number above 0, or a range such as {min: 1, max: 8}, got 0"),
        ({"runtime.workers": {"mn": 1, "max": 2}}, "runtime.workers: of a range: unknown key 'mn'; did you mean 'min'?"),
        ({"runtime.workers": {"min": 3, "max": 2}}, "of a range: min is 3 and max 2; expected min to be the smaller"),
        ({"runtime.gpus_per_worker": 1.5}, "expected a share of one GPU, such as 0.5, or a whole number of them, got 1.5"),
        ({"runtime.placement": "spred"}, "did you mean 'spread'?"),
        ({"teacher.recipe.epoch": 1}, "teacher.recipe: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"task.dta": "shapes"}, "task 'classification': unknown key 'dta'; did you mean 'data'?"),
        ({"task.data": {"name": "fashion_mnist", "sise": "full"}}, "data 'fashion_mnist': unknown key 'sise'; did you mean 'size'?"),
        ({"students": [{"name": "tiny_cnn", "widht": 3}]}, "model 'tiny_cnn' has no option 'widht'; did you mean 'width'?"),
        ({"methods": ["none", {"name": "kd", "temprature": 3}]}, "method 'kd': unknown key 'temprature'; did you mean 'temperature'?"),
        ({"search": {"trials": 1, "also": {"recipe.lrr": [1, 2]}}}, "unknown key 'recipe.lrr'; did you mean 'recipe.lr'?"),
        ({"name": None}, "key 'name' is missing"),
        ({"teacher.model": None}, "key 'teacher.model' is missing"),
        ({"methods": [{"temperature": 2}]}, "key 'methods.0.name' is missing"),
        ({"name": "../x"}, "name: expected a text to match pattern"),
        ({"seeds": "three"}, "seeds: expected a whole number, got 'three'"),
        ({"seeds": 1.5}, "seeds: expected a whole number, got 1.5"),
        ({"seeds": True}, "seeds: expected a number, got true"),
        ({"recipe.clip_grad": True}, "recipe.clip_grad: expected a number, got true"),
        ({"recipe.epochs": 0}, "recipe.epochs: expected greater than or equal to 1, got 0"),
        ({"recipe.lr": float("nan")}, "recipe.lr: expected a finite number, got nan"),
        ({"recipe.lr": "fast"}, "recipe.lr: expected a number, got 'fast'"),
        ({"recipe": 3}, "recipe: expected keys with values, got 3"),
        ({"teacher": "tiny_cnn"}, "teacher: expected keys with values, got 'tiny_cnn'"),
        ({"methods": "kd"}, "methods: expected a list such as [a, b], got 'kd'"),
        ({"methods": [3]}, "methods.0: expected keys with values, got 3"),
        ({"methods": []}, "methods: expected at least one entry"),
        ({"students": [{"name": "tiny_cnn", "width": "x"}]}, "model 'tiny_cnn': width = 'x', expected a whole number of at least 1"),
        ({"methods": [{"name": "kd", "temperature": "hot"}]}, "method 'kd': temperature: expected a number, got 'hot'"),
        ({"task.val_size": 1_000_000}, "val_size 1000000 is 1000000 of the 12000 training images"),
        ({"task.transfer_size": 1_000_000}, "transfer_size 1000000 is more than the 11800 images"),
        (
            {"recipe.nesterov": True, "recipe.momentum": 0},
            "recipe.optimizer: 'sgd' with schedule 'cosine' can't be made: ValueError: Nesterov",
        ),
        ({"search": {"trials": 1, "also": {"recipe.lr": {"low": -1, "high": 1}}}}, "search.also.recipe.lr: lr: expected greater than 0"),
        ({"search": {"trials": 1, "also": {"recipe.lr": {"low": 1, "high": 0.1}}}}, "a range needs low < high"),
        ({"search": {"trials": 1, "also": {"recipe.optimizer": ["sgd", "adamv"]}}}, "unknown optimizer 'adamv'; did you mean 'adam"),
    ],
)
def test_a_wrong_key_or_value_is_named(kdbench: Kdbench, changes: dict[str, Any], said: str) -> None:
    assert_mistake(run(kdbench, changes), said)


def test_every_wrong_key_of_a_file_has_a_line(kdbench: Kdbench) -> None:
    ended = run(kdbench, {"seed": 3, "recipe.epoch": 1})
    assert ended.code == 2
    assert [line.partition("'")[2].partition("'")[0] for line in ended.err.splitlines()] == ["recipe.epoch", "seed"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["none", "kdd"]}, "methods: unknown method 'kdd'; did you mean 'kd'?"),
        ({"students": ["cifar_resnt8"]}, "unknown model 'cifar_resnt8'; did you mean 'cifar_resnet8'?"),
        ({"teacher.model": "resnte18"}, "unknown model 'resnte18'; did you mean 'resnet18'?"),
        ({"task": "clasification"}, "task: unknown task 'clasification'; did you mean 'classification'?"),
        ({"task.data": "fashion_mnits"}, "unknown data 'fashion_mnits'; did you mean 'fashion_mnist'?"),
        ({"recipe.optimizer": "sdg"}, "recipe.optimizer: unknown optimizer 'sdg'; did you mean 'sgd'?"),
        ({"recipe.schedule": "cosin"}, "recipe.schedule: unknown schedule 'cosin'; did you mean 'cosine'?"),
        (
            {"recipe.precision": "fp23"},
            "recipe.precision: expected 'auto', 'fp64', 'fp32', 'bf16' or 'fp16', got 'fp23'; did you mean 'fp32'?",
        ),
        ({"search": {"trials": 1, "sampler": "rndom"}}, "search.sampler: expected 'tpe', 'random'"),
        ({"search": {"trials": 1, "scheduler": "ahsa"}}, "got 'ahsa'; did you mean 'asha'?"),
        ({"task.data": {"name": "fashion_mnist", "size": "ful"}}, "size: expected 'embedded' or 'full', got 'ful'; did you mean 'full'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(kdbench: Kdbench, changes: dict[str, Any], said: str) -> None:
    assert_mistake(run(kdbench, changes), said)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("recipe.epoch=3", "unknown key 'recipe.epoch'; did you mean 'epochs'?"),
        ("recipe.epochs", "--set recipe.epochs: expected key=value, such as --set recipe.epochs=3"),
        ("recipe=3", "recipe: expected keys with values, got 3"),
        ("recipe.lr={", "--set recipe.lr={: the value is not valid YAML"),
        ("recipe.lr=2026-13-45", "the value is not valid YAML"),
        ("recipe.lr=!!python/name:os.system", "the value is not valid YAML"),
        ("seeds.x=3", "--set seeds.x=3: seeds is a int, it has no keys"),
        ("methods.kd=3", "methods.1: expected keys with values, got 3"),
        ("methods.kdd.temperature=3", "there is no 'kdd'; did you mean 'kd'?"),
        ("methods.kd.temprature=3", "unknown key 'temprature'; did you mean 'temperature'?"),
        ("students.7.width=3", "--set students.7.width=3: there is no '7'; there is: tiny_cnn"),
        ("students.tiny_cnn.widht=3", "has no option 'widht'; did you mean 'width'?"),
        ("method.temprature=3", "none of the methods has a parameter 'temprature'; did you mean 'temperature'?"),
        ("method.x.y=3", "expected method.PARAMETER=value, such as --set method.temperature=2"),
    ],
)
def test_a_wrong_override_is_named(kdbench: Kdbench, assignment: str, said: str) -> None:
    assert_mistake(run(kdbench, {}, "--set", assignment), said)


@pytest.mark.parametrize("assignment", ["students.0.width=6", "students.tiny_cnn.width=6"])
def test_a_list_element_is_overridden_by_place_or_name(kdbench: Kdbench, assignment: str) -> None:
    assert load_experiment(Path(write({})), [assignment]).students[0].options == {"width": 6}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["kd", "kd"]}, "methods: 'kd' stands twice; give one of them another `label`"),
        (
            {"students": ["tiny_cnn", {"name": "tiny_cnn", "width": 8}]},
            "students: 'tiny_cnn' stands twice; give one of them another `label`",
        ),
        ({"teacher": None}, "method kd learns from a teacher, and tiny names none; add `teacher: {model: ...}`"),
        ({"task": "segmentation", "students": ["tiny_fcn"], "methods": ["nkd"]}, "method nkd is for classification, not for segmentation"),
        ({"task.name": "segmentation"}, "task 'segmentation' needs one label per pixel; data 'fashion_mnist' gives one per image"),
        ({"students": ["tiny_fcn"]}, "model 'tiny_fcn' gives [10, 28, 28] for an image"),
        ({"runtime.workers": 4096}, "this machine has"),
        ({"runtime.workers": {"min": 4096, "max": 8192}}, "4096 workers of 1 CPU need 4096 CPUs, this machine has"),
        ({"runtime.workers": {"max": 8}, "recipe.batch_size": 7}, "recipe.batch_size: 7 images are too few for 8 workers"),
        ({"runtime.workers": {"max": 8}, "recipe.accumulate": 2}, "recipe.accumulate needs a fixed number of workers"),
        ({"runtime.gpus_per_worker": 512}, "use gpus_per_worker: 0 to train on CPUs"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(kdbench: Kdbench, changes: dict[str, Any], said: str) -> None:
    assert_mistake(run(kdbench, changes), said)


def test_a_batch_that_can_not_be_cut_among_the_workers_is_refused(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdbench.distributed.cluster.available_cpus", lambda: 2)
    ended = run(kdbench, {"runtime.workers": 2, "recipe.batch_size": 101})
    assert_mistake(ended, "recipe.batch_size: 101 can't be cut into 2 equal parts, one a worker; make it a multiple of 2")


def test_more_workers_than_the_machine_has_are_refused_with_the_most_that_fit(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdbench.distributed.cluster.available_cpus", lambda: 6)
    ended = run(kdbench, {"runtime": {"workers": 4, "cpus_per_worker": 2}})
    assert_mistake(ended, "4 workers of 2 CPU need 8 CPUs, this machine has 6; use at most 3")


def test_a_mistake_about_the_student_is_found_before_the_teacher_is_trained(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_trained", lambda *_: pytest.fail("the teacher was trained first"))
    assert_mistake(run(kdbench, {"students": [{"name": "tiny_cnn", "widht": 3}]}), "did you mean 'width'?")


def test_two_students_and_two_methods_of_one_name_are_told_apart_by_their_labels(kdbench: Kdbench) -> None:
    students = [{"name": "tiny_cnn", "label": "narrow", "width": 4}, {"name": "tiny_cnn", "label": "wide", "width": 8}]
    methods = ["none", "kd", {"name": "kd", "label": "kd as published"}]  # the same training as kd, and a row of its own
    assert run(kdbench, {"students": students, "methods": methods}).code == 0
    boards = json.loads(kdbench("leaderboard", "--results", "results", "--format", "json").out)["boards"]
    assert {board["student"]: sorted(row["method"] for row in board["rows"]) for board in boards} == {
        name: ["kd", "kd as published", "none"] for name in ("narrow", "wide")
    }
    wide = next(record for record in ResultStore("results").scan(student="wide"))
    assert kdbench("export", wide.run_id, "--results", "results").code == 0
    assert Path(f"wide-{wide.label.replace(' ', '_')}-{wide.run_id}.safetensors").exists()


# --- code of the user's own ------------------------------------------------------------------------------------------

OWN_CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(784 * in_channels, num_classes)

    def forward(self, images):
        return self.fc(images.flatten(1))

class NeverRuns(Net):
    def forward(self, images):
        raise KeyError("logits\\nand more")

class FailsInTraining(Net):
    def forward(self, images):
        return self.fc(images.flatten(1)) if not self.training else {}["logits"]

class NeverBuilt(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        open("weights that are nowhere")

def data():
    return {}["images"]
"""


@pytest.fixture
def own_code(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules in the working directory."""
    Path("own_code.py").write_text(OWN_CODE)
    Path("raises.py").write_text("import torch\n\n1 / 0\n")
    Path("leaves.py").write_text("import sys\nsys.exit(0)\n")
    yield
    for name in ("own_code", "raises", "leaves"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"students": ["nowhere.at_all:Net"]}, "model 'nowhere.at_all:Net': there is no module 'nowhere' on the Python path"),
        ({"students": ["own_code:Nett"]}, "model 'own_code:Nett': module 'own_code' has no 'Nett'; did you mean 'Net'?"),
        ({"students": ["own_code:"]}, "model 'own_code:': expected package.module:attribute"),
        ({"students": ["raises:Net"]}, "importing 'raises' failed: ZeroDivisionError: division by zero (raises.py, line 3)"),
        ({"students": ["leaves:Net"]}, "importing 'leaves' failed: SystemExit: 0 (leaves.py, line 2)"),
        ({"students": ["os:path"]}, "expected a class or a function that builds a model, found a module"),
        ({"students": ["os:getcwd"]}, "expected it to build an nn.Module, it built a str"),
        (
            {"students": ["own_code:NeverRuns"]},
            "doesn't work on images [1, 28, 28] of data 'fashion_mnist': KeyError: 'logits\\nand more' (own_code",
        ),
        (
            {"students": ["own_code:NeverBuilt"]},
            "FileNotFoundError: [Errno 2] No such file or directory: 'weights that are nowhere' (own_code.py",
        ),
        ({"methods": ["none", "raises:Method"]}, "method 'raises:Method': importing 'raises' failed"),
        ({"methods": ["none", "os:path"]}, "method 'os:path' is no subclass of kdbench.methods.base.Method"),
        ({"task": "os:path"}, "task 'os:path' must be a subclass of kdbench.tasks.base.Task"),
        ({"task.data": "own_code:data"}, "data 'own_code:data': KeyError: 'images' (own_code.py, line 26)"),
    ],
)
def test_own_code_that_can_not_be_used_is_named_with_file_and_line(
    kdbench: Kdbench, own_code: None, changes: dict[str, Any], said: str
) -> None:
    assert_mistake(run(kdbench, changes), said)


def test_a_model_that_fails_in_training_is_one_line_and_its_traceback_is_in_a_log(kdbench: Kdbench, own_code: None) -> None:
    ended = run(kdbench, {"students": ["own_code:FailsInTraining"], "methods": ["none"]})
    assert ended.code == 1
    assert "Traceback" not in ended.out + ended.err
    told = ended.err.splitlines()[-1]
    assert told.startswith("  none seed 0: KeyError: 'logits' (own_code.py, line 19); traceback in ")
    assert "Traceback (most recent call last)" in Path(told.rpartition(" ")[2]).read_text()
    assert results() == ["teacher teacher ok"]  # code that fails is no property of a method: the next run tries again


def test_a_teacher_that_fails_in_training_ends_the_run(kdbench: Kdbench, own_code: None) -> None:
    ended = run(kdbench, {"teacher.model": "own_code:FailsInTraining"})
    assert_one_line(ended, 1, "teacher own_code:FailsInTraining: KeyError: 'logits' (own_code.py, line 19); traceback in ")
    assert results() == []


def test_a_fault_that_nobody_foresaw_is_one_line_and_its_traceback_is_in_a_file(
    kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(running, "_teacher_unit", lambda *_: 1 / 0)
    ended = run(kdbench)
    assert_one_line(ended, 1, "ZeroDivisionError: division by zero", "; traceback in ")
    assert "ZeroDivisionError" in Path(ended.err.strip().rpartition(" ")[2]).read_text()


def test_the_installed_script_finds_a_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kdbench").write_text("from kdbench.cli import main\nmain()\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own_net.py").write_text(OWN_CODE)
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "bin" / "kdbench"), "taps", "own_net:Net", "--image", "1x28x28"]
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("own_net:Net on images 1x28x28")


def test_the_place_of_an_error_is_the_users_last_line_and_not_a_librarys() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.nn.functional.conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 1, 1))
    told = in_one_line(caught.value)
    assert told.startswith("RuntimeError: ")
    assert "(test_bad_input.py, line " in told
    assert len(told.splitlines()) == 1


# --- data and weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_kept_open() -> Iterator[None]:
    """Data sets are opened anew, and forgotten again."""
    sources._opened.cache_clear()
    tasks._built.cache_clear()
    yield
    sources._opened.cache_clear()
    tasks._built.cache_clear()


def test_truncated_data_of_the_package_is_refused(kdbench: Kdbench, nothing_kept_open: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("cut.parquet").write_bytes(fashion_mnist.EMBEDDED.read_bytes()[:-1])
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", Path("cut.parquet"))
    assert_mistake(run(kdbench), "cut.parquet is damaged: 5377004 bytes", "install kdbench again")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_truncated_data_of_the_users_own_is_refused(
    kdbench: Kdbench, nothing_kept_open: None, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    for file in fashion_mnist._FILES.values():
        Path(f"{file.name}{ending}").write_bytes(b"\x1f\x8b\x08\x00" + bytes(100))
    monkeypatch.setenv("KDBENCH_DATA", str(Path.cwd()))
    ended = run(kdbench, {"task.data": {"name": "fashion_mnist", "size": "full"}})
    assert_mistake(ended, f"train-images-idx3-ubyte{ending} is damaged", "let KDBENCH_DATA name a folder with whole files")


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, ("exploded",))


def _weights(kind: str) -> str:
    """A file of weights with something wrong."""
    if kind == "100 classes":
        save_weights(tiny_cnn(num_classes=100, in_channels=1, width=4).state_dict(), Path("w.safetensors"))
    elif kind == "another model":
        save_weights({"conv.weight": torch.zeros(3)}, Path("w.safetensors"))
    elif kind == "another width":
        save_weights(tiny_cnn(num_classes=10, in_channels=1, width=8).state_dict(), Path("w.safetensors"))
    elif kind == "truncated":
        save_weights(tiny_cnn(num_classes=10, in_channels=1, width=4).state_dict(), Path("w.safetensors"))
        Path("w.safetensors").write_bytes(Path("w.safetensors").read_bytes()[:-10])
    elif kind == "garbage":
        Path("w.pt").write_bytes(b"no weights at all")
        return "w.pt"
    elif kind == "code":
        Path("w.pt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
        return "w.pt"
    return "w.safetensors"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "there is no file"),
        ("100 classes", "the head has 100 classes, the data has 10"),
        ("another model", "do not fit model 'tiny_cnn'"),
        ("another width", "do not fit model 'tiny_cnn'"),
        ("truncated", "not a safetensors file"),
        ("garbage", "not a safetensors file, nor a torch file of plain tensors"),
        ("code", "not a safetensors file, nor a torch file of plain tensors"),
    ],
)
def test_weights_of_a_teacher_that_do_not_fit_are_refused(kdbench: Kdbench, kind: str, said: str) -> None:
    name = _weights(kind)
    assert_mistake(run(kdbench, {"teacher.weights": name}), name, said)
    assert not Path("exploded").exists()


# --- what lies in the results folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    running.run(Experiment.model_validate(TINY), folder / "results", running_watch())
    return folder / "results"


def running_watch() -> Any:
    from kdbench.benchmark.watch import Unwatched

    return Unwatched()


@pytest.fixture
def done(kdbench: Kdbench, finished: Path) -> Path:
    """A copy of it in the working directory."""
    return Path(shutil.copytree(finished, "results"))


@pytest.mark.parametrize("command", ["run tiny.yaml --no-mlflow", "leaderboard", "export 01A"])
@pytest.mark.parametrize("kind", ["empty", "cut", "garbage", "foreign", "other version", "no json"])
def test_a_damaged_record_is_named_by_every_command_that_reads_it(kdbench: Kdbench, done: Path, kind: str, command: str) -> None:
    write({})
    path = next((done / "v1").rglob("kd/*.parquet"))
    table = pq.ParquetFile(path).read()
    column = table.column_names.index
    if kind == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    elif kind == "other version":
        pq.write_table(table.set_column(column("schema_version"), "schema_version", pa.array([None], pa.int64())), path)
    elif kind == "no json":
        pq.write_table(table.set_column(column("recipe"), "recipe", pa.array(["{"])), path)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-20], "garbage": bytes(1000)}[kind])
    assert_one_line(kdbench(*command.split(), "--results", "results"), 2, path.name)


def test_damaged_weights_of_a_teacher_are_trained_again_and_nothing_else(kdbench: Kdbench, done: Path) -> None:
    weights = next((done / "teachers").rglob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    before = {record.run_id for record in ResultStore(done).scan()}
    assert run(kdbench).code == 0
    assert weights.read_bytes() == whole
    new = [record for record in ResultStore(done).scan() if record.run_id not in before]
    assert [record.role for record in new] == ["teacher"]


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "other size", "entry", "index"])
def test_a_damaged_teacher_cache_is_made_again(kdbench: Kdbench, done: Path, kind: str) -> None:
    logits, manifest, entry, index = (
        next((done / "cache").rglob(name)) for name in ("logits.npy", "logits.json", "entry.json", "index.npy")
    )
    whole = {path: path.read_bytes() for path in (logits, manifest, entry, index)}
    if kind == "cut":
        logits.write_bytes(whole[logits][:-100])
    elif kind == "empty":
        logits.write_bytes(b"")
    elif kind == "garbage":
        manifest.write_text("{")
    elif kind == "other size":
        manifest.write_text(manifest.read_text().replace('"images": 200', '"images": 20'))
    elif kind == "entry":
        entry.write_text("[]")
    else:
        index.write_bytes(whole[index][:-1] + b"\xff")
    ended = run(kdbench, {"seeds": 2})
    assert ended.code == 0, ended.err
    assert "it is made again" in ended.out
    assert {path: path.read_bytes() for path in whole} == whole
    assert len(results()) == 5


def test_a_damaged_choice_of_precision_is_measured_again(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_fastest", lambda *_: ("fp32", "contiguous"))
    changes = {"recipe.precision": "auto", "recipe.compile": "auto", "methods": ["none"], "teacher": None}
    assert run(kdbench, changes).code == 0
    choice = next(Path("results/choices").iterdir())
    for content in ("", "{", "[]", '{"precision": "fp9", "memory_format": "contiguous"}'):
        choice.write_text(content)
        assert run(kdbench, changes).code == 0
        assert json.loads(choice.read_text()) == {"precision": "fp32", "memory_format": "contiguous", "compile": {"2": False}}
    assert results() == ["final none ok"]


AXES = (Parameter("temperature", Range(1, 8), 4.0),)


def study(path: Path) -> MethodStudy:
    return MethodStudy(path, "s", AXES, trials=3, sampler="random", seed=0)


@pytest.mark.parametrize("content", [b"garbage\nmore\n", b'{"a": 1}\n', b"[]\n{}\n", bytes(range(128, 256)) + b"\n" * 2])
def test_a_damaged_journal_of_a_search_is_named(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    Path("s.journal").write_bytes(content)
    monkeypatch.setattr(Layout, "study", lambda *_: Path("s.journal"))
    ended = run(kdbench, {"search": {"trials": 1}})
    assert_one_line(ended, 2, "the journal of a search, s.journal, is damaged", "delete it to have that search run again")
    assert Path("s.journal").read_bytes() == content


def test_a_journal_whose_last_line_was_cut_off_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "s.journal"
    first = study(journal)
    first.complete(first.ask().number, [50.0], 1.0, 1.0)
    point = first.ask()
    lines = journal.read_bytes()
    journal.write_bytes(lines + b'{"op_code": 6, "worker')
    second = study(journal)
    assert second.ask() == point
    second.complete(point.number, [60.0], 1.0, 1.0)
    assert [trial.values for trial in study(journal).study.trials] == [[50.0], [60.0]]


def test_an_unknown_run_is_refused(kdbench: Kdbench, done: Path) -> None:
    assert_one_line(kdbench("export", "01NOWHERE", "--results", "results"), 2, "run '01NOWHERE'", "kdbench leaderboard --format json")


@pytest.mark.parametrize("command", ["leaderboard --format tabel", "list methods --format jsn", "export 01 --format onx"])
def test_an_unknown_format_is_answered_with_the_nearest(kdbench: Kdbench, done: Path, command: str) -> None:
    run_id = next(record.run_id for record in ResultStore(done).scan(role="final"))
    ended = kdbench(*command.replace("01", run_id).split(), *([] if "list" in command else ["--results", "results"]))
    assert_one_line(ended, 2, "unknown format", "; did you mean ")


# --- a results folder that can't be written, a disk that fills up ----------------------------------------------------


@pytest.mark.parametrize("folder", ["taken", "taken/below", "/proc/kdbench", "x" * 300])
def test_a_results_folder_that_can_not_be_written_is_refused(kdbench: Kdbench, folder: str) -> None:
    Path("taken").write_text("")
    ended = kdbench("run", write({}), "--results", folder, "--no-mlflow")
    assert_mistake(ended, "can't be written", "choose another with --results DIR or the variable KDBENCH_RESULTS")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s4://bucket/results", ["no storage is called 's4'; did you mean 's3'?"]),
        ("s3://", ["expected s3://bucket/folder, got no bucket"]),
        ("s3://me:hunter22@bucket/results", ["holds credentials or options", "set credentials in the environment"]),
        ("s3://bucket/results?secret=hunter22", ["holds credentials or options"]),
    ],
)
def test_an_address_that_can_not_be_used_is_refused_and_credentials_are_not_repeated(
    kdbench: Kdbench, address: str, words: list[str]
) -> None:
    for ended in (kdbench("run", write({}), "--results", address), kdbench("run", write({"results": address}))):
        assert_mistake(ended, *words)
        assert "hunter22" not in ended.err + ended.out
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_credentials_in_a_file_are_refused_even_where_another_place_is_given(kdbench: Kdbench) -> None:
    ended = kdbench("run", write({"results": "s3://me:hunter22@bucket/results"}), "--results", "here")
    assert_mistake(ended, "tiny.yaml: results: ", "holds credentials")
    assert "hunter22" not in ended.err + ended.out


def test_a_storage_without_its_driver_is_told_what_to_install(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # where another test has loaded it
    monkeypatch.setenv("KDBENCH_WORKING_COPIES", "copies")
    assert_mistake(kdbench("leaderboard", "--results", "s3://bucket/results"), "pip install 'kdbench[s3]'")


def test_a_file_is_no_results_folder_to_read_from(kdbench: Kdbench) -> None:
    assert_one_line(kdbench("leaderboard", "--results", write({})), 2, "tiny.yaml is a file, expected a results folder")


@pytest.fixture
def small_disk(kdbench: Kdbench) -> Iterator[Callable[[str], None]]:
    """Makes ./results a file system of its own of the given size, or gives it that size."""
    folder = Path("results").absolute()
    folder.mkdir()

    def resize(size: str) -> None:
        mounted = ",remount" if os.path.ismount(folder) else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{mounted}", "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kilobytes", [4, 40, 100, 160])
@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_a_disk_that_fills_up_ends_the_run_and_with_more_space_it_goes_on(
    kdbench: Kdbench, small_disk: Callable[[str], None], kilobytes: int
) -> None:
    small_disk(f"{kilobytes}k")
    changes = {"runtime.checkpoint_seconds": 0}
    assert_one_line(run(kdbench, changes), 1, "the disk is full: ", "free some space and run the same command again, finished work is kept")
    finished = results()
    assert set(finished) < set(WHOLE)
    small_disk("50m")
    assert run(kdbench, changes).code == 0
    assert results() == WHOLE


class _Fault:
    """Stands in for os.fsync, through which everything goes that is kept: the n-th call fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.left, self.error, self.sync = 0, error, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error
        self.sync(descriptor)

    def at(self, call: int) -> None:
        self.left = call

    @property
    def came(self) -> bool:
        return self.left <= 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full: "),
        (KeyboardInterrupt(), 130, "Stopped. What is finished is kept; to go on: kdbench run tiny.yaml"),
    ],
)
def test_whichever_write_fails_nothing_is_half_written_and_the_same_command_goes_on(
    kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    fault = _Fault(monkeypatch, error)
    seen = 0
    for call in range(1, 100):
        shutil.rmtree("results", ignore_errors=True)
        fault.at(call)
        ended = run(kdbench, TINIER)
        if not fault.came:
            break
        seen += 1
        assert ended.code == code, ended
        assert said in ended.err
        assert "Traceback" not in ended.err
        assert len(ended.err.strip().splitlines()) == 1
        results()
        assert run(kdbench, TINIER).code == 0
        assert results() == WHOLE
    assert seen >= 10
    assert ended.code == 0


@pytest.mark.parametrize("moment", ["progress", "epoch", "finished", "note"])
def test_an_interrupt_at_any_step_leaves_whole_results_only(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"kdbench.display.Display.{moment}", interrupted)
        ended = run(kdbench)
    assert ended.code == 130
    assert "Stopped. What is finished is kept; to go on: kdbench run tiny.yaml" in ended.err
    assert set(results()) < set(WHOLE)
    assert run(kdbench).code == 0
    assert results() == WHOLE


def test_an_interrupt_while_the_teachers_outputs_are_kept_leaves_what_the_next_run_goes_on_with(
    kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdbench.training.cache_streams.StreamFiles.mark", interrupted)
        assert run(kdbench).code == 130
    assert results() == ["teacher teacher ok"]
    assert run(kdbench).code == 0
    assert results() == WHOLE


def test_a_checkpoint_that_does_not_fit_says_that_the_disk_is_full(small_disk: Callable[[str], None]) -> None:
    small_disk("64k")
    with pytest.raises(DiskFull, match=r"the disk is full: results/a\.pt"):
        save_checkpoint({"a": torch.zeros(100_000)}, Path("results/a.pt"))
    assert list(Path("results").iterdir()) == []


def test_a_full_disk_in_a_process_of_ray_ends_the_run_in_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise DiskFull("the disk is full: x was not written")

    monkeypatch.setattr("kdbench.training.work.fit", full)
    unit = Unit.model_validate(
        {"role": "final", "experiment": "e", "protocol_hash": "p", "split_hash": "s", "task": TINY["task"], "seed": 0}
        | {"student": "tiny_cnn", "method": "none", "recipe": {}}
    )
    ending = unpack_ending(pack_ending(attempt(unit, LocalSession(), Layout(tmp_path))))
    assert ending == Ending(crash="the disk is full: x was not written", storage_failed=True)


# --- trainings that diverge ------------------------------------------------------------------------------------------


def test_a_teacher_that_diverges_ends_the_run(kdbench: Kdbench) -> None:
    ended = run(kdbench, {"teacher.recipe.lr": 1e30})
    assert_one_line(ended, 1, "teacher tiny_cnn: the loss became nan in epoch 1 of 1 (lr 1e+30); lower teacher.recipe.lr")
    assert results() == []


def test_a_final_that_diverges_is_on_record_as_failed_and_the_board_says_so(kdbench: Kdbench) -> None:
    ended = run(kdbench, {"methods": ["none", {"name": "kd", "kd_weight": 1e38}]})
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "kdbench: 1 of the trainings could not be finished:",
        "  kd seed 0: the loss became nan in epoch 1 of 1 (lr 0.1)",
    ]
    assert results() == ["final kd failed", "final none ok", "teacher teacher ok"]
    [board] = json.loads(kdbench("leaderboard", "--results", "results", "--format", "json").out)["boards"]
    rows = {row["method"]: row for row in board["rows"]}
    assert {name: (row["seeds"], row["failed"]) for name, row in rows.items()} == {"none": (1, 0), "kd": (1, 1)}
    assert rows["kd"]["mean"] == rows["none"]["mean"]
    assert "1 failed" in kdbench("leaderboard", "--results", "results").out


def test_a_failed_final_is_not_trained_again_and_the_exit_code_stays(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(kdbench, {"recipe.lr": 1e30})
    monkeypatch.setattr(running, "run_here", lambda *_: pytest.fail("something was trained again"))
    again = run(kdbench, {"recipe.lr": 1e30})
    assert (again.code, again.err) == (first.code, first.err)


def test_a_full_disk_is_no_user_error() -> None:
    assert not issubclass(DiskFull, UserError)
    assert DiskFull.exit_code == 1
