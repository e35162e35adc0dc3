"""Encoded pictures and label files in memory, as a `Store` gives them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


class Contents:
    """Files by row. reads: which rows were asked for, in their order."""

    def __init__(self, files: Sequence[bytes], turned: int = 0) -> None:
        self.files, self.turned = files, turned
        self.reads: list[int] = []

    def read(self, row: int) -> bytes:
        self.reads.append(row)
        return self.files[row]

    def name(self, row: int) -> str:
        return f"file {row}"

    def sha256(self) -> str:
        return hashlib.sha256(b"|".join(self.files)).hexdigest()


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """A PNG of these pixels; mode: another mode that they are converted to."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def palette_png(indices: np.ndarray) -> bytes:
    """A PNG of palette indices, in whose palette index k has a colour that is not k."""
    image = Image.fromarray(indices, "P")
    image.putpalette([value for index in range(256) for value in ((index * 37 + 5) % 256, (index * 11) % 256, 255 - index)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
