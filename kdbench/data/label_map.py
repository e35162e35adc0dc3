"""What the numbers or colours of a label file's pixels mean: a table from what the file holds to the classes that are learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdbench.data.views import IGNORED
from kdbench.errors import UserError

LARGEST_NUMBER = 65_535  # of a pixel
MOST_CLASSES = IGNORED  # a label is a byte, and 255 is no class
_NO_CLASS = -1

Colours = Mapping[tuple[int, int, int], int]


@dataclass(frozen=True)
class LabelMap:
    """A table from pixels of a file to labels 0 .. classes - 1, and IGNORED (255).

    name: what an error calls it. classes: their names.
    numbers: the label of each number that a pixel may hold, palette indices where the file has a palette. colours: the same of red, green
    and blue; a map has one of the two. others: the label of everything else, None where nothing else may occur.
    way_out: what an error advises where something else occurs.
    """

    name: str
    classes: tuple[str, ...]
    numbers: Mapping[int, int] = field(default_factory=dict)
    colours: Colours = field(default_factory=dict)
    others: int | None = None
    way_out: str = ""

    def __post_init__(self) -> None:
        labels = {*self.numbers.values(), *self.colours.values(), *([] if self.others is None else [self.others])}
        if stray := sorted(labels - {*range(len(self.classes)), IGNORED}):
            raise ValueError(f"label map {self.name!r} has the label {stray[0]} and {len(self.classes)} classes")
        if bool(self.numbers) == bool(self.colours):
            raise ValueError(f"label map {self.name!r} must have numbers or colours")
        if wrong := [number for number in self.numbers if not 0 <= number <= LARGEST_NUMBER]:
            raise ValueError(f"label map {self.name!r} has the number {wrong[0]}; expected 0 .. {LARGEST_NUMBER}")

    def labels(self, pixels: NDArray[Any], where: str) -> NDArray[np.uint8]:
        """The label of each pixel, uint8 [H, W].

        Args:
            pixels: uint8 or uint16 [H, W], or colours uint8 [H, W, 3].
            where: the name of the file.

        Raises:
            UserError: the file has colours and the map numbers, or the other way round, or a pixel holds what the map does not name.
        """
        if (pixels.ndim == 3) != bool(self.colours):
            there, expected = ("colours", "numbers") if pixels.ndim == 3 else ("numbers", "colours")
            raise UserError(f"{where} holds {there}, and label map {self.name!r} is of {expected}{self._advice}")
        found: NDArray[np.int16] = self._of_colours(pixels) if self.colours else self._table[pixels]
        stray = found == _NO_CLASS
        if stray.any():
            value = pixels[stray][0].tolist()
            raise UserError(f"{where} has a pixel of {'colour' if self.colours else 'value'} {value}, which {self._named}{self._advice}")
        return found.astype(np.uint8)

    @property
    def _named(self) -> str:
        return f"label map {self.name!r} of {len(self.classes)} classes does not name"

    @property
    def _advice(self) -> str:
        return f". {self.way_out}" if self.way_out else ""

    @cached_property
    def _table(self) -> NDArray[np.int16]:
        table = np.full(LARGEST_NUMBER + 1, _NO_CLASS if self.others is None else self.others, np.int16)
        table[list(self.numbers)] = list(self.numbers.values())
        return table

    def _of_colours(self, pixels: NDArray[Any]) -> NDArray[np.int16]:
        codes, labels = self._codes
        wanted = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        places = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
        others = _NO_CLASS if self.others is None else self.others
        return np.where(codes[places] == wanted, labels[places], others).astype(np.int16)

    @cached_property
    def _codes(self) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
        """Each colour as one number, rising, and its label."""
        coded = sorted(((red << 16) + (green << 8) + blue, label) for (red, green, blue), label in self.colours.items())
        codes, labels = zip(*coded, strict=True)
        return np.array(codes, np.int32), np.array(labels, np.int16)

    def sha256(self) -> str:
        """Of the table; neither its name nor those of the classes count."""
        table = [sorted(self.numbers.items()), sorted(self.colours.items()), self.others]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()
