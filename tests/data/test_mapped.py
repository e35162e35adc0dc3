"""Data that other processes map: the same samples, splits and hashes, and no copy of the pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdbench.data import mapped, sources
from kdbench.data.batch import Part
from kdbench.data.loader import Loader
from kdbench.data.mapped import adopt, write_mapped
from kdbench.data.sources import DataSpec, open_source
from kdbench.data.views import Augment
from kdbench.tasks import build as tasks
from kdbench.tasks.base import Task
from kdbench.tasks.build import TaskSpec, build_task

DATA = {"name": "shapes", "train": 60, "test": 20, "target": "class"}
TASK = TaskSpec.model_validate({"name": "classification", "data": DATA, "val_size": 15, "transfer_size": 20})


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has opened nothing yet."""
    monkeypatch.setattr(sources, "MAPPED", {})
    for memory in (sources._opened, tasks._built):
        memory.cache_clear()
    yield
    for memory in (sources._opened, tasks._built):
        memory.cache_clear()


def adopted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The task as a process has it that was told of the folder and can't make the data itself."""
    sources._opened.cache_clear()
    tasks._built.cache_clear()
    monkeypatch.setattr(sources, "resolve", None)
    adopt(folder)
    return build_task(TASK)


@pytest.mark.usefixtures("another_process")
def test_a_mapped_data_set_is_the_one_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_task(TASK)
    assert first.source is not None
    folder = write_mapped(first.source, tmp_path / "data")
    assert folder is not None
    assert folder == write_mapped(first.source, tmp_path / "data")
    second = adopted(folder, monkeypatch)
    assert second is not first
    assert second.info == first.info
    ours, theirs = first.splits(), second.splits()
    assert (ours.hash, ours.data_hash) == (theirs.hash, theirs.data_hash)
    for name in ("train", "transfer", "val", "test"):
        assert getattr(ours, name).sha256() == getattr(theirs, name).sha256()
    assert second.source is not None
    assert mapped._facts(second.source) == mapped._facts(first.source) | {"made_by": first.source.made_by}


@pytest.mark.usefixtures("another_process")
def test_parts_share_the_pixels_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_task(TASK).source
    assert source is not None
    folder = write_mapped(source, tmp_path)
    assert folder is not None
    task = adopted(folder, monkeypatch)
    assert task.source is not None
    splits, where = task.splits(), task.source.train.pixels.data_ptr()
    for part in (splits.train, splits.transfer, splits.val):
        assert isinstance(part.inputs, torch.Tensor)
        assert part.inputs.data_ptr() == where
    (file,) = folder.glob("train-inputs.npy")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()


@pytest.mark.usefixtures("another_process")
def test_without_its_folder_the_data_set_is_made_again(tmp_path: Path) -> None:
    adopt(tmp_path / "gone")
    assert len(open_source(DataSpec.model_validate(DATA)).train) == 60


def test_a_part_of_a_part_shows_the_samples_of_its_rows() -> None:
    whole = Part(torch.randint(256, (9, 1, 4, 4), dtype=torch.uint8), torch.arange(9) % 3, 100 + torch.arange(9), classes=3)
    some = whole.within(torch.tensor([7, 2, 5, 8]))
    few = some.within(torch.tensor([3, 0]))
    for part, rows in ((some, [7, 2, 5, 8]), (few, [8, 7]), (some.select(torch.tensor([1])), [2])):
        copied = whole.select(torch.tensor(rows))
        assert len(part) == len(rows)
        assert part.classes == 3
        assert torch.equal(part.pixels, copied.pixels)
        assert torch.equal(part.target, copied.target)
        assert torch.equal(part.index, copied.index)
        assert part.sha256() == copied.sha256()
    loaders = [
        Loader(part, 2, augment=Augment(crop=1, flip=True, mixup=0.5), views=2, data_seed=1, order_seed=2)
        for part in (some, whole.select(torch.tensor([7, 2, 5, 8])))
    ]
    for ours, theirs in zip(*(loader.batches(1) for loader in loaders), strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.target, theirs.target)
