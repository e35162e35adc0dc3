"""Numbers, names and paths that make no sense are one line before anything is trained: exit code 2, no results folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdbench.benchmark import teacher
from kdbench.experiment import Experiment, load_experiment
from kdbench.records.store import path_name
from kdbench.storage.folder import local_path
from tests.bad_input.tiny_experiment import assert_one_line, run, write
from tests.console import Ended, Kdbench

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHAPES = {"name": "shapes", "target": "class"}
BEYOND = 2**63


def assert_refused(ended: Ended, *said: str) -> None:
    assert_one_line(ended, 2, *said)
    assert len(ended.err) < 600
    assert not Path("results").exists()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seeds", 10**9, "seeds: expected a whole number from 1 to 1000, or {start: 3, max: 12, until: decided}, got 1000000000"),
        ("seeds", 10**30, "seeds: expected a whole number from 1 to 1000, or {start: 3, max: 12, until: decided}, got 1"),
        ("seeds", 0, "seeds: expected a whole number from 1 to 1000, or {start: 3, max: 12, until: decided}, got 0"),
        ("data_seed", -1, "data_seed: expected greater than or equal to 0, got -1"),
        ("data_seed", BEYOND, "data_seed: expected less than 9223372036854775808, got 9223372036854775808"),
        ("teacher.seed", -1, "teacher.seed: expected greater than or equal to 0"),
        ("teacher.seed", BEYOND, "teacher.seed: expected less than 9223372036854775808"),
        ("search", {"trials": 2, "seed": -1}, "search.seed: expected greater than or equal to 0"),
        ("search", {"trials": 2, "seed": BEYOND}, "search.seed: expected less than 9223372036854775808"),
        ("task.split_seed", -1, "split_seed: expected greater than or equal to 0"),
        ("task.split_seed", BEYOND, "split_seed: expected less than 9223372036854775808"),
        ("task.data", SHAPES | {"seed": -1}, "seed: expected greater than or equal to 0"),
        ("task.data", SHAPES | {"seed": BEYOND}, "seed: expected less than 9223372036854775808"),
        ("recipe.epochs", 10**400, "recipe.epochs: expected less than or equal to 1000000, got 1"),
        ("recipe.batch_size", 10**30, "recipe.batch_size: expected less than or equal to 1048576, got 1"),
        ("recipe.accumulate", 10**9, "recipe.accumulate: expected less than or equal to 1048576"),
        ("recipe.warmup_epochs", 1e300, "recipe.warmup_epochs: expected less than or equal to 1000000"),
        ("recipe.milestones", [1, 1e9], "recipe.milestones.1: expected less than or equal to 1000000"),
        ("recipe.views", 10**9, "recipe.views: expected less than or equal to 100000"),
        ("recipe.lr", 1e300, "recipe.lr: expected less than or equal to 10000"),
        ("recipe.lr", 10**400, "recipe.lr: expected a number, got 1"),
        ("recipe.weight_decay", 1e300, "recipe.weight_decay: expected less than or equal to 10000"),
        ("recipe.clip_grad", 1e300, "recipe.clip_grad: expected less than or equal to 1000000000"),
        ("recipe.augment", {"crop": 10**6}, "recipe.augment.crop: expected less than or equal to 256, got 1000000"),
        ("teacher.recipe.epochs", 10**30, "epochs: expected less than or equal to 1000000"),
        ("runtime.workers", 10**9, "runtime.workers: expected a whole number from 1 to 10000"),
        ("runtime.workers", {"max": 10**9}, "max: expected less than or equal to 10000"),
        ("runtime.cpus_per_worker", 10**9, "runtime.cpus_per_worker: expected less than or equal to 4096"),
        ("runtime.gpus_per_worker", 10**400, "whole number of them up to 1024"),
        ("runtime.concurrent", 10**9, "runtime.concurrent: expected less than or equal to 10000"),
        ("runtime.checkpoint_seconds", 1e300, "runtime.checkpoint_seconds: expected less than or equal to 1000000000"),
        ("cache.budget_gb", 1e300, "cache.budget_gb: expected less than or equal to 1000000"),
        ("cache.top_k", 10**30, "cache.top_k: expected a whole number from 1 to 1000000, auto or null"),
        ("search", {"trials": 10**30}, "search.trials: expected less than or equal to 100000"),
        ("search", {"trials": 2, "top_k": 10**9}, "search.top_k: expected less than or equal to 100"),
        ("search", {"trials": 2, "confirm_seeds": 10**9}, "search.confirm_seeds: expected less than or equal to 100"),
        ("search", {"trials": 2, "grace_epochs": 10**9}, "search.grace_epochs: expected less than or equal to 1000000"),
        ("search", {"trials": 2, "reduction": 10**9}, "search.reduction: expected less than or equal to 1000"),
        ("students", [{"name": "tiny_cnn", "width": 10**6}], "model 'tiny_cnn': width = 1000000, expected a whole number from 1 to 1024"),
        ("students", [{"name": "resnet18", "block_args": 10**30}], "model 'resnet18' can't be built with {'block_args': 1000"),
        ("task.data", SHAPES | {"size": 10**6}, "size: expected less than or equal to 1024"),
        ("task.data", SHAPES | {"train": 10**30}, "train: expected less than or equal to 1000000"),
        ("task.data", SHAPES | {"train": 10**6, "size": 1024}, "1000500 images of 1024x1024 take 4196 GB"),
        ("task.data", {"name": "image_folder", "path": ".", "size": 10**6}, "size: expected less than or equal to 4096"),
        ("task.data", {"name": "image_folder", "path": ".", "resize": 10**6}, "resize: expected less than or equal to 4096"),
        ("task.val_size", 10**30, "val_size 1000000000000000000000000000000 is"),
        ("methods", [{"name": "kd", "temperature": 1e300}], "temperature: expected 0 or a size from 1e-30 to 1e+30"),
        ("methods", [{"name": "kd", "temperature": 1e-300}], "temperature: expected 0 or a size from 1e-30 to 1e+30"),
        ("methods", [{"name": "crd", "dimensions": 10**30}], "dimensions: expected less than or equal to 65536"),
        ("methods", [{"name": "crd", "negatives": 10**30}], "negatives: expected less than or equal to 1048576"),
        ("methods", [{"name": "at", "power": 10**9}], "power: expected less than or equal to 16"),
        ("methods", [{"name": "ffsd", "students": 10**9}], "students: expected less than or equal to 64"),
        ("methods", [{"name": "kdsvd", "vectors": 10**9}], "vectors: expected less than or equal to 1024"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(kdbench: Kdbench, key: str, value: Any, said: str) -> None:
    assert_refused(run(kdbench, {key: value}), said)


def test_the_largest_seeds_train(kdbench: Kdbench) -> None:
    """What is allowed works: no part of a training asks for a smaller seed."""
    largest = BEYOND - 1
    data = {"name": "classification", "data": SHAPES | {"train": 120, "test": 20, "seed": largest}, "val_size": 20, "split_seed": largest}
    changes = {"task": data, "data_seed": largest, "teacher.seed": largest, "recipe.augment": {"crop": 2, "flip": True}}
    ended = run(kdbench, changes)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"low": 0.1, "high": 1.0, "step": 0}, "step must be above 0 and at most high - low, 0.9; got 0"),
        ({"low": 0.1, "high": 1.0, "step": -0.1}, "step must be above 0"),
        ({"low": 0.1, "high": 1.0, "step": 1e-300}, "step 1e-300 cuts 0.1 .. 1 into more than 1000000 steps; leave step out"),
        ({"low": 0.1, "high": 1.0, "step": 2}, "step must be above 0 and at most high - low, 0.9; got 2"),
        ({"low": 0.1, "high": 1.0, "step": float("nan")}, "step must be above 0"),
        ({"low": 0.1, "high": 1.0, "step": float("inf")}, "step must be above 0"),
        ({"low": float("nan"), "high": 1.0}, "a range needs low < high, both finite"),
        ({"low": 0.1, "high": float("inf")}, "a range needs low < high, both finite"),
        ({"low": -1.7e308, "high": 1.7e308}, "wider than a float can hold"),
        ({"low": 0.1, "high": 10**400}, "low, high and step must be numbers"),
        ({"low": 0.1, "high": None}, "high must be a number, got null"),
        ({"low": False, "high": True}, "low, high and step must be numbers"),
        ({"low": 0.1, "high": 1.0, "log": "false"}, "and log true or false"),
        ({"low": 0.0, "high": 1.0, "log": True}, "a logarithmic range needs low > 0"),
        ({"low": 0.1, "high": 1e30}, "lr: expected less than or equal to 10000"),
        ({"options": list(range(5000))}, "a choice needs 2 to 1000 options; got 5000"),
        ([0.1], "a choice needs 2 to 1000 options; got 1"),
    ],
)
def test_a_range_that_can_not_be_searched_is_refused(kdbench: Kdbench, values: Any, said: str) -> None:
    assert_refused(run(kdbench, {"search": {"trials": 2, "also": {"recipe.lr": values}}}), "search.also.recipe.lr: ", said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"low": 32, "high": 256, "step": 0.5}, "step must be a whole number for a parameter of whole numbers; got 0.5"),
        ({"low": 99.5, "high": 100.5}, "the range 99.5 .. 100.5 holds fewer than two whole numbers"),
    ],
)
def test_a_range_of_whole_numbers_holds_some(kdbench: Kdbench, values: Any, said: str) -> None:
    assert_refused(run(kdbench, {"search": {"trials": 2, "also": {"recipe.batch_size": values}}}), "search.also.recipe.batch_size: ", said)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_of_the_repository_is_within_the_bounds(path: Path) -> None:
    assert isinstance(load_experiment(path), Experiment)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "x" * 300}, "name: expected a text to have at most 100 characters"),
        ({"name": "a/b"}, "name: expected a text to match pattern"),
        ({"name": ".."}, "name: expected a text to match pattern"),
        ({"name": "a\x07"}, "name: expected a text to match pattern"),
        ({"methods": [{"name": "none", "label": "x" * 300}]}, "methods.0.label: expected 1 to 100 characters, got 300"),
        ({"methods": [{"name": "none", "label": ""}]}, "methods.0.label: expected 1 to 100 characters, got 0"),
        ({"methods": [{"name": "none", "label": "a\x07b"}]}, "methods.0.label: holds '\\x07', which is no printable character"),
        ({"methods": [{"name": "none", "label": "a\nb"}]}, "methods.0.label: holds '\\n'"),
        ({"students": [{"name": "tiny_cnn", "label": "x" * 300}]}, "students.0.label: expected 1 to 100 characters, got 300"),
        ({"teacher.model": {"name": "tiny_cnn", "label": "a\x1b[31m"}}, "teacher.model.label: holds '\\x1b'"),
    ],
)
def test_a_name_that_can_not_be_part_of_a_files_name_or_shown_is_refused(kdbench: Kdbench, changes: dict[str, Any], said: str) -> None:
    assert_refused(run(kdbench, changes), said)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("methods.0.label", 'methods: [{name: none, label: "a\\ud800"}]'),
        ("students.0.label", 'students: [{name: tiny_cnn, label: "\\udfff"}]'),
    ],
)
def test_a_label_with_half_a_character_is_refused(kdbench: Kdbench, key: str, text: str) -> None:
    write({key.partition(".")[0]: None})
    with Path("tiny.yaml").open("a") as file:
        file.write(text)
    assert_refused(kdbench("run", "tiny.yaml", "--results", "results"), "holds half of a character")


@pytest.mark.parametrize("label", ["a/b", "../../up", "..", "/etc/passwd", "é" * 100])
def test_a_label_never_leads_out_of_a_folder(kdbench: Kdbench, label: str) -> None:
    """A label is what a board shows. What is made of it for a file's name is one harmless part of a path."""
    write({"methods": [{"name": "none", "label": label}]})
    assert load_experiment(Path("tiny.yaml")).methods[0].label == label
    part = path_name(label)
    assert "/" not in part
    assert part not in ("", ".", "..")
    assert len(os.fsencode("-".join([part, part, "0" * 26])) + b".safetensors") < 255


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def circle(kdbench: Kdbench) -> str:
    """Two symbolic links that name each other."""
    Path("one").symlink_to("two")
    Path("two").symlink_to("one")
    return "one"


NOBODY = "~nosuchuser/x"


@pytest.mark.parametrize("command", ["run", "dry-run"])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"teacher.weights": NOBODY}, "teacher.weights: "),
        ({"students": [{"name": "tiny_cnn", "weights": NOBODY}]}, "weights: "),
        ({"teacher.model": {"name": "tiny_cnn", "weights": NOBODY}}, "weights: "),
    ],
)
def test_a_home_of_nobody_is_refused(kdbench: Kdbench, command: str, changes: dict[str, Any], key: str) -> None:
    ended = run(kdbench, changes, *(["--dry-run"] if command == "dry-run" else []))
    assert_refused(ended, key, "~nosuchuser/x: there is no user 'nosuchuser' on this machine; write the path in full")


@pytest.mark.parametrize("command", ["run", "dry-run"])
@pytest.mark.parametrize("key", ["teacher.weights", "students"])
def test_links_that_lead_round_in_a_circle_are_refused(kdbench: Kdbench, circle: str, command: str, key: str) -> None:
    changes = {key: circle if key == "teacher.weights" else [{"name": "tiny_cnn", "weights": circle}]}
    ended = run(kdbench, changes, *(["--dry-run"] if command == "dry-run" else []))
    assert_refused(ended, "weights: ", "one: a circle of symbolic links")


@pytest.mark.parametrize("where", ["option", "key", "variable", "leaderboard"])
def test_results_in_no_home_or_in_a_circle_of_links_are_refused(
    kdbench: Kdbench, circle: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, said in ((NOBODY, "there is no user 'nosuchuser'"), (f"{circle}/results", "a circle of symbolic links")):
        write({"results": place} if where == "key" else {})
        arguments = {"option": ["run", "tiny.yaml", "--results", place], "leaderboard": ["leaderboard", "--results", place]}
        if where == "variable":
            monkeypatch.setenv("KDBENCH_RESULTS", place)
        assert_one_line(kdbench(*arguments.get(where, ["run", "tiny.yaml"])), 2, f"results folder: {place}: ", said)


def test_a_path_that_no_file_system_takes_is_refused(kdbench: Kdbench) -> None:
    assert_refused(run(kdbench, {"teacher.weights": "x" * 300}), "teacher.weights: xxx", "File name too long")
    assert_refused(run(kdbench, {"task.data": {"name": "image_folder", "path": "x" * 300}}), "data 'image_folder': ")


def test_a_path_need_not_be_there_to_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/later", "key") == tmp_path / "later"
    assert local_path("later/still", "key") == Path("later/still")


def test_student_weights_below_the_home_folder_are_found(kdbench: Kdbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert_refused(
        run(kdbench, {"students": [{"name": "tiny_cnn", "weights": "~/broken.safetensors"}]}), str(tmp_path / "broken.safetensors")
    )


# --- samplers --------------------------------------------------------------------------------------------------------

SEARCH = {"methods": [{"name": "mgd"}], "recipe.epochs": 1}


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"trials": 20, "sampler": "cmaes"}, "cmaes can't learn where to search these parameters, which are drawn at random: mgd: mask"),
        ({"trials": 8, "sampler": "gp"}, "gp draws its first 10 trials at random, and search.trials is 8, so this search is a random one"),
        ({"trials": 20, "sampler": "tpe"}, None),
        ({"trials": 20, "sampler": "qmc"}, None),
        ({"trials": 3, "sampler": "random"}, None),
    ],
)
def test_a_sampler_that_draws_at_random_says_so_before_training(kdbench: Kdbench, search: dict[str, Any], said: str | None) -> None:
    ended = run(kdbench, SEARCH | {"search": search}, "--dry-run")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if "search.sampler" in line]
    assert (said is None and not lines) or (said is not None and len(lines) == 1 and said in lines[0])


def test_a_run_says_it_before_the_teacher_is_trained(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(teacher, "_trained", stop)
    ended = run(kdbench, SEARCH | {"search": {"trials": 4, "sampler": "nsgaii"}})
    assert "nsgaii draws its first 50 trials at random, and search.trials is 4" in ended.out + ended.err
    assert "Stopped" in ended.err


# --- options of the commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["leaderboard", "--serve", "--port", "70000"], "--port 70000: expected a number from 0 to 65,535"),
        (["leaderboard", "--serve", "--port", "-1"], "--port -1: expected a number from 0 to 65,535"),
        (["recommend", "--latency", "9" * 400], "--latency 999"),
        (["recommend", "--params", "9" * 400 + "G"], "no more than 1e+15 parameters"),
        (["recommend", "--latency", "1e400ms"], "expected a time such as 5ms"),
        (["recommend", "--hours", "nan"], "--hours nan: expected a number from 0 to 1,000,000,000"),
        (["recommend", "--hours", "inf"], "--hours inf: expected"),
        (["recommend", "--hours", "-1"], "--hours -1: expected"),
        (["recommend", "--min-gain", "nan"], "--min-gain nan: expected"),
        (["cache", "prune", "--older-than", "nan"], "--older-than nan: expected"),
        (["cache", "prune", "--keep-gb", "inf"], "--keep-gb inf: expected"),
        (["taps", "tiny_cnn", "--image", "3x1000000x1000000"], "--image 3x1000000x1000000: expected at most 4096"),
        (["taps", "tiny_cnn", "--image", "9" * 5000 + "x3x3"], "expected at most 4096"),
        (["taps", "tiny_cnn", "--classes", "1000000000"], "--classes 1000000000: expected a number from 1 to 100,000"),
        (["taps", "tiny_cnn", "--classes", "0"], "--classes 0: expected"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(kdbench: Kdbench, arguments: list[str], said: str) -> None:
    assert_refused(kdbench(*arguments), said)


def test_set_goes_through_the_same_bounds(kdbench: Kdbench) -> None:
    assert_refused(
        run(kdbench, {}, "--set", "seeds=1000000000"),
        "seeds: expected a whole number from 1 to 1000, or {start: 3, max: 12, until: decided}, got 1000000000",
    )
    assert yaml.safe_load(Path("tiny.yaml").read_text())["seeds"] == 1
