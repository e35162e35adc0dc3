"""Warnings of settings that make a training worthless: what they count, and that they stand on the board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.boards.cautions import board_cautions, chance_caution, ema_caution
from kdbench.records.store import ResultStore
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.training.checkpoint import save_weights
from tests.bad_input.tiny_experiment import TINIER, assert_mistake, run
from tests.console import Kdbench

SHAPES: dict[str, Any] = {**TINIER, "recipe.batch_size": 20}


def test_the_share_of_the_first_step_in_an_average_decides() -> None:
    said = ema_caution(0.9999, 50, "students")
    assert said is not None
    assert "after 50 steps, 100% of the averaged weights are those of the first step. Set ema to 0.912 or less" in said
    assert ema_caution(0.912, 50, "students") is None
    assert ema_caution(0.9999, 23_028, "students") is None  # 0.9999 ** 23027 = 0.09999
    assert ema_caution(0.9999, 23_020, "students") is not None
    assert ema_caution(None, 1, "students") is None


def test_the_first_weights_have_the_share_that_the_warning_says() -> None:
    from kdbench.experiment import Recipe
    from kdbench.training.optimization import make_average

    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average = make_average(layer, Recipe(ema=0.9))
    assert average is not None
    for step in range(8):
        with torch.no_grad():
            layer.weight.fill_(float(step == 0))  # after the first step 1, later 0
        average.update_parameters(layer)
    assert average.module.weight.item() == pytest.approx(0.9**7)


def test_chance_is_the_commonest_class_and_the_noise_of_the_test_set() -> None:
    task = build_task(TaskSpec.model_validate({"name": "classification", "data": {"name": "shapes", "target": "class"}, "val_size": 20}))
    target = torch.tensor([0] * 60 + [1] * 40)
    assert task.chance(target) == pytest.approx(60 + 3 * 100 * (0.6 * 0.4 / 100) ** 0.5)
    assert task.chance(torch.zeros(4, dtype=torch.long)) == 100
    pixels = build_task(
        TaskSpec.model_validate({"name": "segmentation", "data": {"name": "shapes", "train": 40, "test": 8}, "val_size": 8})
    )
    target = torch.tensor([[[0, 0, 0], [1, 2, 255]]])
    always = torch.zeros(1, 6, 2, 3)
    always[:, 0] = 1
    assert pixels.chance(target) == pytest.approx(pixels.metrics(always, target)["miou"], rel=1e-6)


def test_a_teacher_is_compared_in_the_direction_of_its_metric() -> None:
    assert chance_caution("t", 10.0, 10.9, True) is not None
    assert chance_caution("t", 11.0, 10.9, True) is None
    assert chance_caution("t", 11.0, 10.9, False) is not None
    assert chance_caution("t", 10.0, None, True) is None
    assert board_cautions([], "t", 10.0) == []


def test_a_slow_average_and_a_teacher_that_learnt_nothing_are_said_before_training_and_on_the_board(kdbench: Kdbench) -> None:
    ended = run(kdbench, {**SHAPES, "recipe.ema": 0.9999})
    assert ended.code == 0, ended.err
    before, _, board = ended.out.partition("protocol ")
    for text in (before, board):
        assert "recipe.ema 0.9999 is too slow for students: after 5 steps, 100% of the averaged weights are" in text
        assert "the teacher tiny_cnn is no better than chance" in text
    assert "recipe.ema 0.9999 is too slow for the teacher" in before
    assert before.index("too slow for students") < before.index("teacher tiny_cnn: test accuracy") < before.index("no better than chance")
    page = next(Path("results/boards").glob("*.html")).read_text()
    assert "recipe.ema 0.9999 is too slow for students" in page
    assert "is no better than chance" in page
    assert "warning: recipe.ema 0.9999" in run(kdbench, {**SHAPES, "recipe.ema": 0.9999}, "--dry-run").out


def test_a_warm_up_as_long_as_the_training_is_refused(kdbench: Kdbench) -> None:
    assert_mistake(run(kdbench, {**SHAPES, "recipe.warmup_epochs": 1}), "recipe.warmup_epochs: 1 is as long as the training of 1 epochs")
    assert_mistake(run(kdbench, {**SHAPES, "teacher.recipe": {"warmup_epochs": 2}}), "recipe.warmup_epochs: 2 is as long as the training")


def test_a_teacher_whose_weights_are_not_finite_is_refused(kdbench: Kdbench) -> None:
    assert run(kdbench, {**SHAPES, "methods": ["none"]}).code == 0
    (teacher,) = ResultStore("results").scan(role="teacher")
    from safetensors.torch import load_file

    tensors = load_file(Path("results") / str(teacher.artifacts_uri))
    first = next(name for name, tensor in tensors.items() if name.endswith("weight"))
    tensors[first] = torch.full_like(tensors[first], float("nan"))
    save_weights(tensors, Path("nan.safetensors"))
    ended = kdbench("run", "tiny.yaml", "--set", "teacher.weights=nan.safetensors", "--results", "other", "--no-mlflow")
    assert ended.code == 2
    assert "its predictions of the test set are not finite; use weights of a network" in ended.err
    assert list(ResultStore("other").scan()) == []
