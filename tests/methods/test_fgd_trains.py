"""FGD through the frame, on drawn scenes: pictures without a box, a kill, a search, a cached teacher, micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.data.batch import Batch
from kdbench.data.columns import several
from kdbench.experiment import Experiment, Unit
from kdbench.records.store import ResultStore
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit, train_step
from kdbench.training.session import LocalSession
from tests.training.units import killed_and_continued, layout, saved_teacher, unit, with_cache

DATA = {"name": "shapes", "target": "boxes", "size": 32, "train": 40, "test": 10}
TASK: dict[str, Any] = {"name": "detection", "data": DATA, "val_size": 10, "transfer_size": 24}
STUDENT = {"name": "tiny_fcos", "width": 4}
RECIPE = {"epochs": 2, "batch_size": 12, "optimizer": "adamw", "lr": 0.005, "augment": {"crop": 2, "flip": True}, "views": 2}
ALL = ("fgd", "mgd", "pkd", "cwd")


def detector(method: Any, folder: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> Unit:
    teacher = saved_teacher(folder, model={"name": "tiny_fcos", "width": 6}, of_task=TASK)
    return unit(method, teacher, task=TASK, student=STUDENT, recipe={**RECIPE, **(recipe or {})}, **changes)


def emptied(batch: Batch) -> Batch:
    """The batch without any object."""
    target = several(batch.target)
    return replace(batch, target={**target, "labels": torch.full_like(target["labels"], -1)})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bare", [False, True])
def test_a_detector_learns_all_that_is_trained_also_from_pictures_without_a_box(tmp_path: Path, name: str, bare: bool) -> None:
    training = assemble(detector(name, tmp_path), LocalSession())
    assert training.distiller.method.student_taps == ("level:0", "level:1")
    batch = next(iter(training.loader.batches(0)))
    for step in range(3):  # a context block's last convolution begins at 0, and what is in front of it learns later
        training.step = step
        losses = train_step(training, emptied(batch) if bare else batch)
        assert losses.isfinite().all()
    terms = dict(zip(training.terms, losses.tolist(), strict=True))
    if name == "fgd":
        assert (terms["foreground"] == 0) == bare
        assert min(terms["background"], terms["attention"], terms["relation"]) > 0
    assert all(weight.isfinite().all() for weight in training.distiller.parameters())


@pytest.mark.parametrize("name", ["fgd", "mgd"])
def test_a_training_killed_at_a_step_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    of = detector(name, tmp_path, checkpoint_seconds=0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(of, LocalSession(), layout(whole))
    cut.mkdir()
    killed_and_continued(of, cut, 3)  # in the midst of the second epoch
    a, b = (load_file(layout(folder).student(of.key)) for folder in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_the_teachers_levels_come_from_the_cache(tmp_path: Path) -> None:
    levels = ("level:0", "level:1")
    live = detector({"name": "fgd", "student_taps": levels, "teacher_taps": levels}, tmp_path)
    assert live.teacher is not None
    cached = live.model_copy(update={"teacher": with_cache(live.teacher, live, tmp_path / "cache", levels, {"precision": "fp32"})})
    found = []
    for each in (live, cached):
        training = assemble(each, LocalSession())
        found.append(train_step(training, next(iter(training.loader.batches(0)))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_search_looks_around_the_defaults_for_the_pair(tmp_path: Path, ray: object) -> None:
    asked = Experiment.model_validate(
        {
            "name": "focal",
            "task": TASK,
            "teacher": {"model": {"name": "tiny_fcos", "width": 6}, "recipe": {"epochs": 1}},
            "students": [STUDENT],
            "methods": [{"name": "fgd", "temperature": 0.8}],
            "recipe": {**RECIPE, "epochs": 1, "precision": "fp32", "memory_format": "contiguous"},
            "search": {"trials": 3, "sampler": "random", "scheduler": "none", "top_k": 1},
            "seeds": 1,
        }
    )
    run(asked, tmp_path / "results", Unwatched())
    (final,) = [record for record in ResultStore(tmp_path / "results").scan() if record.role == "final"]
    alpha, relation = 1e-3 * 256 / 18, 5e-6 * 256 * 15200 / (18 * 64)  # the teacher's pyramid: 18 channels, 8 x 8 on its finest level
    assert final.space is not None
    assert final.space.keys() == {"task_weight", "alpha", "gamma", "relation"}
    for name, default in (("alpha", alpha), ("relation", relation)):
        axis = final.space[name]
        assert (axis["default"], axis["low"], axis["high"]) == pytest.approx((default, default / 10, default * 10))
        assert axis["low"] <= final.params[name] <= axis["high"]
    assert final.params["temperature"] == 0.8
    assert final.params["student_taps"] == final.params["teacher_taps"] == ["level:0", "level:1"]
    assert final.trials == 3
