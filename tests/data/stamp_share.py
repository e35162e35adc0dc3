"""A small stand-in for the packages that `stamps` reads, in the layout of /usr/share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from kdbench.data.stamp_files import GROUNDS, STAMPS


def disc(colour: tuple[int, int, int], width: int = 60, height: int = 40) -> Image.Image:
    """An ellipse of one colour that fills its picture, opaque inside and transparent outside."""
    y, x = np.mgrid[:height, :width]
    inside = ((x + 0.5) / width * 2 - 1) ** 2 + ((y + 0.5) / height * 2 - 1) ** 2 <= 1
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = 255 * inside
    return Image.fromarray(pixels)


def write_share(folder: Path, colours: Mapping[str, tuple[int, int, int]]) -> None:
    """Five objects of each category, in its colour, three symbols, and twelve photographs."""
    stamps, grounds = folder / STAMPS, folder / GROUNDS
    for category, colour in colours.items():
        for number in range(5):
            file = stamps / category / ("wild" if number % 2 else "tame") / f"{category}-{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            disc(colour, 60 + 4 * number).save(file)
            file.with_suffix(".txt").write_text(f"A {category} number {number}.\nfr.utf8=Autre chose.\n")
    (stamps / "symbols").mkdir()
    for letter in "abc":
        disc((0, 0, 0)).save(stamps / "symbols" / f"{letter}.png")
    grounds.mkdir(parents=True)
    for number in range(12):
        Image.fromarray(np.full((90, 120, 3), 20 * number, np.uint8)).save(grounds / f"{number:02}.jpg", quality=95)
