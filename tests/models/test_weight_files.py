"""Weights as training scripts leave them are read, or the message names what is in the way and what to do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.weight_files import misfit_hint, read_weights
from tests.bad_input.tiny_experiment import TINIER, run
from tests.console import Kdbench

Weights = dict[str, Tensor]


def network(width: int = 4, num_classes: int = 5, weights: Path | None = None) -> nn.Module:
    spec = ModelSpec.model_validate({"name": "tiny_cnn", "width": width, "weights": weights})
    return build_model(spec, num_classes=num_classes, in_channels=3, image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def compiled_inside(weights: Weights) -> Weights:
    """As of a network of which one part was compiled."""
    return {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in weights.items()}


SCRIPTS: dict[str, Callable[[Weights], Any]] = {
    "DistributedDataParallel": lambda w: prefixed("module.", w),
    "torch.compile": lambda w: prefixed("_orig_mod.", w),
    "torch.compile of DistributedDataParallel": lambda w: prefixed("_orig_mod.module.", w),
    "torch.compile of a part": compiled_inside,
    "Lightning": lambda w: {"state_dict": prefixed("model.", w), "epoch": 3, "optimizer_states": [{"state": {0: {"x": torch.zeros(1)}}}]},
    "PyTorch's tutorial": lambda w: {"model_state_dict": w, "epoch": 3, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    "timm": lambda w: {"state_dict": w, "args": argparse.Namespace(lr=0.1), "state_dict_ema": {k: v + 1 for k, v in w.items()}},
    "a name of its own": lambda w: {
        "epoch": 3,
        "weights_of_the_student": {"backbone": prefixed("net.", w)},
        "losses": {"ce": torch.ones(1)},
    },
    "before PyTorch 0.4.1": lambda w: {name: tensor for name, tensor in w.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_of_a_script_are_read(script: str, tmp_path: Path) -> None:
    saved = network().state_dict()
    torch.save(SCRIPTS[script](saved), tmp_path / "w.pt")
    loaded = network(weights=tmp_path / "w.pt").state_dict()
    assert not all(value.equal(saved[name]) for name, value in network().state_dict().items())
    assert [name for name, value in loaded.items() if not value.equal(saved[name])] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            lambda w: {"teacher": w, "student": w},
            "the file has several sets of tensors: 'teacher', 'student'. "
            "Save one of them in a file of its own, such as torch.save(checkpoint['teacher'], 'weights.pt')",
        ),
        (
            lambda w: {"state_dict": w, "saved": datetime(2026, 1, 13)},
            "it holds a Python object, datetime.datetime). Save the weights alone, with torch.save(model.state_dict(), ...)",
        ),
        (
            lambda w: {"n_averaged": torch.ones(()), **prefixed("module.", w)},
            "names in the file fit without the prefix 'module.'. Remove it, and the names that the model does not have, from the file",
        ),
        (lambda w: {"epoch": 3, "losses": []}, "expected names with tensors, at the top of the file or under a key such as 'state_dict'"),
        (lambda w: prefixed("module.", network(width=8).state_dict()), "has another shape"),
        (lambda w: prefixed("module.", network(num_classes=7).state_dict()), "the head has 7 classes, the data has 5"),
    ],
)
def test_what_is_in_the_way_is_named(content: Callable[[Weights], Any], said: str, tmp_path: Path) -> None:
    torch.save(content(network().state_dict()), tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        network(weights=tmp_path / "w.pt")
    assert said in str(caught.value)
    assert str(tmp_path / "w.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prefix_that_the_model_has_itself_stays(tmp_path: Path) -> None:
    wanted = {"model.weight": torch.zeros(2), "model.model.weight": torch.zeros(2)}
    stored = {name: torch.ones(2) for name in wanted}
    torch.save(stored, tmp_path / "w.pt")
    assert list(read_weights(tmp_path / "w.pt", wanted)) == list(wanted)


def test_of_weights_and_their_average_the_weights_are_read(tmp_path: Path) -> None:
    saved = network().state_dict()
    name = next(iter(saved))
    torch.save({"ema": prefixed("module.", saved), "model": {name: tensor + 1 for name, tensor in saved.items()}}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt", saved)[name].equal(saved[name] + 1)


def test_no_hint_is_given_where_no_prefix_would_help() -> None:
    assert misfit_hint(["a.weight", "b.weight"], ["b.weight", "c.weight"]) == ""


@pytest.mark.parametrize("script", ["DistributedDataParallel", "before PyTorch 0.4.1", "timm"])
def test_a_teacher_of_such_weights_is_measured_and_distilled(kdbench: Kdbench, script: str) -> None:
    torch.save(SCRIPTS[script](network().state_dict()), "teacher.pt")
    ended = run(kdbench, {**TINIER, "teacher": {"model": {"name": "tiny_cnn", "width": 4}, "weights": "teacher.pt"}, "methods": ["kd"]})
    assert ended.code == 0, ended.err
