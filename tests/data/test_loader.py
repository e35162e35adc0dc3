from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbench.data.batch import Batch, Part
from kdbench.data.loader import Loader, in_order, view_batches
from kdbench.data.views import Augment
from kdbench.errors import UserError
from tests.data.viewing import augment

AUGMENT = Augment(crop=2, flip=True)
_CPU = torch.device("cpu")


def part(count: int) -> Part:
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=random)
    return Part(images, torch.arange(count) % 3, torch.arange(count) + 100)


def loader(count: int = 20, batch_size: int = 6, **changed) -> Loader:
    options = {"part": part(count), "augment": AUGMENT, "views": 2, "data_seed": 5, "order_seed": 7, **changed}
    return Loader(batch_size=batch_size, **options)


def equal(one: Batch, other: Batch) -> bool:
    return one.view == other.view and all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("inputs", "target", "index"))


@settings(deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(12, 40), st.integers(0, 3))
def test_workers_batches_joined_in_rank_order_are_the_single_workers(world_size, count, epoch):
    alone = list(loader(count, 12).batches(epoch))
    workers = [list(loader(count, 12, rank=rank, world_size=world_size).batches(epoch)) for rank in range(world_size)]
    assert len(alone) == count // 12
    for whole, *shares in zip(alone, *workers, strict=True):
        joined = Batch(*(torch.cat([getattr(s, name) for s in shares]) for name in ("inputs", "target", "index")), shares[0].view)
        assert equal(whole, joined)


def test_an_epoch_shows_each_sample_at_most_once_and_drops_the_incomplete_batch():
    batches = list(loader(20, 6).batches(0))
    seen = torch.cat([batch.index for batch in batches])
    assert [len(batch) for batch in batches] == [6, 6, 6]
    assert len(seen.unique()) == 18


def test_a_set_smaller_than_a_batch_gives_one_batch_that_the_workers_share_evenly():
    shares = [list(loader(5, 8, rank=rank, world_size=2).batches(0)) for rank in (0, 1)]
    assert [[len(batch) for batch in share] for share in shares] == [[2], [2]]
    assert loader(5, 8).steps_per_epoch == 1


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(7, 12), st.integers(12, 40))
def test_the_batches_are_the_same_for_any_number_of_workers_where_parts_may_be_uneven(world_size, batch_size, count):
    alone = list(loader(count, batch_size, even=False).batches(1))
    loaders = [loader(count, batch_size, even=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = loaders[0].shares
    assert sum(shares) == batch_size
    assert max(shares) - min(shares) <= 1
    for whole, *parts in zip(alone, *(one.batches(1) for one in loaders), strict=True):
        joined = Batch(*(torch.cat([getattr(s, name) for s in parts]) for name in ("inputs", "target", "index")), parts[0].view)
        assert equal(whole, joined)
        assert tuple(len(part.index) for part in parts) == shares


def test_a_set_smaller_than_a_batch_is_one_batch_whatever_the_number_of_uneven_workers():
    assert [loader(5, 8, even=False, world_size=world).steps_per_epoch for world in (1, 2, 3)] == [1, 1, 1]
    assert loader(5, 8, even=False, world_size=3).shares == (1, 2, 2)


def test_a_resumed_epoch_continues_where_it_stopped():
    whole, rest = list(loader().batches(3)), list(loader().batches(3, start_step=1))
    assert len(rest) == 2
    assert all(equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    def first(epoch: int = 0, **changed) -> list[int]:
        return torch.cat([batch.index for batch in loader(**changed).batches(epoch)]).tolist()

    assert first() == first(data_seed=6, views=None)
    assert first() != first(epoch=1)
    assert first() != first(order_seed=8)
    assert first(epoch=8, order_seed=7) != first(epoch=7, order_seed=8)


def test_views_repeat_after_k_epochs_and_never_without_k():
    assert [loader(views=2).view(epoch) for epoch in range(4)] == [0, 1, 0, 1]
    assert [loader(views=None).view(epoch) for epoch in range(4)] == [0, 1, 2, 3]
    assert [loader(views=2, augment=Augment()).view(epoch) for epoch in range(4)] == [0, 0, 0, 0]
    assert next(loader(views=2).batches(3)).view == 1


def test_some_rows_of_a_view_are_those_of_the_whole_view():
    (whole,) = view_batches(part(20), 2, AUGMENT, 5, 20)
    some = list(view_batches(part(20), 2, AUGMENT, 5, 4, rows=range(7, 17)))
    assert [len(batch) for batch in some] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.inputs for batch in some]), whole.inputs[7:17])
    assert torch.equal(torch.cat([batch.index for batch in some]), whole.index[7:17])


def test_batches_are_the_augmented_views_that_a_cache_would_hold():
    batch = next(loader().batches(1))
    (cached,) = view_batches(part(20), 1, AUGMENT, 5, 20)
    rows = batch.index - 100
    assert torch.equal(batch.inputs, cached.inputs[rows])
    assert torch.equal(batch.target, cached.target[rows])


def test_a_part_is_copied_to_a_device_once():
    data = part(6)
    other = torch.device("meta")
    assert data.on(_CPU) is data
    assert data.on(other).inputs.device == other
    assert data.on(other) is data.on(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_batch_waits_for_the_gpu():
    everything = Augment(resized_crop=0.2, crop=2, flip=True, operations=2, color=0.3, erase=0.5, mixup=0.2, cutmix=1.0)
    data = replace(part(60), classes=3)
    batches = Loader(data, 6, augment=everything, views=2, data_seed=5, order_seed=7, device=torch.device("cuda")).batches(0)
    next(batches)  # copies the order and the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(len(batch) for batch in batches) == 54
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evaluation_sees_every_sample_once_in_order_and_untouched():
    data = part(10)
    batches = list(in_order(data, 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.index for batch in batches]), data.index)
    plain, _ = augment(data.inputs, data.target, data.index, 0, 0, Augment())
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), plain)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 7, "world_size": 2}, "batch_size 7 can't be cut evenly among 2 workers; make it a multiple of 2"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"count": 3, "batch_size": 8, "world_size": 4, "even": False}, "3 training samples are too few for 4 workers"),
        ({"count": 3, "batch_size": 8, "world_size": 4}, "3 training samples are too few for 4 workers"),
        ({"views": 0}, "views is 0"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        loader(**changed)


@pytest.mark.parametrize(
    ("target", "augment", "message"),
    [
        (torch.rand(20, 8, 8), {}, r"a column float32 \[20, 8, 8\] needs a kind"),
        (torch.zeros(20, 2, 8, 8), {"color": 0.5}, r"a column float32 \[20, 2, 8, 8\] needs a kind"),
        (torch.zeros(20, 2, 8, 8, dtype=torch.long), {"erase": 0.5}, r"needs a kind"),
        (torch.zeros(20, 8, 4, dtype=torch.long), {"resized_crop": 0.5}, r"must be 8x8 pixels to follow recipe.augment.resized_crop"),
    ],
)
def test_targets_that_views_would_alter_or_leave_behind_are_refused(target: torch.Tensor, augment: dict, message: str) -> None:
    images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=message):
        loader(part=Part(images, target, torch.arange(20)), augment=Augment(**augment))


@pytest.mark.parametrize(
    ("target", "augment"),
    [
        (torch.zeros(20, 8, 8, dtype=torch.uint8), {"flip": True, "crop": 1}),
        (torch.rand(20, 5), {"flip": True, "crop": 1, "erase": 0.5}),
    ],
)
def test_targets_that_follow_their_images_or_need_not_are_taken(target: torch.Tensor, augment: dict) -> None:
    images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    batch = next(iter(loader(part=Part(images, target, torch.arange(20)), augment=Augment(**augment)).batches(0)))
    assert batch.target.shape == (6, *target.shape[1:])
    assert batch.target.is_floating_point() == target.is_floating_point()
