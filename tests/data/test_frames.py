"""How pictures fill an input: the whole, undistorted or not, or the centre; positions move as the pixels do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as transforms

from kdbench.data.frames import PADDING, Frame, Placement, sides_of

SIDES = st.integers(3, 60)


def picture(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(height * 100 + width).integers(0, 256, (3, height, width), dtype=np.uint8))


def test_one_side_stands_for_both() -> None:
    assert sides_of(5) == (5, 5)
    assert sides_of((4, 6)) == (4, 6)


def test_a_letterbox_shows_the_whole_picture_in_the_corner_and_its_padding_right_or_below() -> None:
    image = picture(20, 40)
    placement = Frame((32, 32), "letterbox").place(20, 40)
    assert (placement.resized, placement.corner) == ((16, 32), (0, 0))
    shown = placement.picture(image, PADDING)
    assert torch.equal(shown[:, :16], transforms.resize(image, [16, 32], antialias=True))
    assert shown[:, 16:].unique(dim=1).flatten(1).unique(dim=1).flatten().tolist() == list(PADDING)
    upright = Frame((32, 32), "letterbox").place(40, 20).picture(picture(40, 20), (1, 2, 3))
    assert torch.equal(upright[:, :, 16:], torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 32, 16))


def test_padding_is_the_mean_colour_which_is_about_zero_once_it_is_normalised() -> None:
    from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD

    assert all(abs(value / 255 - mean) / std < 0.01 for value, mean, std in zip(PADDING, IMAGENET_MEAN, IMAGENET_STD, strict=True))


def test_a_stretched_picture_fills_the_input() -> None:
    image = picture(20, 40)
    shown = Frame((33, 17), "stretch").place(20, 40).picture(image, PADDING)
    assert torch.equal(shown, transforms.resize(image, [33, 17], antialias=True))


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.integers(3, 20), st.integers(0, 5))
def test_the_centre_of_a_square_input_is_torchvisions(height: int, width: int, size: int, margin: int) -> None:
    image = picture(height, width)
    expected = transforms.center_crop(transforms.resize(image, [size + margin], antialias=True), [size, size])
    assert torch.equal(Frame((size, size), "centre", size + margin).place(height, width).picture(image, PADDING), expected)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(["letterbox", "stretch"]))
def test_what_shows_all_of_a_picture_keeps_its_edges(height: int, width: int, high: int, wide: int, fitting: str) -> None:
    placement = Frame((high, wide), fitting).place(height, width)
    (across, down), (right, below) = placement.scale, placement.shift
    assert (right, below) == (0, 0)
    assert (height * down, width * across) == pytest.approx(placement.resized)
    assert placement.resized[0] <= high
    assert placement.resized[1] <= wide
    assert high in placement.resized or wide == placement.resized[1]


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.integers(3, 20), st.sampled_from(["centre", "letterbox", "stretch"]), st.booleans())
def test_each_pixel_of_the_input_shows_the_pixel_that_its_centre_lies_in(
    height: int, width: int, size: int, fitting: str, crop: bool
) -> None:
    part = (1, 0, height - 1, width - 2) if crop else None
    placement = Frame((size, size + 2), fitting, size + 3).place(height, width, part)
    rows, columns, (down, across) = placement.nearest()
    (x_scale, y_scale), (x_shift, y_shift) = placement.scale, placement.shift
    for shown, source, scale, shift, side in ((down, rows, y_scale, y_shift, height), (across, columns, x_scale, x_shift, width)):
        centres = (torch.arange(shown.start, shown.stop, dtype=torch.float64) + 0.5 - shift) / scale
        assert source.tolist() == (centres + 1e-9).floor().int().tolist()
        assert source.min() >= 0
        assert source.max() < side


def test_a_part_fills_the_whole_input_whatever_the_fitting() -> None:
    for fitting in ("centre", "letterbox", "stretch"):
        placement = Frame((8, 16), fitting, 9).place(30, 30, (10, 4, 5, 20))
        assert placement == Placement((30, 30), (10, 4, 5, 20), (8, 16), (0, 0), (8, 16))
        assert placement.scale == (16 / 20, 8 / 5)
        assert placement.shift == (-4 * 16 / 20, -10 * 8 / 5)
        image = picture(30, 30)
        assert torch.equal(placement.picture(image, PADDING), transforms.resized_crop(image, 10, 4, 5, 20, [8, 16], antialias=True))


def test_the_centre_of_an_oblong_input_covers_it() -> None:
    for height, width in ((40, 30), (30, 90), (31, 47)):
        placement = Frame((20, 30), "centre", 22).place(height, width)
        assert placement.resized[0] >= 20
        assert placement.resized[1] >= 30
        assert placement.scale[0] == pytest.approx(placement.scale[1], rel=0.05)
        rows, columns, there = placement.nearest()
        assert (len(rows), len(columns), there) == (20, 30, (slice(0, 20), slice(0, 30)))
