"""What a view does to each kind of column, on generated scenes whose boxes and masks are known exactly."""

import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdbench.data.changes import Change, Shifted
from kdbench.data.draws import Draws
from kdbench.data.kinds import Boxes, Enlarged, Image, Kind, Labels, Pixels, Plain, Points, Sided, has_box, kind_of
from kdbench.data.operations import LARGEST_MAGNITUDE, MOVES, OPERATIONS, Operation
from kdbench.data.resizing import ResizedPart
from kdbench.data.scenes import Scene, draw
from kdbench.data.views import IGNORED, Augment, View, view_of
from kdbench.errors import UserError
from tests.data.test_views import SPECS as STEPS
from tests.data.viewing import augment_drawn

SIDE, SCENES = 32, 300
NORMALS = Pixels(mirror=(-1.0, 1.0, 1.0))


@cache
def scenes() -> tuple[Scene, ...]:
    return tuple(draw(11, index, SIDE) for index in range(SCENES))


@cache
def boxes() -> Tensor:
    """Of the frontmost object, which no other one hides: float32 [300, 1, 4]."""
    return torch.tensor([[scene.objects[-1].box] for scene in scenes()], dtype=torch.float32)


@cache
def masks() -> Tensor:
    """Which pixels the object covers: uint8 [300, 32, 32] of 0 and 1."""
    return torch.from_numpy(np.stack([scene.objects[-1].mask for scene in scenes()])).to(torch.uint8)


@cache
def filled() -> Tensor:
    """Which pixels the object's box covers, as `masks`."""
    x0, y0, x1, y1 = boxes()[:, 0, :, None, None].unbind(1)
    places = torch.arange(SIDE)
    return ((places >= x0) & (places < x1) & (places[:, None] >= y0) & (places[:, None] < y1)).to(torch.uint8)


def around(mask: Tensor) -> Tensor:
    """The boxes around masks [B, H, W], float32 [B, 4]; zeros for an empty mask."""
    found = torch.zeros(len(mask), 4)
    for row, one in enumerate(mask):
        down, across = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        if len(down):
            found[row] = torch.stack([across[0], down[0], across[-1] + 1, down[-1] + 1])
    return found


def a_view(steps: Augment, view: int = 0, count: int = SCENES, size: tuple[int, int] = (SIDE, SIDE)) -> View:
    return view_of(Draws(5, torch.arange(count) * 7, view), steps, size)


def made_of(*changes: Change, count: int = 1) -> View:
    """A view of these steps."""
    return View(Draws(0, torch.arange(count), 0), Augment(), (SIDE, SIDE), changes)


def one_operation(name: str, sign: int, magnitude: float = LARGEST_MAGNITUDE) -> View:
    kind = torch.full((SCENES,), OPERATIONS.index(name))
    return made_of(Operation((SIDE, SIDE), kind, torch.full((SCENES,), sign), magnitude), count=SCENES)


def shifted(padding: int, down: int, across: int, mirrored: bool = False, size: tuple[int, int] = (SIDE, SIDE)) -> Shifted:
    return Shifted(size, padding, torch.tensor([down]), torch.tensor([across]), torch.tensor([mirrored]))


def shown(view: View, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The box around the moved mask and the moved box, of which every remainder counts: [300, 4] each."""
    return around(Labels().seen(mask, view) == 1), Boxes(visible=0.0).seen(boxes(), view)[:, 0]


# --- boxes and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("keys", [{"flip": True}, {"crop": 9}, {"crop": 9, "flip": True}], ids=str)
def test_the_box_of_a_cropped_and_mirrored_mask_is_exactly_the_moved_box(keys, view):
    seen = a_view(Augment(**keys), view)
    of_mask, moved = shown(seen, filled())
    assert torch.equal(of_mask, moved)
    assert not torch.equal(moved, boxes()[:, 0])
    # A shape that is cut may reach less far than its box; one that is not cut reaches as far.
    of_mask, _ = shown(seen, masks())
    uncut = (seen.motions[0].boxes(boxes()) == moved[:, None]).all(-1)[:, 0]
    assert torch.equal(of_mask[uncut], moved[uncut])
    assert uncut.sum() > 60


def assert_within_half_a_pixel(of_mask: Tensor, moved: Tensor) -> None:
    """A pixel shows the mask where its middle does, so its edge is up to half a pixel from the box's; slack for float32."""
    shows = has_box(of_mask)
    assert shows.sum() > 200
    assert (of_mask - moved)[shows].abs().max() <= 0.5 + 1e-4
    thinnest = (moved[:, 2:] - moved[:, :2]).amin(1)
    assert (thinnest[~shows] <= 1 + 1e-4).all()  # no pixel's middle lies in such a box


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("keys", [{"resized_crop": 0.3}, {"resized_crop": 0.3, "crop": 6, "flip": True}], ids=str)
def test_the_box_of_a_resized_mask_is_the_moved_box_within_half_a_pixel(keys, view):
    seen = a_view(Augment(**keys), view)
    of_mask, moved = shown(seen, filled())
    assert_within_half_a_pixel(of_mask, moved)
    of_mask, _ = shown(seen, masks())
    assert_inside(of_mask, moved)


def assert_inside(of_mask: Tensor, moved: Tensor, beyond_by: Tensor | float = 0.5) -> None:
    """No edge of the mask's boxes lies further outside the moved ones than `beyond_by` pixels; slack for float32."""
    shows = has_box(of_mask)
    beyond = torch.cat([moved[:, :2] - of_mask[:, :2], of_mask[:, 2:] - moved[:, 2:]], dim=1)[shows]
    assert (beyond.amax(1) <= torch.as_tensor(beyond_by).expand(len(shows))[shows] + 1e-4).all()


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("magnitude", [9.0, 30.0])
@pytest.mark.parametrize("name", MOVES)
def test_the_box_of_a_turned_or_sheared_mask_is_the_moved_box_within_a_pixel(name, magnitude, sign):
    seen = one_operation(name, sign, magnitude)
    of_mask, moved = shown(seen, filled())
    # At a distance d from an outermost corner a box that is turned by 30 degrees is d (tan 30 + tan 60) = 2.3 d wide, and one that is
    # sheared by 0.3 is d / 0.3 wide. Where it is a pixel wide, at d <= 0.44, a row of pixels' middles can't miss it, and the next row is at
    # most a pixel away. From there to the pixel's edge it is half a pixel: 0.44 + 1 - 0.5 < 1.
    whole = (seen.motions[0].boxes(boxes()) == moved[:, None]).all(-1)[:, 0]
    assert whole.sum() > 20
    assert (of_mask - moved)[whole].abs().max() <= 1
    assert_inside(of_mask, moved)
    assert_inside(shown(seen, masks())[0], moved)


@pytest.mark.parametrize("view", range(3))
def test_several_operations_leave_no_part_of_a_mask_outside_its_box(view):
    seen = a_view(Augment(resized_crop=0.5, crop=4, flip=True, operations=3, magnitude=20.0), view)
    beyond_by = torch.zeros(SCENES)
    for motion in seen.motions:  # each step adds half a pixel, and moves what the steps before it have added
        beyond_by = motion.linear.abs().sum(2).amax(1) * beyond_by + 0.5
    assert_inside(*shown(seen, masks()), beyond_by)


def test_erasing_and_recolouring_leave_boxes_and_points_as_they_are():
    view = a_view(Augment(erase=1.0, color=1.0))
    points = torch.rand(SCENES, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Boxes(visible=1.0).seen(boxes(), view), boxes())
    assert torch.equal(Points(pairs=((0, 1),)).seen(points, view), points)


# --- boxes alone -----------------------------------------------------------------------------------------------------


def test_a_box_is_cut_at_the_edge_of_each_step():
    right_half = ResizedPart((SIDE, SIDE), torch.tensor([[0, 16, 32, 16]]))
    to_the_right = shifted(8, down=8, across=0)
    box = torch.tensor([[[12.0, 4.0, 20.0, 8.0]]])
    # The part's left edge cuts off 12 .. 16, the rest is twice as wide and then moves by 8: what was cut off does not come back.
    assert Boxes().seen(box, made_of(right_half)).tolist() == [[[0.0, 4.0, 8.0, 8.0]]]
    assert Boxes().seen(box, made_of(right_half, to_the_right)).tolist() == [[[8.0, 4.0, 16.0, 8.0]]]
    lost = torch.tensor([[[2.0, 4.0, 15.0, 8.0]]])
    assert Boxes(visible=0.0).seen(lost, made_of(right_half, to_the_right)).tolist() == [[[0.0] * 4]]


def test_a_box_is_kept_while_as_much_of_its_area_is_left_as_was_asked_for():
    right_half = ResizedPart((SIDE, SIDE), torch.tensor([[0, 16, 32, 16]]))
    half_again = ResizedPart((SIDE, SIDE), torch.tensor([[6, 0, 8, 32]]))  # rows 6 .. 14
    box = torch.tensor([[[12.0, 4.0, 20.0, 8.0]]])
    for changes, left in (((right_half,), 0.5), ((right_half, half_again), 0.25)):
        assert has_box(Boxes(visible=left).seen(box, made_of(*changes))).all()
        assert not Boxes(visible=left + 1e-6).seen(box, made_of(*changes)).any()


def test_a_whole_box_is_kept_when_all_of_it_must_be_left():
    view = a_view(Augment(crop=4, flip=True))
    moved = view.motions[0].boxes(boxes())
    whole = (moved == view.motions[0].cut(moved)).all(-1)
    assert torch.equal(has_box(Boxes(visible=1.0).seen(boxes(), view)), whole)
    assert 50 < whole.sum() < SCENES - 50


def test_rows_without_a_box_stay_without_and_the_others_keep_their_places():
    rows = torch.zeros(SCENES, 5, 4)
    rows[:, 1:2] = boxes()
    rows[:, 2] = -1
    rows[:, 3] = torch.tensor([20.0, 20.0, 10.0, 10.0])  # right and left, below and above confused
    rows[:, 4] = torch.tensor([16.0, 10.0, 16.0, 20.0])  # a line, which covers an upright box when it is turned
    view = a_view(Augment(crop=3, flip=True, operations=2))
    seen = Boxes(visible=0.0).seen(rows, view)
    assert not seen[:, [0, 2, 3, 4]].any()
    assert torch.equal(seen[:, 1:2], Boxes(visible=0.0).seen(boxes(), view))


def test_a_row_holds_a_box_if_it_has_an_area():
    rows = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2], [2, 1, 1, 2], [1, 2, 2, 1], [1, 1, 1, 5], [1, 1, 5, 1], [-1, -1, -1, -1]])
    assert has_box(rows).tolist() == [False, True, False, False, False, False, False]


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"crop": 9, "flip": True}, {"resized_crop": 0.3}, {"operations": 3, "magnitude": 20.0}], ids=str)
def test_a_point_moves_with_the_pixel_that_it_lies_in(keys):
    random = torch.Generator().manual_seed(0)
    columns, rows = (torch.randint(0, SIDE, (SCENES,), generator=random) for _ in range(2))
    view = a_view(Augment(**keys))
    pixel = torch.zeros(SCENES, SIDE, SIDE, dtype=torch.long)
    pixel[torch.arange(SCENES), rows, columns] = 1
    points = torch.stack([columns + 0.5, rows + 0.5, torch.ones(SCENES)], dim=1)[:, None]
    seen, moved = Points().seen(points, view)[:, 0], Labels().seen(pixel, view) == 1
    found = moved.any((1, 2)).nonzero().flatten()
    assert len(found) > 50
    # The point lies in the middle of its pixel, and what a pixel shows comes from anywhere in that one: half a pixel apart at most,
    # which a step may stretch. Each step adds as much to what is there already.
    apart = torch.zeros(SCENES)
    for motion in view.motions:
        apart = motion.linear.abs().sum(2).amax(1) * (apart + 0.5)
    for sample in found.tolist():
        middles = moved[sample].nonzero().flip(1) + 0.5
        assert (middles - seen[sample, :2]).abs().amax() <= apart[sample] + 1e-4
    if "crop" in keys:
        assert torch.equal(seen[:, 2] == 1, moved.any((1, 2)))
        exact = torch.stack([moved.any(1).int().argmax(1), moved.any(2).int().argmax(1)], dim=1) + 0.5
        assert torch.equal(seen[found, :2], exact[found])


def test_left_and_right_change_places_in_a_mirror_image_only():
    hands = torch.tensor([[[4.0, 10.0, 1.0], [20.0, 12.0, 0.0], [16.0, 3.0, 1.0]]])
    kind = Points(pairs=((0, 1),))
    assert kind.seen(hands, made_of(shifted(0, 0, 0, True))).tolist() == [[[12.0, 12.0, 0.0], [28.0, 10.0, 1.0], [16.0, 3.0, 1.0]]]
    assert torch.equal(kind.seen(hands, made_of(shifted(0, 0, 0))), hands)
    assert Points().seen(hands, made_of(shifted(0, 0, 0, True))).tolist() == [[[28.0, 10.0, 1.0], [12.0, 12.0, 0.0], [16.0, 3.0, 1.0]]]
    twice = made_of(shifted(0, 0, 0, True), shifted(0, 0, 0, True))
    assert torch.equal(kind.seen(hands, twice), hands)


def test_a_point_outside_can_not_be_seen_nor_after_it_has_come_back():
    points = torch.tensor([[[3.0, 5.0, 2.0], [30.0, 5.0, 2.0], [30.0, 5.0, 0.0]]])
    left, right = shifted(8, 8, 16), shifted(8, 8, 0)
    assert Points().seen(points, made_of(left)).tolist() == [[[-5.0, 5.0, 0.0], [22.0, 5.0, 2.0], [22.0, 5.0, 0.0]]]
    assert Points().seen(points, made_of(left, right))[..., 2].tolist() == [[0.0, 2.0, 0.0]]
    for edge, seen in (
        ([0.0, 0.0], 1.0),
        ([32.0, 32.0], 1.0),
        ([32.1, 3.0], 0.0),
        ([3.0, 32.1], 0.0),
        ([-0.1, 3.0], 0.0),
        ([3.0, -0.1], 0.0),
    ):
        assert Points().seen(torch.tensor([[[*edge, 1.0]]]), made_of(shifted(0, 0, 0)))[0, 0, 2] == seen


# --- pixels ----------------------------------------------------------------------------------------------------------


def pictures(count: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@settings(deadline=None, max_examples=30)
@given(STEPS, st.integers(0, 3))
def test_images_and_labels_are_seen_as_by_augment_drawn(steps, number):
    images, labels = pictures(12, 3, 9, 7), pictures(12, 9, 7) % 6
    view = a_view(steps, number, 12, (9, 7))
    inputs, target = augment_drawn(images, labels, view.draws, steps)
    assert torch.equal(Image().seen(images, view), inputs)
    seen = Labels().seen(labels, view)
    assert seen.dtype == torch.int64
    assert torch.equal(seen, target)


@settings(deadline=None, max_examples=30)
@given(STEPS)
def test_each_picture_and_label_map_of_a_scene_is_seen_as_it_is_alone(steps):
    view = a_view(steps, count=6, size=(9, 7))
    films, labels = pictures(6, 4, 3, 9, 7), pictures(6, 4, 9, 7) % 6
    seen, moved = Image().seen(films, view), Labels().seen(labels, view)
    assert seen.shape == films.shape
    for time in range(4):
        assert torch.equal(seen[:, time], Image().seen(films[:, time], view))
        assert torch.equal(moved[:, time], Labels().seen(labels[:, time], view))


def doubled(images: Tensor) -> Tensor:
    return images.repeat_interleave(2, -1).repeat_interleave(2, -2)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 4), st.booleans(), st.floats(0, 1), st.floats(0, 1))
def test_an_enlarged_picture_is_seen_as_the_small_one_enlarged(crop, flip, color, erase):
    view = a_view(Augment(crop=crop, flip=flip, color=color, erase=erase), count=8, size=(9, 7))
    images, films = pictures(8, 3, 9, 7), pictures(8, 2, 3, 9, 7)
    assert torch.equal(Enlarged(2).seen(doubled(images), view), doubled(Image().seen(images, view)))
    assert torch.equal(Enlarged(2).seen(doubled(films), view), doubled(Image().seen(films, view)))
    assert torch.equal(Enlarged(1).seen(images, view), Image().seen(images, view))
    assert torch.equal(Enlarged(2).seen(doubled(doubled(films)), view.enlarged(2)), Enlarged(4).seen(doubled(doubled(films)), view))


def test_an_enlarged_part_shows_the_same_part():
    """A ramp keeps its values, whatever its size, where a bilinear sample lies between two pixels of the part."""
    view = a_view(Augment(resized_crop=0.3), count=40, size=(24, 24))
    small = (torch.arange(24) * 10.0 + 5).expand(40, 1, 24, 24)  # 10 a pixel; 5 in the middle of the first one
    large = (torch.arange(48) * 5.0 + 2.5).expand(40, 1, 48, 48)
    one = Image().seen(small.byte(), view) * 255
    two = Enlarged(2).seen(large.floor().byte(), view) * 255
    inner = (two[..., 0::2] + two[..., 1::2])[..., 0::2, 2:-2] / 2
    # Rounded down by up to one level in `large`, by up to two halves when both are sampled.
    assert (inner - one[..., 2:-2]).abs().max() <= 2


def test_directions_turn_round_in_a_mirror_and_angles_are_counted_from_the_other_side():
    normals = torch.randn(40, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    view = a_view(Augment(flip=True), count=40, size=(9, 7))
    mirrored = view.mirrored
    assert 10 < mirrored.sum() < 30
    seen = NORMALS.seen(normals, view)
    assert torch.equal(seen[~mirrored], normals[~mirrored])
    assert torch.equal(seen[mirrored], normals[mirrored].flip(3) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None])
    angles = Pixels(mirror=(-1.0,), mirror_offset=(math.pi,)).seen(normals[:, :1], view)
    assert torch.equal(angles[mirrored], math.pi - normals[mirrored, :1].flip(3))
    assert torch.equal(Pixels().seen(normals, view)[mirrored], normals[mirrored].flip(3))


@settings(deadline=None, max_examples=30)
@given(STEPS, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_numbers_per_pixel_move_as_labels_do_and_are_not_recoloured(steps, dtype):
    labels = pictures(12, 9, 7) % 200
    view = a_view(steps, count=12, size=(9, 7))
    seen = Pixels(outside=-7.0).seen(torch.stack([labels, labels + 1], dim=1).to(dtype), view)
    moved = Labels().seen(labels, view)
    assert seen.dtype == dtype
    for channel in (0, 1):
        assert torch.equal(seen[:, channel].double(), (moved + channel).double().where(moved != IGNORED, -7.0))


def test_what_comes_from_outside_is_not_changed_by_a_mirror():
    ones = torch.ones(40, 1, 5, 5)
    seen = Pixels(mirror=(-1.0,), mirror_offset=(3.0,), outside=9.0).seen(ones, a_view(Augment(crop=2, flip=True), count=40, size=(5, 5)))
    assert set(seen.unique().tolist()) == {1.0, 2.0, 9.0}
    assert set(Pixels().seen(ones, a_view(Augment(crop=2), count=40, size=(5, 5))).unique().tolist()) == {0.0, 1.0}


# --- every kind ------------------------------------------------------------------------------------------------------


def columns(count: int) -> list[tuple[Kind, Tensor]]:
    random = torch.Generator().manual_seed(3)
    corners = torch.rand(count, 5, 2, 2, generator=random) * torch.tensor([7.0, 9.0])
    some_boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    return [
        (Image(), pictures(count, 3, 9, 7)),
        (Image(), pictures(count, 2, 3, 9, 7)),
        (Labels(), pictures(count, 9, 7)),
        (Labels(), pictures(count, 2, 9, 7)),
        (NORMALS, torch.randn(count, 3, 9, 7, generator=random)),
        (Enlarged(2), pictures(count, 1, 18, 14)),
        (Boxes(0.3), some_boxes),
        (Points(((0, 3),)), torch.rand(count, 5, 3, generator=random) * 9),
        (Plain(), torch.randn(count, 4, generator=random)),
    ]


@settings(deadline=None, max_examples=40)
@given(STEPS, st.integers(0, 5), st.integers(0, 2**40), st.permutations(range(7)), st.integers(1, 7))
def test_a_sample_has_the_same_bits_in_every_batch_and_order(steps, number, seed, order, kept):
    rows = torch.tensor(order[:kept])
    draws = Draws(seed, torch.arange(7) * 3, number)
    everything, some = view_of(draws, steps, (9, 7)), view_of(draws.at(rows), steps, (9, 7))
    for kind, values in columns(7):
        assert torch.equal(kind.seen(values[rows], some), kind.seen(values, everything)[rows]), kind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits():
    steps = Augment(resized_crop=0.3, crop=3, flip=True, operations=3, magnitude=20.0, color=0.5, erase=0.5)
    here, there = (view_of(Draws(3, torch.arange(60, device=name), 1), steps, (9, 7)) for name in ("cpu", "cuda"))
    for kind, values in columns(60):
        assert torch.equal(kind.seen(values.cuda(), there).cpu(), kind.seen(values, here)), kind


@settings(deadline=None, max_examples=20)
@given(STEPS)
def test_columns_keep_their_shapes_and_are_not_changed_in_place(steps):
    view = a_view(steps, count=7, size=(9, 7))
    for kind, values in columns(7):
        before = values.clone()
        assert kind.seen(values, view).shape == values.shape
        assert torch.equal(values, before)
        assert kind.problem(values) is None


def test_without_steps_every_column_is_as_it_was():
    view = a_view(Augment(), count=7, size=(9, 7))
    for kind, values in columns(7):
        seen = kind.seen(values, view)
        assert torch.equal((seen * 255).round() if isinstance(kind, (Image, Enlarged)) else seen, values.to(seen.dtype))


@pytest.mark.parametrize(
    ("kind", "steps", "said"),
    [
        (Labels(), {"mixup": 0.2}, r"recipe\.augment\.mixup .* one label per image; a label per pixel can't be mixed"),
        (Pixels(), {"cutmix": 1.0}, r"recipe\.augment\.cutmix .* a picture of numbers can't be mixed"),
        (Enlarged(2), {"cutmix": 1.0}, r"recipe\.augment\.cutmix .* an enlarged picture can't be mixed"),
        (Boxes(), {"mixup": 0.2, "cutmix": 1.0}, r"recipe\.augment\.mixup .* a set of boxes can't be mixed"),
        (Points(), {"mixup": 0.2}, r"recipe\.augment\.mixup .* a set of points can't be mixed"),
        (Enlarged(2), {"operations": 1}, r"recipe\.augment\.operations recolours .* leave it out"),
        (NORMALS, {"operations": 1}, r"recipe\.augment\.operations turns or stretches .* leave it out"),
        (NORMALS, {"resized_crop": 0.5}, r"recipe\.augment\.resized_crop turns or stretches .* leave it out"),
    ],
)
def test_a_column_that_can_not_follow_a_step_says_so_in_one_line(kind, steps, said):
    refusal = kind.refuses(Augment(**steps))
    assert refusal is not None
    assert "\n" not in refusal
    assert re.fullmatch(said, refusal)


def test_columns_follow_all_other_steps():
    every = {"resized_crop": 0.5, "crop": 2, "flip": True, "operations": 2, "color": 0.5, "erase": 0.5}
    following = {Image(): {*every, "mixup", "cutmix"}, Plain(): {*every, "mixup", "cutmix"}, Labels(): {*every}, Pixels(): {*every}}
    following |= {Boxes(): {*every}, Points(): {*every}, Enlarged(2): {*every} - {"operations"}}
    following[NORMALS] = {*every} - {"operations", "resized_crop"}
    for kind, keys in following.items():
        alone = [Augment(**{key: every.get(key, 1.0)}) for key in [*every, "mixup", "cutmix"]]
        accepted = [key for key, steps in zip([*every, "mixup", "cutmix"], alone, strict=True) if kind.refuses(steps) is None]
        assert set(accepted) == keys, kind
        assert kind.refuses(Augment()) is None


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (
            Image(),
            torch.zeros(2, 3, 4, 4),
            "an image must be uint8 [N, C, H, W], or [N, T, C, H, W] for several of one scene; got float32 [2, 3, 4, 4]",
        ),
        (Image(), torch.zeros(2, 4, 4, dtype=torch.uint8), "got uint8 [2, 4, 4]"),
        (Image(), torch.zeros(2, 1, 1, 3, 4, 4, dtype=torch.uint8), "got uint8 [2, 1, 1, 3, 4, 4]"),
        (Enlarged(2), torch.zeros(2, 3, 4, 4), "an image must be uint8"),
        (Labels(), torch.zeros(2, 4, 4), "labels per pixel must be whole numbers [N, H, W] or [N, T, H, W]; got float32 [2, 4, 4]"),
        (Labels(), torch.zeros(2, 4, 4, dtype=torch.bool), "got bool [2, 4, 4]"),
        (Labels(), torch.zeros(2, 4, dtype=torch.long), "got int64 [2, 4]"),
        (Labels(), torch.zeros(2, 4, 4, 4, 4, dtype=torch.long), "got int64 [2, 4, 4, 4, 4]"),
        (Pixels(), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "numbers per pixel must be float [N, C, H, W]; got uint8 [2, 3, 4, 4]"),
        (Pixels(), torch.zeros(2, 4, 4), "got float32 [2, 4, 4]"),
        (NORMALS, torch.zeros(2, 2, 4, 4), "mirror has 3 numbers for the 2 channels of float32 [2, 2, 4, 4]"),
        (Boxes(), torch.zeros(2, 3, 5), "boxes must be float32 [N, M, 4] of x0, y0, x1, y1 in pixels; got float32 [2, 3, 5]"),
        (Boxes(), torch.zeros(2, 4), "got float32 [2, 4]"),
        (Boxes(), torch.zeros(2, 3, 4, dtype=torch.double), "got float64 [2, 3, 4]"),
        (Points(), torch.zeros(2, 3, 2), "points must be float32 [N, K, 3] of x, y and visible; got float32 [2, 3, 2]"),
        (Points(), torch.zeros(2, 3), "got float32 [2, 3]"),
        (Points(), torch.zeros(2, 3, 3, dtype=torch.long), "got int64 [2, 3, 3]"),
        (Points(((0, 3),)), torch.zeros(2, 3, 3), "pairs must name each row at most once, 0 .. 2; got ((0, 3),)"),
        (Points(((0, 1), (1, 2))), torch.zeros(2, 3, 3), "got ((0, 1), (1, 2))"),
        (Points(((-1, 0),)), torch.zeros(2, 3, 3), "got ((-1, 0),)"),
    ],
)
def test_a_column_of_another_form_says_what_was_expected(kind, values, said):
    problem = kind.problem(values)
    assert problem is not None
    assert said in problem


@pytest.mark.parametrize(
    "make", [lambda: Boxes(visible=25), lambda: Boxes(visible=-0.1), lambda: Enlarged(0), lambda: Pixels((1.0,), (1.0, 2.0))]
)
def test_a_kind_that_makes_no_sense_can_not_be_made(make):
    with pytest.raises(ValueError, match=r"Boxes\.visible|Enlarged\.scale|mirror_offset"):
        make()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), Image()),
        (torch.zeros(2, dtype=torch.long), Plain()),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), Labels()),
        (torch.zeros(2, 4, 4, dtype=torch.long), Labels()),
        (torch.zeros(2), Plain()),
        (torch.zeros(2, 5, dtype=torch.bool), Plain()),
    ],
)
def test_the_forms_that_were_there_before_kinds_have_theirs(values, kind):
    assert kind_of(values, images=True) == kind


@pytest.mark.parametrize(
    "values",
    [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int32), torch.zeros(2, 1, 3, 4, 4, dtype=torch.uint8)],
)
def test_any_other_form_must_name_its_kind(values):
    with pytest.raises(UserError, match=r"needs a kind; name one in `kinds`"):
        kind_of(values, images=True)


def test_columns_that_a_mirror_image_makes_wrong_refuse_flips_and_nothing_else():
    for kind in (Sided(), Points(mirrors=False)):
        assert "flip" in (kind.refuses(Augment(flip=True, crop=2)) or "")
        assert kind.refuses(Augment(crop=2)) is None
    assert Points().refuses(Augment(flip=True)) is None
