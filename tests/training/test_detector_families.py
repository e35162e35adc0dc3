"""Each family of detectors through the frame: one training, `kd` from a teacher of its own family, live and cached, workers, a kill."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.tasks.build import build_task
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit, train_step
from kdbench.training.outcome import rederive
from kdbench.training.session import LocalSession
from tests.training.alike import losses_of_workers
from tests.training.units import killed_and_continued, layout, saved_teacher, unit, with_cache

pytestmark = pytest.mark.slow
# CI has 45 minutes: of these, it looks at the one whose second stage and draws are dearest; `make test-nodes` looks at all.

DATA = {"name": "shapes", "target": "boxes", "size": 64, "train": 30, "test": 8}
TASK: dict[str, Any] = {"name": "detection", "data": DATA, "val_size": 8, "transfer_size": 12}
# `preset` freezes the statistics of batch normalization, in which workers would differ.
RESNET = {"backbone": "resnet18", "preset": "coco_v1", "width": 16, "levels": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "fcos": {"name": "fcos", **RESNET},
    "retinanet": {"name": "retinanet", **RESNET, "anchor": 16},
    "faster_rcnn": {"name": "faster_rcnn", **RESNET, "anchor": 16, "hidden": 32, "proposals": 60, "learned": 40},
}
# No statistics are frozen in these, so several workers give another loss.
WITH_STATISTICS = {"ssdlite": {"name": "ssdlite", "backbone": "mobilenet_v3_small", "width": 32, "levels": 3}}
RECIPE = {"epochs": 1, "batch_size": 6, "lr": 0.001, "precision": "fp64", "augment": {"flip": True}, "views": 1}


def _marked(families: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name == "faster_rcnn" else [pytest.mark.nodes]) for name in families]


def detector(family: str, method: str, folder: Path, **changes: Any) -> Any:
    student = (FAMILIES | WITH_STATISTICS)[family]
    teacher = saved_teacher(folder, "fp64", student | {"width": 48}, TASK)
    recipe = RECIPE | changes.pop("recipe", {})
    return unit(method, teacher, task=TASK, recipe=recipe, student=student, **changes)


@pytest.mark.parametrize("family", _marked(FAMILIES | WITH_STATISTICS))
def test_a_family_trains_with_kd_and_a_kill_changes_nothing(family: str, tmp_path: Path) -> None:
    each = detector(family, "kd", tmp_path, recipe={"epochs": 2, "precision": "fp32"}, checkpoint_seconds=0)
    whole = fit(each, LocalSession(), layout(tmp_path / "whole"))
    again = killed_and_continued(each, tmp_path, 1)
    assert again.metrics == whole.metrics
    stored = [(folder / str(record.predictions_uri)).read_bytes() for record, folder in ((whole, tmp_path / "whole"), (again, tmp_path))]
    assert stored[0] == stored[1]
    assert rederive(whole, build_task(each.task), stored[0]) == whole.metrics


@pytest.mark.parametrize("method", ["none", "kd"])
@pytest.mark.parametrize("family", _marked(FAMILIES))
def test_micro_batches_workers_and_a_cached_teacher_give_one_loss(family: str, method: str, tmp_path: Path) -> None:
    each = detector(family, method, tmp_path)
    alone = assemble(each, LocalSession())
    whole = train_step(alone, next(iter(alone.loader.batches(0))))
    assert torch.isfinite(whole).all()
    assert whole.numel() > 2
    run = assemble(detector(family, method, tmp_path, recipe={"accumulate": 3}), LocalSession())
    torch.testing.assert_close(train_step(run, next(iter(run.loader.batches(0)))), whole, rtol=1e-9, atol=1e-11)
    two = losses_of_workers(detector(family, method, tmp_path, workers={"max": 2}), 2, lambda batch: batch)
    torch.testing.assert_close(two, whole, rtol=1e-9, atol=1e-11)
    if method == "kd":
        ref = with_cache(each.teacher, each, tmp_path / "cache", (), {"precision": "fp32"})
        cached = assemble(each.model_copy(update={"teacher": ref}), LocalSession())
        torch.testing.assert_close(train_step(cached, next(iter(cached.loader.batches(0)))), whole, rtol=1e-5, atol=1e-6)
