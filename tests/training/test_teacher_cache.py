"""The teacher's cached outputs: right for every sample and view, whole or not there, and never another teacher's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdbench.data.loader import Loader
from kdbench.errors import RunFailed
from kdbench.experiment import Unit
from kdbench.tasks.build import build_task
from kdbench.training.teacher import LiveTeacher, load_teacher
from kdbench.training.teacher_cache import build_cache, cache_key, open_cache
from tests.training.units import saved_teacher, unit, with_cache

CPU = torch.device("cpu")


@pytest.fixture
def augmented(tmp_path: Path) -> Unit:
    return unit("kd", saved_teacher(tmp_path), recipe={"augment": {"crop": 2, "flip": True}, "views": 3})


def test_every_sample_and_view_has_its_own_live_output_in_half_precision(tmp_path: Path, augmented: Unit) -> None:
    assert augmented.teacher is not None
    task = build_task(augmented.task)
    cache = open_cache(with_cache(augmented.teacher, augmented, tmp_path / "cache").cache or Path())
    live = LiveTeacher(load_teacher(augmented.teacher, task, CPU), (), "fp32")
    recipe = augmented.recipe
    loader = Loader(task.splits().transfer, 60, augment=recipe.augment, views=recipe.views, data_seed=0, order_seed=3)
    seen = set()
    for epoch in range(4):
        for batch in loader.batches(epoch):
            torch.testing.assert_close(cache(batch).logits, live(batch).logits.half().float())
            seen.add(batch.view)
    assert seen == {0, 1, 2}
    clean = cache.views[: cache.rows]
    assert not np.array_equal(clean, cache.views[cache.rows : 2 * cache.rows])


def test_the_test_set_is_cached_in_order(tmp_path: Path, augmented: Unit) -> None:
    assert augmented.teacher is not None
    task = build_task(augmented.task)
    cache = open_cache(with_cache(augmented.teacher, augmented, tmp_path / "cache").cache or Path())
    model = load_teacher(augmented.teacher, task, CPU)
    test = task.splits().test
    from kdbench.training.evaluate import predict
    from kdbench.training.session import LocalSession

    expected = predict(model, test, LocalSession(device=CPU), "fp32").half().numpy()
    assert np.array_equal(cache.test, expected)


def test_a_cache_that_is_broken_off_leaves_nothing(tmp_path: Path, augmented: Unit) -> None:
    assert augmented.teacher is not None
    task = build_task(augmented.task)
    folder = tmp_path / "cache" / "key"
    building = build_cache(folder, load_teacher(augmented.teacher, task, CPU), augmented.teacher, task.splits(), augmented.recipe, 0, CPU)
    next(building)
    building.close()
    assert list(folder.parent.iterdir()) == []


def test_a_damaged_cache_is_named(tmp_path: Path, augmented: Unit) -> None:
    assert augmented.teacher is not None
    folder = with_cache(augmented.teacher, augmented, tmp_path / "cache").cache
    assert folder is not None
    views = folder / "views.npy"
    views.write_bytes(views.read_bytes()[:500])
    with pytest.raises(RunFailed, match=f"teacher cache {folder}.*delete that folder"):
        open_cache(folder)


def test_the_key_follows_all_that_decides_the_outputs(tmp_path: Path, augmented: Unit) -> None:
    assert augmented.teacher is not None
    splits = build_task(augmented.task).splits()
    base = cache_key(augmented.teacher, splits, augmented.recipe, 0)
    others = [
        cache_key(augmented.teacher.model_copy(update={"sha": "other"}), splits, augmented.recipe, 0),
        cache_key(augmented.teacher.model_copy(update={"precision": "bf16"}), splits, augmented.recipe, 0),
        cache_key(augmented.teacher, splits, augmented.recipe.model_copy(update={"views": 4}), 0),
        cache_key(augmented.teacher, splits, augmented.recipe, 1),
    ]
    assert len({base, *others}) == 5
    assert cache_key(augmented.teacher, splits, augmented.recipe.model_copy(update={"lr": 9.0}), 0) == base
