"""Steps of a view: their motion says where their pixels come from, and enlarged steps do the same at a larger size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbench.data.changes import Change, Erased, Recoloured, Shifted
from kdbench.data.draws import Draws
from kdbench.data.operations import LARGEST_MAGNITUDE, MOVES, OPERATIONS, Operation
from kdbench.data.resizing import ResizedPart

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))
OUTSIDE = -1


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.arange(count) * 3, 1)


def shifted(size: tuple[int, int], padding: int, down: int, across: int, mirrored: bool = False) -> Shifted:
    return Shifted(size, padding, torch.tensor([down]), torch.tensor([across]), torch.tensor([mirrored]))


def operation(name: str, sign: int, size: tuple[int, int], magnitude: float = LARGEST_MAGNITUDE, count: int = 1) -> Operation:
    return Operation(size, torch.full((count,), OPERATIONS.index(name)), torch.full((count,), sign), magnitude)


def every_move(size: tuple[int, int], magnitude: float) -> Operation:
    """One sample for each operation and sign."""
    kind = torch.arange(len(OPERATIONS)).repeat_interleave(2)
    return Operation(size, kind, torch.arange(2).repeat(len(OPERATIONS)), magnitude)


def assert_motion_agrees_with_pixels(change: Change, size: tuple[int, int], count: int) -> None:
    """What is shown in the middle of a pixel lies in the pixel that it was taken from."""
    height, width = size
    numbers = torch.arange(height * width).view(1, 1, height, width).expand(count, -1, -1, -1)
    taken_from = change.moved(numbers, OUTSIDE)[:, 0]
    motion = change.motion
    assert motion is not None
    assert motion.size == size
    sample, row, column = (taken_from != OUTSIDE).nonzero().unbind(1)
    middles = torch.stack([column, row], dim=1) + 0.5
    linear, shift = motion.linear[sample].double(), motion.shift[sample].double()
    lies = torch.linalg.solve(linear, (middles - shift)[..., None])[..., 0]
    source = taken_from[sample, row, column]
    corner = torch.stack([source % width, source // width], dim=1)
    slack = 1e-4  # a few roundings of numbers below 100 to float32, twice that where a shear or a turn is undone
    assert ((lies >= corner - slack) & (lies <= corner + 1 + slack)).all()
    # A pixel of which nothing is seen would lie outside.
    sample, row, column = (taken_from == OUTSIDE).nonzero().unbind(1)
    middles = torch.stack([column, row], dim=1) + 0.5
    lies = torch.linalg.solve(motion.linear[sample].double(), (middles - motion.shift[sample].double())[..., None])[..., 0]
    x, y = lies.unbind(1)
    assert ((x <= slack) | (x >= width - slack) | (y <= slack) | (y >= height - slack)).all()


@settings(deadline=None, max_examples=40)
@given(SIZES, st.floats(0, LARGEST_MAGNITUDE), st.sampled_from([1, 2, 3]))
def test_the_motion_of_an_operation_is_where_its_pixels_come_from(size, magnitude, scale):
    change = every_move(size, magnitude).enlarged(scale)
    assert_motion_agrees_with_pixels(change, (size[0] * scale, size[1] * scale), 2 * len(OPERATIONS))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.floats(0.05, 1), st.integers(0, 2**40), st.sampled_from([1, 2, 3]))
def test_the_motion_of_a_resized_part_is_where_its_pixels_come_from(size, smallest, seed, scale):
    change = ResizedPart.drawn(draws(8, seed), size, smallest).enlarged(scale)
    assert_motion_agrees_with_pixels(change, (size[0] * scale, size[1] * scale), 8)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(0, 6), st.booleans(), st.integers(0, 2**40), st.sampled_from([1, 2, 3]))
def test_the_motion_of_a_crop_is_where_its_pixels_come_from(size, padding, flip, seed, scale):
    change = Shifted.drawn(draws(8, seed), size, padding, flip).enlarged(scale)
    assert_motion_agrees_with_pixels(change, (size[0] * scale, size[1] * scale), 8)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - set(MOVES)))
def test_an_operation_that_is_no_move_leaves_points_exactly_where_they_are(name):
    points = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0)) * 21
    assert torch.equal(operation(name, 1, (17, 21), count=2).motion.points(points), points)


@pytest.mark.parametrize("name", MOVES)
def test_a_move_and_the_move_of_the_other_sign_bring_points_back(name):
    points = torch.rand(1, 100, 2, generator=torch.Generator().manual_seed(0)) * 32
    there = operation(name, 1, (32, 32)).motion.points(points)
    back = operation(name, 0, (32, 32)).motion.points(there)
    assert (there - points).abs().max() > 1
    # Entries of the matrix are rounded to 2**-16, so each product is off by 2**-17; four of them, at most 16 * sqrt(2) from the centre
    # and as much again for the second move.
    assert (back - points).abs().max() < 4 * 2**-17 * 2 * 16 * 2**0.5


def test_a_mirror_and_a_shift_are_undone_exactly():
    points = torch.rand(1, 100, 2, generator=torch.Generator().manual_seed(0)) * 16
    points = (points * 64).round() / 64  # sums with whole numbers are exact
    for change, inverse in (
        (shifted((16, 20), 0, 0, 0, True), shifted((16, 20), 0, 0, 0, True)),
        (shifted((16, 20), 4, 1, 7), shifted((16, 20), 4, 7, 1)),
        (shifted((16, 20), 4, 1, 7, True), shifted((16, 20), 4, 7, 7, True)),
    ):
        there = change.motion.points(points)
        assert not torch.equal(there, points)
        assert torch.equal(inverse.motion.points(there), points)


def test_only_a_mirror_says_that_it_mirrors():
    assert shifted((5, 5), 1, 0, 0, True).motion.mirrored.all()
    assert not shifted((5, 5), 1, 0, 0).motion.mirrored.any()
    assert not operation("rotate", 1, (5, 5)).motion.mirrored.any()
    assert not ResizedPart.drawn(draws(4), (5, 5), 0.5).motion.mirrored.any()


def test_recolouring_and_erasing_move_nothing():
    assert Recoloured.drawn(draws(2), 0.5).motion is None
    assert Erased.drawn(draws(2), (8, 8), 1.0).motion is None


def enlarged(images: torch.Tensor, scale: int) -> torch.Tensor:
    """Each pixel as a square of `scale` x `scale`."""
    return images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize(
    "change",
    [
        Shifted.drawn(draws(20), (9, 7), 3, True),
        Recoloured.drawn(draws(20), 0.7),
        Erased.drawn(draws(20), (9, 7), 0.7),
        operation("translate_x", 1, (9, 7), count=20),
        operation("translate_y", 0, (9, 7), 17.0, count=20),
    ],
    ids=["crop and flip", "color", "erase", "right", "up"],
)
def test_an_enlarged_step_of_an_enlarged_image_is_the_enlarged_image_of_the_step(change, scale):
    images = torch.randint(1, 256, (20, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    shown = change.picture(images)
    assert not torch.equal(shown, images)
    assert torch.equal(change.enlarged(scale).picture(enlarged(images, scale)), enlarged(shown, scale))


def test_steps_enlarged_twice_are_enlarged_by_the_product():
    images = torch.randint(0, 256, (20, 1, 36, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    moves = Operation((9, 7), torch.arange(20) % len(OPERATIONS), torch.arange(20) % 2, 20.0)
    for change in (Shifted.drawn(draws(20), (9, 7), 3, True), ResizedPart.drawn(draws(20), (9, 7), 0.2), moves):
        assert torch.equal(change.enlarged(2).enlarged(2).picture(images), change.enlarged(4).picture(images))
