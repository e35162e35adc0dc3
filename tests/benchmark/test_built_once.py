"""On the way from a command to the first step of a training, each network and each method is built as often as it has to be."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment
from kdbench.methods.base import Method
from kdbench.models.build import ModelSpec
from kdbench.models.tiny import TinyCNN
from kdbench.tasks.classification import Classification
from kdbench.training import assembly, loop
from kdbench.training.assembly import assemble
from kdbench.training.session import LocalSession
from tests.training.units import saved_teacher, unit

ASKED: dict[str, Any] = {
    "name": "built",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 80, "test": 20, "target": "class", "size": 16}, "val_size": 20},
    "teacher": {"model": {"name": "tiny_cnn", "label": "large", "width": 8}},
    "students": [{"name": "tiny_cnn", "label": "small", "width": 4}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 20, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what was built, since the process began."""
    counts: Counter[str] = Counter()
    build, begin, deepcopy = Classification.build_model, Method.__init__, copy.deepcopy

    def build_model(self: Classification, spec: ModelSpec) -> nn.Module:
        counts[spec.label] += 1
        return build(self, spec)

    def begun(self: Method, *arguments: Any, **more: Any) -> None:
        counts[type(self).__name__] += 1
        begin(self, *arguments, **more)

    def copied(value: Any, *arguments: Any) -> Any:
        if isinstance(value, TinyCNN) and not arguments:
            counts["copies"] += 1
        return deepcopy(value, *arguments)

    monkeypatch.setattr(Classification, "build_model", build_model)
    monkeypatch.setattr(Method, "__init__", begun)
    monkeypatch.setattr(copy, "deepcopy", copied)
    return counts


def test_a_run_of_none_and_kd_builds_each_network_and_method_as_often_as_it_must(
    made: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to look at them, and once for each training; of rehearsals there is one without a method and one with kd."""
    first_steps: dict[str, Counter[str]] = {}
    step = loop.train_step

    def train_step(training: Any, batch: Any) -> Any:
        of = training.unit
        first_steps.setdefault(of.method.label if of.role == "final" else of.role, Counter(made))
        return step(training, batch)

    monkeypatch.setattr(loop, "train_step", train_step)
    run(Experiment.model_validate(ASKED), tmp_path, Unwatched())

    assert list(first_steps) == ["teacher", "none", "kd"]
    before, none, kd = first_steps.values()
    assert (before["small"], none["small"], kd["small"]) == (1, 2, 3)
    assert (before["copies"], none["copies"], kd["copies"]) == (3, 3, 3)  # the rehearsals of teacher, student, and student with kd
    assert (before["KD"], none["KD"], kd["KD"]) == (1, 2, 3)  # rehearsed, planned, trained
    assert none["Undistilled"] - before["Undistilled"] == 2  # planned, trained
    assert kd["Undistilled"] == none["Undistilled"]


@pytest.mark.parametrize(("method", "probed"), [("none", 0), ("tf_nkd", 0), ("kd", 2), ("sp", 2)])
def test_networks_are_probed_for_a_method_that_looks_at_them_alone(
    method: str, probed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, count = assembly.probe, 0

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return probe(*arguments)

    monkeypatch.setattr(assembly, "probe", counting)
    of = unit(method, saved_teacher(tmp_path), student={"name": "tiny_cnn", "width": 4})
    training = assemble(of, LocalSession())
    assert count == probed
    assert training.distiller.method.student_taps == (("stage:-1",) if method == "sp" else ())
