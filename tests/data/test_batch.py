"""Parts of a data set: which samples they show, and that they share its pixels."""

from __future__ import annotations

import torch

from kdbench.data.batch import Part
from kdbench.data.loader import Loader
from kdbench.data.views import Augment
from kdbench.tasks.build import TaskSpec, build_task

DATA = {"name": "shapes", "train": 60, "test": 20, "target": "class"}
TASK = TaskSpec.model_validate({"name": "classification", "data": DATA, "val_size": 15, "transfer_size": 20})


def test_the_parts_of_a_split_share_the_pixels_of_the_data_set() -> None:
    task = build_task(TASK)
    assert task.source is not None
    splits, where = task.splits(), task.source.train.pixels.data_ptr()
    for part in (splits.train, splits.transfer, splits.val):
        assert isinstance(part.inputs, torch.Tensor)
        assert part.inputs.data_ptr() == where


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
