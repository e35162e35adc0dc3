"""Samples of several columns: what is asked of them before training, and all of them through one view."""

import re

import pytest
import torch

from kdbench.data.draws import Draws
from kdbench.data.kinds import Boxes, Enlarged, Image, Kind, Labels, Pixels, Plain, Points
from kdbench.data.samples import kinds_of, seen, size_of, unfit, unmixable
from kdbench.data.views import Augment, View, view_of
from kdbench.errors import UserError

MOVING = Augment(crop=2, flip=True)
IMAGES = torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


def test_a_named_kind_comes_before_the_usual_one():
    columns = {"image": IMAGES, "points": torch.zeros(6, 4, 3), "class": LABELS}
    found = kinds_of(columns, {"points": Points(), "unused": Boxes()}, images=True)
    assert found == {"image": Image(), "points": Points(), "class": Plain()}
    assert kinds_of(IMAGES, {}, images=True) == {"": Image()}
    assert kinds_of(IMAGES, {"": Plain()}, images=True) == {"": Plain()}


def test_a_column_without_a_kind_is_named():
    with pytest.raises(UserError, match=r"^column 'depth': a column float32 \[6, 1, 8, 10\] needs a kind"):
        kinds_of({"image": IMAGES, "depth": torch.zeros(6, 1, 8, 10)}, {}, images=True)
    with pytest.raises(UserError, match=r"^a column float32 \[6, 1, 8, 10\] needs a kind"):
        kinds_of(torch.zeros(6, 1, 8, 10), {}, images=True)


@pytest.mark.parametrize("kind", [Image(), Labels(), Pixels()])
def test_the_size_is_that_of_the_first_column_with_pixels(kind):
    columns = {
        "large": torch.zeros(6, 3, 16, 20),
        "words": torch.zeros(6, 9),
        "first": torch.zeros(6, 3, 8, 10),
        "next": torch.zeros(6, 3, 4, 4),
    }
    kinds = {"large": Enlarged(2), "words": Plain(), "first": kind, "next": Image()}
    assert size_of(columns, kinds) == (8, 10)
    assert size_of(IMAGES, {"": Image()}) == (8, 10)


def test_samples_without_pixels_have_no_size_and_no_view_changes_them():
    columns = {"words": LABELS, "large": torch.zeros(6, 3, 16, 20)}
    assert size_of(columns, {"words": Plain(), "large": Enlarged(2)}) is None
    view = view_of(Draws(0, LABELS, 0), Augment(crop=2, flip=True, operations=2, color=0.5, erase=0.5, resized_crop=0.5), None)
    assert view.changes == ()
    words = {"words": LABELS}
    assert seen(words, {"words": Plain()}, view)["words"] is LABELS


@pytest.mark.parametrize(
    ("kind", "values", "steps", "said"),
    [
        (Boxes(), torch.zeros(6, 2, 5), Augment(), r"column 'it': boxes must be float32 \[N, M, 4\] .*; got float32 \[6, 2, 5\]"),
        (Boxes(), torch.zeros(6, 2, 4), Augment(mixup=0.1), r"column 'it': recipe\.augment\.mixup .* a set of boxes can't be mixed"),
        (Labels(), torch.zeros(6, 4, 5, dtype=torch.long), MOVING, r"column 'it': must be 8x10 pixels to follow recipe\.augment\.crop, "
         r"recipe\.augment\.flip, got int64 \[6, 4, 5\]; .*"),
        (Pixels(), torch.zeros(6, 1, 10, 8), MOVING, r"column 'it': must be 8x10 pixels .*"),
        (Image(), torch.zeros(6, 3, 8, 9, dtype=torch.uint8), MOVING, r"column 'it': must be 8x10 pixels .*"),
        (Enlarged(2), torch.zeros(6, 3, 8, 10, dtype=torch.uint8), Augment(erase=0.1), r"column 'it': must be 16x20 pixels to follow "
         r"recipe\.augment\.erase, .*"),
    ],
)  # fmt: skip
def test_a_column_that_can_not_be_used_is_named_in_one_line(kind, values, steps, said):
    columns, kinds = {"image": IMAGES, "it": values}, {"image": Image(), "it": kind}
    reason = unfit(columns, kinds, steps, (8, 10))
    assert reason is not None
    assert "\n" not in reason
    assert re.fullmatch(said, reason)


def test_what_moves_needs_an_image_of_the_sample():
    columns = {"joints": torch.zeros(6, 17, 3), "class": LABELS}
    reason = unfit(columns, {"joints": Points(), "class": Plain()}, MOVING, None)
    assert (
        reason == "column 'joints': recipe.augment.crop, recipe.augment.flip move the sample's image, and it has none; leave these keys out"
    )
    assert unfit(columns, {"joints": Points(), "class": Plain()}, Augment(color=0.5), None) is None
    assert unfit(columns, {"joints": Plain(), "class": Plain()}, MOVING, None) is None


def test_columns_that_fit_are_not_refused():
    columns = {
        "image": IMAGES,
        "large": torch.zeros(6, 3, 16, 20, dtype=torch.uint8),
        "labels": torch.zeros(6, 2, 8, 10, dtype=torch.uint8),
        "depth": torch.zeros(6, 1, 8, 10),
        "boxes": torch.zeros(6, 4, 4),
    }
    kinds: dict[str, Kind] = {"image": Image(), "large": Enlarged(2), "labels": Labels(), "depth": Pixels(), "boxes": Boxes()}
    assert unfit(columns, kinds, Augment(crop=2, flip=True, color=0.3, erase=0.3, resized_crop=0.5), (8, 10)) is None
    assert unfit(IMAGES, {"": Image()}, MOVING, (8, 10)) is None
    small = torch.zeros(6, 4, 5, dtype=torch.long)
    assert unfit(small, {"": Labels()}, Augment(color=0.5), (8, 10)) is None  # nothing moves, so it has nothing to follow
    assert unfit(torch.zeros(6, 2, 5), {"": Boxes()}, Augment(), None) == (
        "boxes must be float32 [N, M, 4] of x0, y0, x1, y1 in pixels; got float32 [6, 2, 5]"
    )


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_only_one_image_and_one_label_of_known_classes_are_mixed(key):
    mixing, plain = Augment(**{key: 1.0}), {"": Plain()}
    image = {"": Image()}
    assert unmixable(IMAGES, LABELS, (image, plain), 3, mixing) is None
    others = [
        (IMAGES, LABELS, (image, plain), None),
        (IMAGES, LABELS.float(), (image, plain), 3),
        (IMAGES, LABELS[:, None], (image, plain), 3),
        (IMAGES[:, None], LABELS, (image, plain), 3),
        (LABELS, LABELS, (plain, plain), 3),
        (IMAGES, IMAGES, (image, image), 3),
        ({"image": IMAGES}, LABELS, ({"image": Image()}, plain), 3),
        ({"image": IMAGES, "words": LABELS}, LABELS, ({"image": Image(), "words": Plain()}, plain), 3),
        (IMAGES, {"class": LABELS, "boxes": torch.zeros(6, 1, 4)}, (image, {"class": Plain(), "boxes": Boxes()}), 3),
    ]
    for inputs, target, kinds, classes in others:
        reason = unmixable(inputs, target, kinds, classes, mixing)
        assert reason is not None
        assert reason.startswith(f"recipe.augment.{key} mixes two images and their labels, so it needs one label per image")
        assert unmixable(inputs, target, kinds, classes, MOVING) is None


def a_view() -> View:
    return view_of(Draws(0, LABELS, 1), MOVING, (8, 10))


def test_all_columns_of_a_sample_go_through_the_same_view():
    columns = {"image": IMAGES, "labels": IMAGES[:, 0], "words": LABELS}
    kinds: dict[str, Kind] = {"image": Image(), "labels": Labels(), "words": Plain()}
    found = seen(columns, kinds, a_view())
    assert isinstance(found, dict)
    assert list(found) == list(columns)
    black = found["labels"] == 255
    assert torch.equal((found["image"][:, 0] * 255).round().long()[~black], found["labels"][~black])
    assert found["words"] is LABELS
    alone = seen(IMAGES, {"": Image()}, a_view())
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, found["image"])


def test_a_picture_as_a_target_must_say_whether_it_is_recoloured():
    with pytest.raises(UserError, match="needs a kind"):
        kinds_of(IMAGES, {}, images=False)
    assert kinds_of(IMAGES, {"": Image()}, images=False) == {"": Image()}
