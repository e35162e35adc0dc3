"""Whatever is wrong in an experiment's file or in --set is one readable line that names the key and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdbench.benchmark import teacher
from kdbench.experiment import load_experiment
from kdbench.records.store import ResultStore
from tests.bad_input.tiny_experiment import TINY, assert_mistake, run, write
from tests.console import Kdbench

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
        (b"name: a\nname: b", "line 2, column 1: not valid YAML: the key 'name' is listed twice"),
        (b"name: a\n---\nname: b", "another document"),
        (bytes(range(256)), "can't be read as text"),
        ("name: x".encode("utf-16"), "can't be read as text"),
        (b"name: x\0", "not valid YAML: unacceptable character #x0000"),
        (b"name: !!python/object/apply:os.mkdir [made]", "line 1, column 7: not valid YAML: could not determine a constructor for the tag"),
        (b"name: !!int x", "line 1, column 7: not valid YAML: 'x' is no int"),
        (b"? [a]\n: 1", "['a'] can't be a key"),
        (b"a: " + b"[" * 5000, "line 1, column 54: not valid YAML: it is nested more than 50 levels deep"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(kdbench: Kdbench, content: bytes, said: str) -> None:
    Path("broken.yaml").write_bytes(content)
    assert_mistake(kdbench("run", "broken.yaml", "--results", "results"), "broken.yaml: ", said)
    assert not Path("made").exists()


def test_a_file_that_is_not_there_is_answered_with_the_nearest(kdbench: Kdbench) -> None:
    write({}, "tiny.yaml")
    assert_mistake(kdbench("run", "tyni.yaml"), "tyni.yaml: there is no such file; did you mean 'tiny.yaml'?")


def test_a_link_to_nothing_is_no_experiment(kdbench: Kdbench) -> None:
    Path("link.yaml").symlink_to("nowhere")
    assert_mistake(kdbench("run", "link.yaml"), "link.yaml: can't be read: it is a link to nothing")


def test_a_folder_is_no_experiment(kdbench: Kdbench) -> None:
    Path("folder").mkdir()
    assert_mistake(kdbench("run", "folder"), "folder: can't be read: it is a folder, expected a regular file")


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
        (
            {"runtime.workers": "many"},
            "runtime.workers: expected a whole number from 1 to 10000, or a range such as {min: 1, max: 8}, got 'many'",
        ),
        ({"runtime.workers": 0}, "runtime.workers: expected a whole number from 1 to 10000, or a range such as {min: 1, max: 8}, got 0"),
        ({"runtime.workers": {"mn": 1, "max": 2}}, "runtime.workers: of a range: unknown key 'mn'; did you mean 'min'?"),
        ({"runtime.workers": {"min": 3, "max": 2}}, "of a range: min is 3 and max 2; expected min to be the smaller"),
        ({"runtime.gpus_per_worker": 1.5}, "expected auto, a share of one GPU, such as 0.5, or a whole number of them up to 1024, got 1.5"),
        (
            {"runtime.gpus_per_worker": -1},
            "expected auto, a share of one GPU, such as 0.5, or a whole number of them up to 1024, got -1",
        ),
        (
            {"runtime.gpus_per_worker": "atuo"},
            "expected auto, a share of one GPU, such as 0.5, or a whole number of them up to 1024, got 'atuo'",
        ),
        ({"runtime.placement": "spred"}, "did you mean 'spread'?"),
        ({"teacher.recipe.epoch": 1}, "teacher.recipe: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"task.dta": "shapes"}, "task 'classification': unknown key 'dta'; did you mean 'data'?"),
        ({"task.data": {"name": "fashion_mnist", "sise": "full"}}, "data 'fashion_mnist': unknown key 'sise'; did you mean 'size'?"),
        ({"students": [{"name": "tiny_cnn", "widht": 3}]}, "model 'tiny_cnn' has no option 'widht'; did you mean 'width'?"),
        ({"methods": ["none", {"name": "kd", "temprature": 3}]}, "method 'kd': unknown key 'temprature'; did you mean 'temperature'?"),
        ({"search": {"trials": 1, "also": {"recipe.lrr": [1, 2]}}}, "unknown key 'recipe.lrr'; did you mean 'recipe.lr'?"),
        ({"results": "a", "storage": "b"}, "tiny.yaml: `results` and `storage` are two names of one key; give one of them"),
        ({"storage": 3}, "tiny.yaml: storage: expected a text, got 3"),
        ({"name": None}, "key 'name' is missing"),
        ({"teacher.model": None}, "key 'teacher.model' is missing"),
        ({"methods": [{"temperature": 2}]}, "key 'methods.0.name' is missing"),
        ({"name": "../x"}, "name: expected a text to match pattern"),
        ({"seeds": "three"}, "seeds: expected a whole number from 1 to 1000, or {start: 3, max: 12, until: decided}, got 'three'"),
        ({"seeds": 1.5}, "seeds: expected a whole number from 1 to 1000, or {start: 3, max: 12, until: decided}, got 1.5"),
        ({"seeds": True}, "seeds: expected a number, got true"),
        ({"seeds": {"max": 12}}, "seeds: of seeds until decided: key 'until' is missing"),
        ({"seeds": {"start": 3, "max": 2, "until": "decided"}}, "max is 2 and start 3; expected max to be the larger"),
        ({"seeds": {"start": 2, "max": 40, "until": "decided"}}, "from 2 to 40 seeds there are 6 looks, expected at most 4; raise start"),
        (
            {"methods": ["none"], "seeds": {"max": 12, "until": "decided"}},
            "seeds.until: decided compares methods with kd, which is not among them; add kd",
        ),
        ({"seeds": {"max": 12, "until": "decided"}, "control_seeds": 9}, "seeds.until: decided and control_seeds do not go together"),
        ({"methods": ["none", {"name": "kd", "label": "kd@default"}]}, "ends as kdbench's own rows below a board do; leave the @ out"),
        ({"cost_control": True, "methods": ["kd"]}, "cost_control trains none for longer, which is not among the methods"),
        ({"seeds": 3, "control_seeds": 2}, "control_seeds is 2 and seeds 3; expected at least as many"),
        ({"search": {"trials": 2, "studies": 3}, "control_seeds": 9}, "search.studies above 1 and control_seeds do not go together"),
        ({"search": {"trials": 2, "budget": {}}}, "search.budget: expected one of device_hours and epochs, such as {device_hours: 0.5}"),
        ({"search": {"trials": 2, "budget": {"epochs": 1, "device_hours": 1}}}, "search.budget: expected one of device_hours and epochs"),
        ({"search": {"trials": 2, "budget": {"epoch": 1}}}, "unknown key 'search.budget.epoch'; did you mean 'epochs'?"),
        ({"recipe.clip_grad": True}, "recipe.clip_grad: expected a number, got true"),
        ({"recipe.epochs": 0}, "recipe.epochs: expected greater than or equal to 1, got 0"),
        ({"recipe.lr": float("nan")}, "recipe.lr: expected a finite number, got nan"),
        ({"recipe.lr": "fast"}, "recipe.lr: expected a number, got 'fast'"),
        ({"recipe": 3}, "recipe: expected keys with values, got 3"),
        ({"teacher": "tiny_cnn"}, "teacher: expected keys with values, got 'tiny_cnn'"),
        ({"methods": "kd"}, "methods: expected a list such as [a, b], got 'kd'"),
        ({"methods": [3]}, "methods.0: expected keys with values, got 3"),
        ({"methods": []}, "methods: expected at least one entry"),
        ({"students": [{"name": "tiny_cnn", "width": "x"}]}, "model 'tiny_cnn': width = 'x', expected a whole number from 1 to 1024"),
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
    assert not Path("results").exists()  # nothing is left behind, not even an empty folder


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("recipe.epoch=3", "unknown key 'recipe.epoch'; did you mean 'epochs'?"),
        ("recipe.epochs", "--set recipe.epochs: expected key=value, such as --set recipe.epochs=3"),
        ("recipe=3", "recipe: expected keys with values, got 3"),
        ("recipe.lr={", "--set recipe.lr={: the value, line 1, column 2: not valid YAML: expected the node content"),
        ("recipe.lr=!!int x", "--set recipe.lr=!!int x: the value, line 1, column 1: not valid YAML: 'x' is no int"),
        ("recipe.lr=!!python/name:os.system", "not valid YAML: could not determine a constructor for the tag"),
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
        (
            {"task": "segmentation", "students": ["tiny_fcn"], "methods": ["nkd"]},
            "method nkd reads class logits; networks of task segmentation give pixel logits",
        ),
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
    monkeypatch.setattr(teacher, "_trained", lambda *_: pytest.fail("the teacher was trained first"))
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
