import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from kdbench.data.hashing import hash64
from kdbench.data.pixels import unit_range
from kdbench.data.resizing import parts, resized, resized_nearest
from kdbench.data.views import IGNORED, Augment
from tests.data.viewing import augment

CROPS = st.builds(Augment, crop=st.integers(0, 4), flip=st.booleans())
SPECS = st.builds(
    Augment,
    resized_crop=st.none() | st.floats(0.05, 1),
    crop=st.integers(0, 4),
    flip=st.booleans(),
    operations=st.integers(0, 3),
    magnitude=st.floats(0, 30),
    color=st.floats(0, 1),
    erase=st.floats(0, 1),
)
KEYS = [{"resized_crop": 0.2}, {"crop": 4}, {"operations": 2}, {"color": 0.8}, {"erase": 1.0}]


def samples(count: int, channels: int = 3, height: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images whose pixels are all different within an image, their first channel as a mask, and indices."""
    pixels = torch.randperm(200, generator=torch.Generator().manual_seed(0))[: height * width] + 1
    images = pixels.to(torch.uint8).view(1, 1, height, width).repeat(count, channels, 1, 1)
    return images, images[:, 0].long(), torch.arange(count) * 7


@settings(deadline=None)
@given(SPECS, st.integers(0, 5), st.integers(0, 2**40), st.permutations(range(6)), st.integers(1, 6), st.sampled_from([1, 3]))
def test_a_view_depends_neither_on_order_nor_on_the_rest_of_the_batch(spec, view, data_seed, order, kept, channels):
    images, masks, index = samples(6, channels)
    all_images, all_masks = augment(images, masks, index, view, data_seed, spec)
    rows = torch.tensor(order[:kept])
    some_images, some_masks = augment(images[rows], masks[rows], index[rows], view, data_seed, spec)
    assert torch.equal(some_images, all_images[rows])
    assert torch.equal(some_masks, all_masks[rows])


@settings(deadline=None)
@given(SPECS, st.integers(0, 5), st.integers(0, 2**40), st.sampled_from([1, 2, 3]))
def test_a_view_stays_in_the_unit_range_and_keeps_its_shape(spec, view, data_seed, channels):
    images, masks, index = samples(4, channels)
    seen, labels = augment(images, masks, index, view, data_seed, spec)
    assert seen.shape == images.shape
    assert seen.dtype == torch.float32
    assert seen.min() >= 0
    assert seen.max() <= 1
    assert set(labels.unique().tolist()) <= {IGNORED, *masks.unique().tolist()}


@settings(deadline=None)
@given(CROPS, st.integers(0, 5), st.integers(0, 2**40))
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
@pytest.mark.parametrize("keys", [*KEYS, {"crop": 4, "flip": True}], ids=str)
def test_another_view_seed_or_sample_is_augmented_differently(changed, keys):
    images, masks, index = samples(32, height=12, width=10)
    spec, arguments = Augment(**keys), {"index": index, "view": 0, "data_seed": 0}
    one, _ = augment(images, masks, **arguments, spec=spec)
    other, _ = augment(images, masks, **(arguments | {changed: arguments[changed] + 1}), spec=spec)
    assert (one != other).flatten(1).any(1).sum() > 24


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_view_zero_is_augmented_too(keys):
    images, masks, index = samples(32)
    seen, _ = augment(images, masks, index, 0, 0, Augment(**keys))
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
    changed = [*KEYS, {"flip": True}, {"mixup": 0.2}, {"cutmix": 1.0}]
    assert {key for keys in changed for key in keys} == set(Augment.model_fields) - {"magnitude"}
    assert not any(Augment(**keys).none for keys in changed)
    wrong = [{"crop": -1}, {"cut": 1}, {"resized_crop": 0}, {"resized_crop": 1.1}, {"operations": 1.5}, {"magnitude": 31}]
    wrong += [{"color": 1.5}, {"erase": 2}, {"mixup": -1}, {"cutmix": float("nan")}, {"mixup": float("inf")}]
    for keys in wrong:
        with pytest.raises(ValidationError):
            Augment(**keys)


@pytest.mark.parametrize(
    ("keys", "bits"),
    [
        ({"crop": 3, "flip": True}, "aef603a96189bea5"),
        ({"resized_crop": 0.2}, "fb9408fbb8a2949f"),
        ({"operations": 3, "magnitude": 17.0}, "daad6a1060c537dc"),
        ({"color": 0.5}, "885f5fd6d5b7b31d"),
        ({"erase": 0.7}, "821f1873bb09a1cc"),
    ],
    ids=str,
)
def test_a_view_has_the_bits_that_stored_teacher_outputs_were_computed_from(keys, bits):
    numbers = hash64(0, torch.arange(20 * 3 * 16 * 12)).bitwise_and(255).to(torch.uint8)
    images = numbers.view(20, 3, 16, 12)
    seen, labels = augment(images, images[:, 1], torch.arange(20) * 5, 2, 7, Augment(**keys))
    whole = (seen * 255).round().byte()
    assert hashlib.sha256(whole.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16] == bits


# --- colour ----------------------------------------------------------------------------------------------------------


def test_colours_vary_between_the_darkest_and_the_brightest_that_were_asked_for():
    count, strength = 4000, 0.5
    images = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8).expand(count, -1, -1, -1)
    seen, _ = augment(images, torch.zeros(count), torch.arange(count), 0, 0, Augment(color=strength))
    levels = (seen * 255).round()[:, 0, 0, 0]  # one even grey image: contrast leaves it alone
    assert levels.min() == 50
    assert levels.max() == 150
    assert abs(levels.mean() - 100) < 2


def test_grey_images_of_three_channels_stay_grey():
    images, masks, index = samples(16)
    seen, _ = augment(images, masks, index, 0, 0, Augment(color=1.0))
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert torch.equal(seen[:, 0], seen[:, 2])


def test_contrast_and_saturation_move_a_pixel_along_the_line_to_its_grey():
    colours = torch.tensor([[140, 80], [100, 120], [80, 130]], dtype=torch.uint8).view(1, 3, 1, 2).repeat(1, 1, 8, 4)
    seen, _ = augment(colours.expand(400, -1, -1, -1), torch.zeros(400), torch.arange(400), 0, 0, Augment(color=0.4))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    before, after = colours.float(), seen * 255
    chroma, new_chroma = before - (before * weights).sum(1, True), after - (after * weights).sum(1, True)
    # Brightness, contrast and saturation all scale the chroma, each image's by one number; no value is cut off.
    factor = (new_chroma * chroma).sum((1, 2, 3)) / (chroma * chroma).sum()
    assert (new_chroma - factor.view(-1, 1, 1, 1) * chroma).abs().max() < 2
    assert factor.std() > 0.1


# --- erasing ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(4, 20), st.integers(4, 20), st.integers(0, 2**40))
def test_what_is_erased_is_a_black_rectangle_inside_the_image_whose_labels_do_not_count(height, width, data_seed):
    images = torch.full((16, 3, height, width), 200, dtype=torch.uint8)
    masks = torch.ones(16, height, width, dtype=torch.long)
    seen, labels = augment(images, masks, torch.arange(16), 0, data_seed, Augment(erase=1.0))
    gone = labels == IGNORED
    assert torch.equal(seen, torch.where(gone[:, None], 0.0, unit_range(images)))
    rows, columns = gone.any(2), gone.any(1)
    assert torch.equal(gone, rows[:, :, None] & columns[:, None, :])
    for line in (*rows, *columns):
        places = line.nonzero().flatten()
        assert len(places)
        assert places[-1] - places[0] + 1 == len(places)


def test_as_many_are_erased_as_was_asked_for_and_the_others_are_left_alone():
    images = torch.full((4000, 1, 32, 32), 9, dtype=torch.uint8)
    seen, _ = augment(images, torch.zeros(4000), torch.arange(4000), 0, 0, Augment(erase=0.25))
    share = (seen == 0).double().mean((1, 2, 3))
    erased = share > 0
    assert 900 < erased.sum() < 1100
    assert torch.equal(seen[~erased], unit_range(images)[~erased])
    assert share[erased].min() < 0.03
    assert 0.35 < share[erased].max() < 0.42


# --- a part, resized -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(3, 17), st.integers(3, 17), st.floats(0.01, 1), st.integers(0, 2**62))
def test_a_part_lies_inside_the_image_and_has_about_the_area_that_was_asked_for(height, width, smallest, seed):
    boxes = parts(height, width, hash64(seed, torch.arange(300)).view(100, 3), smallest)
    top, left, down, across = boxes.unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert min(down.min(), across.min()) >= 1
    assert (top + down).max() <= height
    assert (left + across).max() <= width


def test_parts_of_a_large_image_have_the_areas_and_ratios_of_the_paper():
    boxes = parts(1000, 1000, hash64(5, torch.arange(9000)).view(3000, 3), 0.08).double()
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert 0.08 <= area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.78
    assert 1.29 < ratio.max() < 1.34


def test_resizing_agrees_with_torchvisions_bilinear_to_one_level():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 11, 14), dtype=torch.uint8, generator=random)
    boxes = parts(11, 14, hash64(1, torch.arange(120)).view(40, 3), 0.1)
    ours = resized(images, boxes)
    for image, box, mine in zip(images, boxes.tolist(), ours, strict=True):
        theirs = transforms.resized_crop(image.float(), *box, size=[11, 14], antialias=False)
        assert (mine.float() - theirs).abs().max() < 2


def test_the_labels_of_a_part_are_those_of_the_nearest_pixels():
    labels = torch.arange(11 * 14).view(1, 11, 14).repeat(40, 1, 1)
    boxes = parts(11, 14, hash64(1, torch.arange(120)).view(40, 3), 0.1)
    for label, box, mine in zip(labels, boxes.tolist(), resized_nearest(labels[:, None], boxes)[:, 0], strict=True):
        theirs = transforms.resized_crop(label[None].double(), *box, size=[11, 14], interpolation=InterpolationMode.NEAREST_EXACT)
        assert torch.equal(mine.double(), theirs[0])


def test_the_whole_image_resized_is_the_image():
    images, masks, _ = samples(3)
    boxes = torch.tensor([[0, 0, 6, 5]] * 3)
    assert torch.equal(resized(images, boxes), images)
    assert torch.equal(resized_nearest(masks[:, None], boxes)[:, 0], masks)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "keys", [*KEYS, {"resized_crop": 0.1, "crop": 4, "flip": True, "operations": 3, "color": 0.5, "erase": 0.5}], ids=str
)
def test_a_gpu_gives_the_same_bits(keys):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=random)
    arguments = images, images[:, 0] % 10, torch.arange(64)
    here = augment(*arguments, 1, 2, Augment(**keys))
    there = augment(*(tensor.cuda() for tensor in arguments), 1, 2, Augment(**keys))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
