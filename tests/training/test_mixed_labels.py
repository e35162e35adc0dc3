"""Mixup and cutmix through the whole of a training: every method takes soft labels, and the cached teacher saw the same mixtures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kdbench.data.loader import Loader
from kdbench.errors import UserError
from kdbench.methods import METHODS
from kdbench.tasks.build import build_task
from kdbench.training.assembly import assemble
from kdbench.training.cache.outputs import open_cache
from kdbench.training.loop import close_epoch, mean_losses, train_epoch
from kdbench.training.session import LocalSession
from kdbench.training.teacher import LiveTeacher, load_teacher
from tests.tolerances import rounding
from tests.training.units import TEACHER, saved_teacher, unit, with_cache

CPU = torch.device("cpu")
MIXED = {"augment": {"crop": 2, "flip": True, "mixup": 0.4, "cutmix": 1.0}, "views": 2}
CONVOLUTIONAL = {"name": "tiny_cnn", "width": 4}
REFUSED = {"vitkd": "it imitates the first two blocks of a transformer", "fgd": "one of the networks names no levels of a pyramid"}


@pytest.mark.parametrize(("method", "reason"), REFUSED.items())
def test_a_method_that_has_no_place_in_a_pair_of_convolutional_networks_refuses_it(tmp_path: Path, method: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        assemble(unit(method, saved_teacher(tmp_path), student=CONVOLUTIONAL, recipe=MIXED), LocalSession(device=CPU))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in REFUSED])
def test_every_method_takes_mixed_labels(tmp_path: Path, method: str) -> None:
    run = assemble(unit(method, saved_teacher(tmp_path), student=CONVOLUTIONAL, recipe=MIXED), LocalSession(device=CPU))
    first = next(run.loader.batches(0))
    assert first.target.shape == (60, 10)
    assert (first.target.amax(1) < 1).sum() > 30
    before = [parameter.clone() for parameter in run.distiller.student.parameters()]
    train_epoch(run, 0)
    assert all(math.isfinite(value) for value in mean_losses(run).values())
    assert any(not torch.equal(old, new) for old, new in zip(before, run.distiller.student.parameters(), strict=True))


def test_a_loss_on_mixed_labels_falls(tmp_path: Path) -> None:
    repeated = MIXED | {"epochs": 4, "views": 1}
    run = assemble(unit("none", student=CONVOLUTIONAL, recipe=repeated), LocalSession(device=CPU))
    for epoch in range(4):
        train_epoch(run, epoch)
        close_epoch(run)
    losses = [row["train_total"] for row in run.curve]
    assert losses[-1] < losses[0]


def test_the_cached_teacher_saw_the_mixtures_that_the_student_sees(tmp_path: Path) -> None:
    ref = saved_teacher(tmp_path)
    described = unit("kd", ref, recipe=MIXED)
    task = build_task(described.task)
    cache = open_cache(with_cache(ref, described, tmp_path / "cache").cache or Path())
    live = LiveTeacher(load_teacher(ref, task, CPU), task, (), "fp32")
    # The cache saw other batches than each rank does, so its logits may be rounded otherwise in float32.
    # Near the middle between two numbers of half precision, they then become the other one.
    neighbour = torch.finfo(torch.float16).eps
    for rank in (0, 1):
        loader = Loader(
            task.splits().transfer,
            60,
            augment=described.recipe.augment,
            views=2,
            data_seed=0,
            order_seed=3,
            rank=rank,
            world_size=2,
        )
        for epoch in (0, 1):
            for batch in loader.batches(epoch):
                logits = live(batch).logits
                off = rounding(torch.float32, 9 * TEACHER["width"] * 4, logits.abs().max().item())
                torch.testing.assert_close(cache(batch).logits, logits.half().float(), rtol=neighbour, atol=off)
