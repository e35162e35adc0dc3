"""RandAugment (Cubuk et al., arXiv 1909.13719) on batches: a few operations a view, drawn from one list, all at one magnitude.

The operations and their ranges are those of AutoAugment (Cubuk et al., arXiv 1805.09501, table 6) that RandAugment keeps. All of them are
whole-number arithmetic on uint8 images with nearest-pixel sampling, so that a view has the same bits on every device and in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from kdbench.data.draws import Decision, Draws
from kdbench.data.hashing import below
from kdbench.data.motion import Motion
from kdbench.data.pixels import UNIT, blend, grey, histogram, mean_grey, smoothed, taken

LARGEST_MAGNITUDE = 30.0

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
LEVELS = ("brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize")
NEIGHBOURS = ("color", "sharpness")
OPERATIONS = ("identity", *MOVES, *LEVELS, *NEIGHBOURS)

# What an operation does at the largest magnitude.
_SHEAR = 0.3
_TRANSLATE = 150 / 331  # of the image's side
_ROTATE = math.radians(30)
_BLEND = 0.9  # a factor of 1 +- this
_BITS = 4  # that posterize drops

_ONE = 1 << 16  # what stands for 1 in a move's matrix


@dataclass(frozen=True)
class Operation:
    """A `changes.Change`: one operation on each picture.

    size: height and width of the pictures, `scale` times as large as those for which the magnitude of translations was drawn.
    kind, sign: int64 [B], which of `OPERATIONS`, and 0 for minus or 1 for plus. magnitude: 0 .. LARGEST_MAGNITUDE.
    """

    size: tuple[int, int]
    kind: Tensor
    sign: Tensor
    magnitude: float
    scale: int = 1

    @classmethod
    def drawn(cls, draws: Draws, size: tuple[int, int], count: int, magnitude: float) -> tuple[Operation, ...]:
        """`count` operations, to be done one after the other."""
        kinds = below(draws.bits(Decision.OPERATION, count), len(OPERATIONS))
        signs = below(draws.bits(Decision.SIGN, count), 2)
        return tuple(cls(size, kind, sign, magnitude) for kind, sign in zip(kinds.unbind(1), signs.unbind(1), strict=True))

    @property
    def motion(self) -> Motion:
        table = _motions(*self.size, self.scale, self.magnitude, self.kind.device)[self.kind, self.sign]
        return Motion(table[:, :4].unflatten(1, (2, 2)), table[:, 4:], self.size, torch.zeros_like(self.kind, dtype=torch.bool))

    def picture(self, images: Tensor) -> Tensor:
        images = self.moved(images, 0)
        for names, apply in ((LEVELS, _levels_changed), (NEIGHBOURS, _blended)):
            rows = _rows(self.kind, names)
            kind, sign = (self.kind, self.sign) if rows is None else (self.kind[rows], self.sign[rows])
            images = _on_rows(images, rows, partial(apply, kind=kind, sign=sign, magnitude=self.magnitude))
        return images

    def moved(self, values: Tensor, outside: float) -> Tensor:
        rows, places, unseen = self._sources
        return _on_rows(values, rows, lambda some: taken(some, places).masked_fill(unseen[:, None], outside))

    def enlarged(self, scale: int) -> Operation:
        return replace(self, size=(self.size[0] * scale, self.size[1] * scale), scale=self.scale * scale)

    @cached_property
    def _sources(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Which samples move (None for all), for each of their pixels the one that it shows, and whether that is outside the picture."""
        rows = _rows(self.kind, MOVES)
        kind, sign = (self.kind, self.sign) if rows is None else (self.kind[rows], self.sign[rows])
        return rows, *_sources(self.size, _matrices(*self.size, self.scale, self.magnitude, kind.device)[kind, sign])


def _rows(kind: Tensor, names: tuple[str, ...]) -> Tensor | None:
    """Which samples drew one of the operations `names`; None for all.

    An operation leaves the samples of another kind as they are, so that leaving them out only saves time. On a GPU nothing is left out:
    the device would have to be waited for.
    """
    if kind.device.type != "cpu":
        return None
    first = OPERATIONS.index(names[0])
    return ((kind >= first) & (kind < first + len(names))).nonzero().flatten()


def _on_rows(values: Tensor, rows: Tensor | None, apply: Callable[[Tensor], Tensor]) -> Tensor:
    if rows is None:
        return apply(values)
    if not len(rows):
        return values
    return values.index_copy(0, rows, apply(values[rows]))


# --- moves: where a pixel comes from ---------------------------------------------------------------------------------


def _sources(size: tuple[int, int], matrix: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample and pixel, the pixel it shows, int64 [B, H, W] row-major, and whether that lies outside the picture.

    matrix: int64 [B, 6], see `_matrices`.
    """
    height, width = size
    # Twice the distance from the image's centre is a whole number.
    x = 2 * torch.arange(width, device=matrix.device) - (width - 1)
    y = (2 * torch.arange(height, device=matrix.device) - (height - 1))[:, None]
    a, b, c, d, e, f = (entry[:, None, None] for entry in matrix.unbind(1))
    columns = (a * x + b * y + c + width * _ONE) >> 17  # half of it, in whole pixels, rounded
    rows = (d * x + e * y + f + height * _ONE) >> 17
    unseen = (columns < 0) | (columns >= width) | (rows < 0) | (rows >= height)
    return rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1), unseen


@lru_cache(maxsize=64)
def _matrices(height: int, width: int, scale: int, magnitude: float, device: torch.device) -> Tensor:
    """`_moves` as int64 [operations, 2, 6]."""
    return torch.tensor(_moves(height, width, scale, magnitude), device=device)


@lru_cache(maxsize=64)
def _motions(height: int, width: int, scale: int, magnitude: float, device: torch.device) -> Tensor:
    """For each operation and sign, where it takes points: float32 [operations, 2, 6], four numbers of `Motion.linear`, two of `shift`.

    `_sources` shows at the point p, the middle of a pixel, what lies at A (p - m) + t + m. A is the matrix, m the image's centre and t half
    of (c, f), which counts twice the distance. So what lies at x is shown at inverse(A) (x - m - t) + m.
    """

    def forward(a: int, b: int, c: int, d: int, e: int, f: int) -> tuple[float, ...]:
        determinant = a * e - b * d
        linear = tuple(number * _ONE / determinant for number in (e, -b, -d, a))
        x, y = width / 2 + c / (2 * _ONE), height / 2 + f / (2 * _ONE)
        return *linear, width / 2 - (linear[0] * x + linear[1] * y), height / 2 - (linear[2] * x + linear[3] * y)

    table = [[forward(*numbers) for numbers in signs] for signs in _moves(height, width, scale, magnitude)]
    return torch.tensor(table, dtype=torch.float32, device=device)


def _moves(height: int, width: int, scale: int, magnitude: float) -> list[list[tuple[int, ...]]]:
    """For each operation and sign, where (x, y) comes from: (a x + b y + c, d x + e y + f) in 2**16ths.

    x and y are twice the distance from the centre of an image of height x width, in pixels. scale: see `Operation`.
    """
    level = magnitude / LARGEST_MAGNITUDE

    def numbers(name: str, sign: int) -> tuple[float, ...]:
        if name == "shear_x":
            return 1, sign * _SHEAR * level, 0, 0, 1, 0
        if name == "shear_y":
            return 1, 0, 0, sign * _SHEAR * level, 1, 0
        if name == "translate_x":
            return 1, 0, sign * 2 * scale * round(_TRANSLATE * level * (width // scale)), 0, 1, 0
        if name == "translate_y":
            return 1, 0, 0, 0, 1, sign * 2 * scale * round(_TRANSLATE * level * (height // scale))
        if name == "rotate":
            cosine, sine = math.cos(_ROTATE * level), sign * math.sin(_ROTATE * level)
            return cosine, sine, 0, -sine, cosine, 0
        return 1, 0, 0, 0, 1, 0

    return [[tuple(round(number * _ONE) for number in numbers(name, sign)) for sign in (-1, 1)] for name in OPERATIONS]


# --- levels: a new value for each of the 256 ------------------------------------------------------------------------


def _levels_changed(images: Tensor, kind: Tensor, sign: Tensor, magnitude: float) -> Tensor:
    table = _level_tables(images, kind, _factors(sign, magnitude), magnitude)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _level_tables(images: Tensor, kind: Tensor, factor: Tensor, magnitude: float) -> Tensor:
    """What each value of each channel becomes: uint8 [B, C, 256]."""
    counts = histogram(images)
    level = magnitude / LARGEST_MAGNITUDE
    values = torch.arange(256, device=images.device).expand_as(counts)
    factor = factor[:, None, None]
    dropped = round(_BITS * level)
    threshold = 256 - round(256 * level)
    changed = {
        "brightness": blend(values.new_zeros(1), values, factor),
        "contrast": blend(mean_grey(images)[:, :, :, 0], values, factor),
        "posterize": values >> dropped << dropped,
        "solarize": torch.where(values >= threshold, 255 - values, values),
        "autocontrast": _stretched(counts, values),
        "equalize": _equalized(counts, values),
    }
    table = values.byte()
    for name, new in changed.items():
        table = torch.where((kind == OPERATIONS.index(name))[:, None, None], new.byte(), table)
    return table


def _stretched(counts: Tensor, values: Tensor) -> Tensor:
    """The lowest value that occurs in a channel becomes 0 and the highest 255; a channel of one value stays."""
    occurs = counts > 0
    low = occurs.int().argmax(2, keepdim=True)
    high = 255 - occurs.flip(2).int().argmax(2, keepdim=True)
    span = high - low
    stretched = ((values - low).clamp(min=0) * 255 + span // 2) // span.clamp(min=1)
    return torch.where(span > 0, stretched.clamp(max=255), values)


def _equalized(counts: Tensor, values: Tensor) -> Tensor:
    """Values spread so that each range of them occurs about equally often, as PIL's `equalize` does it."""
    highest = 255 - (counts > 0).flip(2).int().argmax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, highest)) // 255
    below_it = counts.cumsum(2) - counts
    spread = (below_it + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp(max=255), values)


# --- neighbours: blending with a greyer or a smoother self -----------------------------------------------------------


def _blended(images: Tensor, kind: Tensor, sign: Tensor, magnitude: float) -> Tensor:
    is_color, is_sharpness = ((kind == OPERATIONS.index(name))[:, None, None, None] for name in NEIGHBOURS)
    base = torch.where(is_sharpness, smoothed(images), grey(images))
    factor = torch.where(is_color | is_sharpness, _factors(sign, magnitude)[:, None, None, None], UNIT)
    return blend(base, images, factor)


def _factors(sign: Tensor, magnitude: float) -> Tensor:
    """1 + or - what the magnitude asks for, in 256ths: int64 [B]."""
    return UNIT + (2 * sign - 1) * round(UNIT * _BLEND * magnitude / LARGEST_MAGNITUDE)
