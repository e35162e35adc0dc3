from __future__ import annotations

import hashlib

import pytest
import torch

from kdbench.data import noise as module
from kdbench.data.batch import Part
from kdbench.data.encoded import EncodedImages
from kdbench.data.kinds import Enlarged
from kdbench.data.noise import noise, noise_part
from kdbench.errors import TooMuch, UserError


def part(images: torch.Tensor | dict[str, torch.Tensor], **rest: object) -> Part:
    return Part(images, torch.zeros(4, dtype=torch.long), torch.arange(4), **rest)


PLAIN = part(torch.zeros(4, 3, 5, 7, dtype=torch.uint8))


class Unreadable:
    """A store none of whose images can be read."""

    turned = 0

    def read(self, row: int) -> bytes:
        raise AssertionError("an image was read")

    def name(self, row: int) -> str:
        raise AssertionError("an image was named")

    def sha256(self) -> str:
        raise AssertionError("images were hashed")


def test_noise_is_the_same_in_every_process() -> None:
    found = noise(7, 0, torch.tensor([3, 1_000_000]), (3, 5, 7))
    assert (found.dtype, found.shape) == (torch.uint8, (2, 3, 5, 7))
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == "0273c90e59370f42"


def test_an_image_of_noise_follows_from_seed_column_and_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.arange(100, 140)
    whole = noise(0, 0, index, (1, 6, 6))
    assert torch.equal(noise(0, 0, index[[30, 2]], (1, 6, 6)), whole[[30, 2]])
    monkeypatch.setattr(module, "_HASHES_AT_ONCE", 7)  # less than two images
    assert torch.equal(noise(0, 0, index, (1, 6, 6)), whole)
    for other in (noise(1, 0, index, (1, 6, 6)), noise(0, 1, index, (1, 6, 6)), noise(0, 0, index + 1000, (1, 6, 6))):
        assert (other == whole).float().mean() < 0.02  # one byte in 256 by chance


def test_every_byte_of_noise_is_as_likely() -> None:
    counts = noise(0, 0, torch.arange(400), (1, 16, 16)).flatten().long().bincount(minlength=256).double()
    assert ((counts - 400).square() / 400).sum() < 350  # chi square of 255 degrees of freedom: one in 30,000 is above


def test_noise_without_labels_stands_behind_all_samples_in_the_shape_of_the_images() -> None:
    found = noise_part(PLAIN, 6, 0, first=90, name="toys")
    assert found.target is None
    assert found.without_label == len(found) == 6
    assert found.index.tolist() == list(range(90, 96))
    assert found.pixels.shape == (6, 3, 5, 7)
    assert torch.equal(found.pixels, noise(0, 0, found.index, (3, 5, 7)))


def test_no_image_of_the_data_gets_into_noise() -> None:
    of_black = noise_part(PLAIN, 6, 0, 90, "toys")
    of_white = noise_part(part(torch.full((4, 3, 5, 7), 255, dtype=torch.uint8)), 6, 0, 90, "toys")
    assert torch.equal(of_black.pixels, of_white.pixels)
    files = EncodedImages(Unreadable(), torch.arange(4), size=5, resize=6)  # type: ignore[arg-type]
    assert noise_part(Part(files, None, torch.arange(4)), 6, 0, 90, "toys").pixels.shape == (6, 3, 5, 5)


def test_several_images_of_a_sample_are_noise_of_their_own() -> None:
    black = torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    found = noise_part(part({"before": black, "after": black}), 6, 0, 90, "toys")
    assert list(found.columns) == ["before", "after"]
    assert not torch.equal(found.columns["before"], found.columns["after"])  # type: ignore[arg-type]


def test_what_is_no_image_cant_be_noise() -> None:
    words = {"image": torch.zeros(4, 3, 5, 5, dtype=torch.uint8), "tokens": torch.zeros(4, 9, dtype=torch.long)}
    with pytest.raises(
        UserError, match=r"^transfer: noise makes images, and samples of data 'toys' have the input 'tokens' of another kind; "
    ):
        noise_part(part(words), 6, 0, 90, "toys")
    pairs = {"small": torch.zeros(4, 3, 5, 5, dtype=torch.uint8), "large": torch.zeros(4, 3, 10, 10, dtype=torch.uint8)}
    with pytest.raises(UserError, match="the input 'large' of another kind"):
        noise_part(part(pairs, kinds={"large": Enlarged(2)}), 6, 0, 90, "toys")
    with pytest.raises(UserError, match=r"have inputs of another kind; use transfer: train$"):
        noise_part(part(torch.zeros(4, 9, dtype=torch.long)), 6, 0, 90, "toys")


def test_noise_that_takes_too_much_memory_is_refused() -> None:
    most = int(32e9 / 105)
    with pytest.raises(
        TooMuch, match=rf"^transfer: noise: {2 * most} images of data 'toys' take 64.0 GB of memory; set transfer_size to at most {most}$"
    ):
        noise_part(PLAIN, 2 * most, 0, 90, "toys")
