"""What can't be trained is refused in one line before the teacher is trained, by a run and by a dry run; the rest is trained to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model

from kdbench.own_code import TRUST_VARIABLE
from kdbench.records.store import ResultStore
from tests.bad_input.odd_networks import Tied
from tests.bad_input.tiny_experiment import TINIER, WHOLE, assert_mistake, assert_one_line, results, run
from tests.console import Kdbench

ODD = "tests.bad_input.odd_networks:"
SMALL = {**TINIER, "recipe.batch_size": 20}
FEWER = "lower recipe.accumulate, which cuts batches of"

REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("Frozen", {}, ("no parameter requires a gradient", "unfrozen")),
    ("Empty", {}, ("no parameter requires a gradient",)),
    ("Detached", {}, ("no parameter of the network gets a gradient",)),
    ("Grows", {}, ("'seen' has another shape: [1] in the file, [0] in the model",)),
    ("KeepsAList", {}, ("the state '_extra_state' is a list", "make it a tensor")),
    ("OneSize", {"recipe.accumulate": 2}, ("a training step on 10 images fails: RuntimeError: shape '[20, 3, 32, 32]' is invalid",)),
    ("SinglePositions", {"recipe.batch_size": 8, "recipe.accumulate": 8}, ("a training step on 1 image fails", f"{FEWER} 8")),
    ("SinglePositions", {"recipe.batch_size": 10, "recipe.accumulate": 4}, ("a training step on 1 image fails", f"{FEWER} 10")),
    ("Leaves", {}, ("a training step on 20 images fails: SystemExit: config error",)),
    ("Pair", {}, ("the model gives a tuple; expected a tensor, a dictionary with 'logits'",)),
    ("NanInEvaluation", {}, ("its predictions are nan before it is trained",)),
    ("NanInTraining", {}, ("in a first training step, its loss cross_entropy is nan and total is nan",)),
]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(("network", "changes", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_network_that_can_not_be_trained_is_refused_before_the_teacher_is_trained(
    kdbench: Kdbench, role: str, network: str, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    model = {"name": ODD + network, "label": network}
    place = {"students": [model]} if role == "student" else {"teacher.model": model}
    assert_mistake(run(kdbench, {**SMALL, **changes, **place}), f"{role} {network!r}: ", *said)


@pytest.mark.parametrize("network", ["Frozen", "Pair"])
def test_a_dry_run_rehearses_too(kdbench: Kdbench, network: str) -> None:
    assert_mistake(run(kdbench, {**SMALL, "students": [ODD + network]}, "--dry-run"), f"student '{ODD}{network}': ")


def test_a_layer_that_pytorch_does_not_know_of_is_refused(kdbench: Kdbench) -> None:
    said = f"model '{ODD}HidesALayer': mixers, which holds a Linear, is no part of the network for PyTorch"
    for options in ((), ("--dry-run",)):
        assert_mistake(run(kdbench, {**SMALL, "students": [ODD + "HidesALayer"]}, *options), said, "nn.ModuleList")


@pytest.mark.parametrize("format_", ["safetensors", "onnx"])
def test_a_network_that_is_another_when_it_is_loaded_is_not_exported(kdbench: Kdbench, format_: str) -> None:
    ended = run(kdbench, {**SMALL, "students": [ODD + "HidesATensor"], "methods": ["none"], "teacher": None})
    assert ended.code == 0, ended.err
    (final,) = ResultStore("results").scan(label="none")
    kdbench.monkeypatch.setenv(TRUST_VARIABLE, "0")
    exported = kdbench("export", final.run_id, "--format", format_, "--output", "net", "--results", "results", "--trust-code")
    assert_one_line(exported, 2, "two networks with the same weights give different predictions", "register_buffer")
    assert not Path("net").exists()


def test_predictions_that_become_nan_are_no_result(kdbench: Kdbench) -> None:
    ended = run(kdbench, {**SMALL, "students": [ODD + "NanLater"], "methods": ["none"], "teacher": None})
    assert ended.code == 1
    assert "none seed 0: of the validation predictions in epoch 1 of 1 (lr 0.1), 20 of 20 are nan" in ended.err
    assert results() == ["final none failed"]


SEARCHED: list[tuple[dict[str, Any], str]] = [
    ({"recipe.epochs": [4, 2], "recipe.warmup_epochs": [0.0, 3.0]}, "recipe.warmup_epochs: 3 is as long as the training of 2 epochs"),
    ({"recipe.epochs": [9, 2, 4], "recipe.warmup_epochs": {"low": 0.0, "high": 3.0}}, "recipe.warmup_epochs: 3 is as long as"),
]


@pytest.mark.parametrize(("also", "said"), SEARCHED)
def test_two_searched_keys_that_void_a_training_together_are_refused(kdbench: Kdbench, also: dict[str, Any], said: str) -> None:
    search = {"trials": 2, "also": also}
    for options in ((), ("--dry-run",)):
        assert_mistake(run(kdbench, {**SMALL, "recipe.epochs": 4, "search": search}, *options), said)


def test_each_searched_moving_average_that_is_too_slow_is_said(kdbench: Kdbench) -> None:
    search = {"trials": 2, "also": {"recipe.ema": [0.5, 0.9999]}}
    ended = run(kdbench, {**SMALL, "recipe.ema": 0.5, "search": search}, "--dry-run")
    assert ended.code == 0, ended.err
    assert "recipe.ema 0.9999 is too slow for students" in ended.out
    assert "recipe.ema 0.5 is" not in ended.out


@pytest.mark.parametrize("network", ["LinearProbe", "OneSize", "Dictionary", "Auxiliary", "Normed", "Draws"])
def test_an_unusual_network_is_trained_as_teacher_and_student(kdbench: Kdbench, network: str) -> None:
    models = {"teacher.model": ODD + network, "students": [ODD + network]}
    ended = run(kdbench, {**SMALL, **models, "methods": ["none", "kd", "fitnet"]})
    assert ended.code == 0, ended.err
    assert results() == ["final fitnet ok", *WHOLE]


def test_idle_parameters_are_refused_where_several_workers_exchange_gradients(kdbench: Kdbench) -> None:
    changes = {**SMALL, "students": [ODD + "Auxiliary"], "runtime": {"workers": 2}}
    assert_mistake(run(kdbench, changes), "2 of its parameters get no gradient, such as 'aux.weight'", "use runtime.workers: 1")


@pytest.mark.parametrize("format_", ["safetensors", "onnx"])
def test_tied_weights_are_trained_saved_once_and_exported(kdbench: Kdbench, format_: str) -> None:
    ended = run(kdbench, {**SMALL, "students": [ODD + "Tied"], "teacher.model": ODD + "Tied"})
    assert ended.code == 0, ended.err
    assert results() == WHOLE
    (final,) = ResultStore("results").scan(label="kd")
    stored = load_file(Path("results") / final.artifacts_uri)
    assert "decode.weight" in stored
    assert "again.weight" not in stored
    kdbench.monkeypatch.setenv(TRUST_VARIABLE, "0")  # put back when the test ends: --trust-code sets it in this process
    exported = kdbench("export", final.run_id, "--format", format_, "--output", "net", "--results", "results", "--trust-code")
    assert exported.code == 0, exported.err
    if format_ == "safetensors":
        network = Tied(5, 3)
        load_model(network, "net", strict=True)
        assert network.again.weight is network.decode.weight
        assert torch.equal(network.again.weight, stored["decode.weight"])


def test_patches_that_leave_a_part_of_each_image_out_are_refused(kdbench: Kdbench) -> None:
    student = {"name": "vit_tiny_patch16_224", "label": "sixteen", "depth": 1, "img_size": 28}
    changes = {"task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200}, "students": [student]}
    said = (
        "student 'sixteen': patches of 16x16 pixels don't divide images of 28x28",
        "12 rows and 12 columns",
        "patches of 2 or 4 or 7 pixels",
    )
    assert_mistake(run(kdbench, changes), *said)
    assert_mistake(run(kdbench, changes, "--dry-run"), *said)


def test_an_objective_that_the_task_does_not_measure_is_refused(kdbench: Kdbench) -> None:
    search = {"trials": 2, "scheduler": "none", "objectives": ["ece"]}
    task = {"name": "segmentation", "data": {"name": "shapes", "train": 40, "test": 8}, "val_size": 8}
    ended = run(kdbench, {"task": task, "students": ["tiny_fcn"], "teacher.model": "tiny_fcn", "recipe.batch_size": 8, "search": search})
    assert_mistake(ended, "search.objectives: segmentation is not measured by 'ece'")
