import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kdbench.data.views import IGNORED, Augment, augment, unit_range

SPECS = st.builds(Augment, crop=st.integers(0, 4), flip=st.booleans())


def samples(count: int, channels: int = 3, height: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images whose pixels are all different within an image, their first channel as a mask, and indices."""
    pixels = torch.randperm(200, generator=torch.Generator().manual_seed(0))[: height * width] + 1
    images = pixels.to(torch.uint8).view(1, 1, height, width).repeat(count, channels, 1, 1)
    return images, images[:, 0].long(), torch.arange(count) * 7


@settings(deadline=None)
@given(SPECS, st.integers(0, 5), st.integers(0, 2**40), st.permutations(range(6)), st.integers(1, 6))
def test_a_view_depends_neither_on_order_nor_on_the_rest_of_the_batch(spec, view, data_seed, order, kept):
    images, masks, index = samples(6)
    all_images, all_masks = augment(images, masks, index, view, data_seed, spec)
    rows = torch.tensor(order[:kept])
    some_images, some_masks = augment(images[rows], masks[rows], index[rows], view, data_seed, spec)
    assert torch.equal(some_images, all_images[rows])
    assert torch.equal(some_masks, all_masks[rows])


@settings(deadline=None)
@given(SPECS, st.integers(0, 5), st.integers(0, 2**40))
def test_the_mask_moves_with_the_image_and_is_ignored_outside_it(spec, view, data_seed):
    images, masks, index = samples(8)
    seen, labels = augment(images, masks, index, view, data_seed, spec)
    inside = labels != IGNORED
    shown = (seen[:, 0] * 255).round().long()
    assert torch.equal(shown[inside], labels[inside])
    assert torch.equal(~inside, shown == 0)  # black comes from outside only: the images have no black pixel


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(0, 5), st.integers(0, 2**40))
def test_flipping_the_flipped_samples_back_gives_the_view_without_flips(crop, view, data_seed):
    images, _, index = samples(8)
    target = torch.zeros(8, dtype=torch.long)
    plain, _ = augment(images, target, index, view, data_seed, Augment(crop=crop))
    flipped, _ = augment(images, target, index, view, data_seed, Augment(crop=crop, flip=True))
    same = (plain == flipped).flatten(1).all(1)
    assert torch.equal(torch.where(same[:, None, None, None], flipped, flipped.flip(3)), plain)


def test_crops_reach_every_offset_and_no_further():
    images, masks, _ = samples(1, height=5, width=5)
    count, crop = 2000, 2
    seen, _ = augment(images.expand(count, -1, -1, -1), masks.expand(count, -1, -1), torch.arange(count), 0, 0, Augment(crop=crop))
    centre = unit_range(images)[0, 0, 2, 2]
    places = (seen[:, 0] == centre).nonzero()[:, 1:]
    assert len(places) == count
    assert len(places.unique(dim=0)) == (2 * crop + 1) ** 2


def test_half_of_the_samples_are_flipped():
    images, masks, _ = samples(1)
    seen, _ = augment(images.expand(2000, -1, -1, -1), masks.expand(2000, -1, -1), torch.arange(2000), 0, 0, Augment(flip=True))
    flipped = (seen != unit_range(images)).flatten(1).any(1)
    assert 900 < flipped.sum() < 1100
    assert torch.equal(seen[flipped], unit_range(images).flip(3).expand_as(seen[flipped]))


@pytest.mark.parametrize("changed", ["view", "data_seed", "index"])
def test_another_view_seed_or_sample_is_augmented_differently(changed):
    images, masks, index = samples(32)
    spec, arguments = Augment(crop=4, flip=True), {"index": index, "view": 0, "data_seed": 0}
    one, _ = augment(images, masks, **arguments, spec=spec)
    other, _ = augment(images, masks, **(arguments | {changed: arguments[changed] + 1}), spec=spec)
    assert (one != other).flatten(1).any(1).sum() > 24


def test_view_zero_is_augmented_too():
    images, masks, index = samples(32)
    seen, _ = augment(images, masks, index, 0, 0, Augment(crop=4))
    assert not torch.equal(seen, unit_range(images))


def test_without_augmentation_images_are_only_scaled_and_targets_kept():
    images, masks, index = samples(4)
    seen, labels = augment(images, masks.to(torch.uint8), index, 3, 9, Augment())
    assert seen.dtype == torch.float32
    assert torch.allclose(seen, images / 255)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, masks)


def test_class_targets_are_returned_as_they_are():
    images, _, index = samples(4)
    target = torch.tensor([3, 1, 2, 0])
    assert augment(images, target, index, 0, 0, Augment(crop=2, flip=True))[1] is target


def test_the_scale_maps_255_to_one_and_never_beyond():
    values = unit_range(torch.arange(256, dtype=torch.uint8))
    assert values[0] == 0
    assert values[255] == 1
    assert (values.diff() > 0).all()


def test_a_view_recipe_is_a_fixed_and_strict_value():
    assert Augment().none
    assert not Augment(crop=1).none
    assert not Augment(flip=True).none
    with pytest.raises(ValidationError):
        Augment(crop=-1)
    with pytest.raises(ValidationError):
        Augment(cut=1)
