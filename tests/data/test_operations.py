import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as transforms

from kdbench.data import operations
from kdbench.data.draws import Draws
from kdbench.data.operations import LEVELS, MOVES, NEIGHBOURS, OPERATIONS, Operation

IGNORED = 255
LARGEST = operations.LARGEST_MAGNITUDE


class Chosen:
    """Draws that come out as the test wants them: `name` with `sign` (0: minus, 1: plus) for every sample and round."""

    def __init__(self, name: str, sign: int, count: int) -> None:
        self.wanted = {operations.Decision.OPERATION: OPERATIONS.index(name), operations.Decision.SIGN: sign}
        self.count = count

    def bits(self, decision, rounds):
        return torch.full((self.count, rounds), 2 * self.wanted[decision])  # `below` drops the lowest bit


def photos(count: int = 6, channels: int = 3, height: int = 20, width: int = 17, low: int = 20, high: int = 230) -> torch.Tensor:
    """Blurred noise without the darkest and brightest values."""
    random = torch.Generator().manual_seed(count)
    noise = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=random)
    smooth = transforms.gaussian_blur(noise, [5, 5], [1.5, 1.5]).float()
    return ((smooth - smooth.amin()) / (smooth.amax() - smooth.amin()) * (high - low) + low).byte()


def operate(images: torch.Tensor, target: torch.Tensor | None, draws, count: int, magnitude: float):
    """`count` operations on images and, where there are any, on labels per pixel [B, H, W]."""
    for operation in Operation.drawn(draws, images.shape[-2:], count, magnitude):
        images = operation.picture(images)
        target = target if target is None else operation.moved(target[:, None], IGNORED)[:, 0]
    return images, target


def apply(name: str, images: torch.Tensor, magnitude: float = LARGEST, sign: int = 1, target: torch.Tensor | None = None):
    return operate(images, target, Chosen(name, sign, len(images)), 1, magnitude)


# What another implementation gives, at the largest magnitude. Factors are whole 256ths in ours: 230 / 256 for 0.9.
FACTOR = {0: 1 - 230 / 256, 1: 1 + 230 / 256}
EQUAL = {
    "identity": lambda x, sign: x,
    "posterize": lambda x, sign: transforms.posterize(x, 4),
    "solarize": lambda x, sign: transforms.solarize(x, 0),
    "equalize": lambda x, sign: transforms.equalize(x),
}
NEAR = {
    "autocontrast": lambda x, sign: transforms.autocontrast(x),
    "brightness": lambda x, sign: transforms.adjust_brightness(x, FACTOR[sign]),
    "contrast": lambda x, sign: transforms.adjust_contrast(x, FACTOR[sign]),
    "color": lambda x, sign: transforms.adjust_saturation(x, FACTOR[sign]),
    "sharpness": lambda x, sign: transforms.adjust_sharpness(x, FACTOR[sign]),
}


def test_every_operation_that_is_no_move_is_compared_with_another_implementation():
    assert {*EQUAL, *NEAR} == {"identity", *LEVELS, *NEIGHBOURS}


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", EQUAL)
def test_whole_number_operations_are_torchvisions(name, channels, sign):
    images = photos(channels=channels)
    assert torch.equal(apply(name, images, sign=sign)[0], EQUAL[name](images, sign))


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NEAR)
def test_operations_that_round_are_torchvisions_to_two_levels(name, channels, sign):
    images = photos(channels=channels)
    ours, theirs = apply(name, images, sign=sign)[0].int(), NEAR[name](images, sign).int()
    assert (ours - theirs).abs().max() <= 2
    if name != "color" or channels > 1:
        assert (ours - images.int()).abs().max() > 5


def test_moves_go_as_far_as_the_paper_says():
    images = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    images[0, 0, 16, 16], images[0, 0, 6, 16], images[0, 0, 16, 26] = 100, 150, 200  # centre, ten above it, ten to its right

    def place(seen: torch.Tensor, value: int) -> list[int]:
        places = (seen[0, 0] == value).nonzero()
        return places.double().mean(0).round().int().tolist()

    for sign, direction in ((0, -1), (1, 1)):
        moved = {name: apply(name, images, sign=sign)[0] for name in MOVES}
        assert place(moved["translate_x"], 100) == [16, 16 - direction * 15]  # 150 / 331 of 33
        assert place(moved["translate_y"], 100) == [16 - direction * 15, 16]
        assert all(place(moved[name], 100) == [16, 16] for name in ("shear_x", "shear_y", "rotate"))
        assert place(moved["shear_x"], 150) == [6, 16 + direction * 3]  # 0.3 of 10
        assert place(moved["shear_y"], 200) == [16 - direction * 3, 26]
        assert place(moved["rotate"], 200) == [16 + direction * 5, 16 + 9]  # 30 degrees


@settings(deadline=None)
@given(st.sampled_from(OPERATIONS), st.floats(0, LARGEST), st.integers(0, 1), st.integers(1, 9), st.integers(1, 9))
def test_labels_move_with_the_pixels_they_belong_to(name, magnitude, sign, height, width):
    pixels = torch.randperm(200, generator=torch.Generator().manual_seed(0))[: height * width] + 1
    labels = pixels.view(1, height, width).repeat(3, 1, 1)
    images = labels[:, None].to(torch.uint8)
    seen, moved = apply(name, images, magnitude, sign, labels)
    if name in MOVES:
        assert torch.equal(seen[:, 0].long(), moved.where(moved != IGNORED, 0))
    else:
        assert torch.equal(moved, labels)


def test_half_the_magnitude_goes_half_as_far():
    images = photos(low=0, high=255)
    half = LARGEST / 2
    assert torch.equal(apply("posterize", images, half)[0], transforms.posterize(images, 6))
    assert torch.equal(apply("solarize", images, half)[0], transforms.solarize(images, 128))
    brighter = transforms.adjust_brightness(images, 1 + 115 / 256)
    assert (apply("brightness", images, half)[0].int() - brighter.int()).abs().max() <= 1
    shifted = apply("translate_x", images, half)[0]
    assert torch.equal(shifted[..., :-4], images[..., 4:])  # 150 / 331 of 17, halved


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize", "identity"}))
def test_at_magnitude_zero_nothing_happens(name):
    images = photos(low=0, high=255)
    assert torch.equal(apply(name, images, 0.0)[0], images)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"identity"}))
def test_an_operation_changes_the_image(name):
    images = photos()
    assert (apply(name, images)[0] != images).flatten(1).any(1).all()


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast", "color", "sharpness"])
def test_an_image_of_one_colour_stays_as_it_is(name, value):
    images = torch.full((2, 3, 8, 8), value, dtype=torch.uint8)
    assert torch.equal(apply(name, images)[0], images)


def test_every_operation_is_drawn_about_equally_often_and_rounds_are_independent():
    draws = Draws(1, torch.arange(13_000), 0)
    kinds = operations.below(draws.bits(operations.Decision.OPERATION, 2), len(OPERATIONS))
    for column in kinds.unbind(1):
        counts = torch.bincount(column, minlength=len(OPERATIONS))
        assert (counts - 13_000 / len(OPERATIONS)).abs().max() < 150
    assert abs((kinds[:, 0] == kinds[:, 1]).double().mean() - 1 / len(OPERATIONS)) < 0.01


def test_leaving_out_samples_of_another_kind_only_saves_time(monkeypatch):
    images = photos(60)
    labels = images[:, 0].long()
    draws = Draws(0, torch.arange(60), 3)
    some = operate(images, labels, draws, 3, 21.0)
    monkeypatch.setattr(operations, "_rows", lambda kind, names: None)
    everything = operate(images, labels, draws, 3, 21.0)
    assert all(torch.equal(a, b) for a, b in zip(some, everything, strict=True))
