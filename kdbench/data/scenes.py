"""Scenes of coloured geometric shapes on a noisy ground, drawn from a seed: boxes, masks, keypoints and a caption are known exactly.

Scene i is a function of (seed, i) alone, and of nothing but IEEE additions, products and comparisons: the same bytes on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = ("circle", "square", "triangle", "cross", "ring")  # class k of a mask is KINDS[k - 1]; 0 is the ground
COLOURS = {
    "red": (0.85, 0.20, 0.20),
    "green": (0.20, 0.70, 0.25),
    "blue": (0.20, 0.35, 0.85),
    "yellow": (0.85, 0.80, 0.20),
    "purple": (0.60, 0.25, 0.70),
    "white": (0.90, 0.90, 0.90),
}
PREDICATES = ("above", "below", "left of", "right of")  # how one object lies to another, along the longer of the two distances
MOST_OBJECTS = 3
KEYPOINTS = 5  # the centre, then up to four corners or tips, clockwise from the top

MOST_IMAGES = 1_000_000  # test image j is drawn as image MOST_IMAGES + j, so that it stays the same whatever the training set's size
_TRIES = 8  # for a free place, before an object is left out
_RADIUS = (0.14, 0.26)  # of an object's circumscribed circle, as a share of the image's side
_CLOSEST = 0.8  # two centres are at least this share of the summed radii apart, so that each object stays recognisable
_GROUND = (0.15, 0.70)  # brightness of the ground's blotches
_BLOTCHES = 4  # a side
_SHADE = 0.15  # how much an object's colour varies, up and down
_NOISE = 0.10  # of a single pixel, up and down

_HALF = math.sqrt(0.5)
_LIMB = 0.33  # half the width of a cross's arm, in radii
_HOLE = 0.5  # radius of a ring's hole
_TIPS = ((0.0, -0.94), (0.94, 0.0), (0.0, 0.94), (-0.94, 0.0))
_CORNERS = {
    "circle": _TIPS,
    "square": ((-_HALF, -_HALF), (_HALF, -_HALF), (_HALF, _HALF), (-_HALF, _HALF)),
    "triangle": ((0.0, -1.0), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5)),
    "cross": _TIPS,
    "ring": _TIPS,
}
# Objects are turned by up to 20 degrees either way, less than a quarter of any symmetry, so that corners keep their names. The table is
# rounded because sines differ in the last bit between processors.
_TURNS = tuple((round(math.cos(math.radians(a)), 9), round(math.sin(math.radians(a)), 9)) for a in range(-20, 21, 4))


@dataclass(frozen=True)
class Shape:
    """One object. x runs right and y down, in pixels from the image's upper left corner.

    kind: 1 .. len(KINDS). box: (x0, y0, x1, y1) around the visible pixels, right and lower edge included in the box's area.
    mask: bool [H, W], the visible pixels. keypoints: float32 [KEYPOINTS, 3] of x, y and 1 where it can be seen, 0 where another object
    hides it or the kind has fewer corners. centre: x and y, before rounding.
    """

    kind: int
    colour: str
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    keypoints: NDArray[np.float32]
    centre: tuple[float, float]

    @property
    def name(self) -> str:
        return KINDS[self.kind - 1]


@dataclass(frozen=True)
class Scene:
    """image: uint8 [3, H, W]. objects: at least one, from the back to the front. caption: kinds, colours and how the first two lie."""

    image: NDArray[np.uint8]
    objects: tuple[Shape, ...]
    caption: str

    @property
    def classes(self) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 [H, W]; 0 is the ground."""
        labels = np.zeros(self.image.shape[1:], np.uint8)
        for shape in self.objects:
            labels[shape.mask] = shape.kind
        return labels


@dataclass(frozen=True)
class _Placed:
    """An object before it is drawn; x, y and radius in pixels, turn as (cosine, sine)."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    turn: tuple[float, float]


def draw(seed: int, index: int, size: int = 32, most: int = MOST_OBJECTS) -> Scene:
    """Picture `index` of the endless series `seed`, with 1 .. `most` objects."""
    random = np.random.Generator(np.random.PCG64([seed, index]))
    placed = _layout(random, size, most)
    image = _ground(random, size)
    owner = np.full((size, size), -1, np.int8)
    for number, item in enumerate(placed):
        inside = _inside(item, size)
        shade = 1 + _SHADE * (2 * random.random() - 1)
        image[:, inside] = np.array(COLOURS[item.colour])[:, None] * shade
        owner[inside] = number
    image += _NOISE * (2 * random.random(image.shape) - 1)
    pixels = (image.clip(0, 1) * 255).astype(np.uint8)
    return Scene(pixels, tuple(_shape(item, number, owner) for number, item in enumerate(placed)), _caption(placed))


def draw_at_least(least: int, seed: int, index: int, size: int = 32, most: int = MOST_OBJECTS) -> Scene:
    """Picture `index` of another endless series, with `least` .. `most` objects.

    Pictures `index`, `index` + 2 MOST_IMAGES, `index` + 4 MOST_IMAGES, ... of the series `seed` are drawn until one has enough objects. No
    training or test picture shares these numbers, so each stays a function of (seed, index).
    """
    while len((scene := draw(seed, index, size, most)).objects) < least:
        index += 2 * MOST_IMAGES
    return scene


def predicate(subject: tuple[float, float], other: tuple[float, float]) -> int:
    """Which of PREDICATES holds between two centres (x, y): `subject` is above, below, left of or right of `other`."""
    across, down = other[0] - subject[0], other[1] - subject[1]
    if abs(down) > abs(across):
        return 0 if down > 0 else 1
    return 2 if across > 0 else 3


def _layout(random: np.random.Generator, size: int, most: int) -> list[_Placed]:
    placed: list[_Placed] = []
    for _ in range(1 + int(random.random() * most)):
        kind = KINDS[int(random.random() * len(KINDS))]
        colour = list(COLOURS)[int(random.random() * len(COLOURS))]
        turn = _TURNS[int(random.random() * len(_TURNS))]
        radius = _between(random.random(), *_RADIUS) * size
        for across, down in random.random((_TRIES, 2)).tolist():
            x, y = _between(across, radius, size - radius), _between(down, radius, size - radius)
            if all(_far_apart(x, y, radius, other) for other in placed):
                placed.append(_Placed(kind, colour, x, y, radius, turn))
                break
    return placed


def _far_apart(x: float, y: float, radius: float, other: _Placed) -> bool:
    closest = _CLOSEST * (radius + other.radius)
    return (x - other.x) * (x - other.x) + (y - other.y) * (y - other.y) >= closest * closest


def _between(share: float, low: float, high: float) -> float:
    return low + share * (high - low)


def _ground(random: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Blotches that fade into each other, [3, size, size]."""
    knots = _GROUND[0] + (_GROUND[1] - _GROUND[0]) * random.random((3, _BLOTCHES + 1, _BLOTCHES + 1))
    place = (np.arange(size) + 0.5) * (_BLOTCHES / size)
    left = place.astype(np.intp)
    share = place - left
    columns = knots[:, :, left] * (1 - share) + knots[:, :, left + 1] * share
    ground: NDArray[np.float64] = columns[:, left] * (1 - share[:, None]) + columns[:, left + 1] * share[:, None]
    return ground


def _inside(item: _Placed, size: int) -> NDArray[np.bool_]:
    """Which pixels' centres the object covers, [size, size]."""
    cosine, sine = item.turn
    across = (np.arange(size) + 0.5 - item.x) / item.radius
    down = ((np.arange(size) + 0.5 - item.y) / item.radius)[:, None]
    u, v = cosine * across + sine * down, cosine * down - sine * across
    covered: NDArray[np.bool_]
    match item.kind:
        case "circle":
            covered = u * u + v * v <= 1
        case "ring":
            distance = u * u + v * v
            covered = (distance <= 1) & (distance >= _HOLE * _HOLE)
        case "square":
            covered = np.maximum(abs(u), abs(v)) <= _HALF
        case "triangle":
            # Height above the base at v = 0.5, and the two slanted sides, which meet at v = -1.
            covered = (v <= 0.5) & (abs(u) * math.sqrt(3) <= v + 1)
        case _:
            covered = (np.minimum(abs(u), abs(v)) <= _LIMB) & (np.maximum(abs(u), abs(v)) <= -_TIPS[0][1])
    return covered


def box_around(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around the pixels of a mask [H, W], right and lower edge included in the box's area."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shape(item: _Placed, number: int, owner: NDArray[np.int8]) -> Shape:
    mask = owner == number
    box = box_around(mask)
    cosine, sine = item.turn
    keypoints = np.zeros((KEYPOINTS, 3), np.float32)
    for row, (u, v) in enumerate(((0.0, 0.0), *_CORNERS[item.kind])):
        x, y = item.x + item.radius * (cosine * u - sine * v), item.y + item.radius * (sine * u + cosine * v)
        hidden = owner[min(int(y), len(owner) - 1), min(int(x), len(owner) - 1)] > number
        keypoints[row] = (x, y, not hidden)
    return Shape(KINDS.index(item.kind) + 1, item.colour, box, mask, keypoints, (item.x, item.y))


def _caption(placed: list[_Placed]) -> str:
    """`a red circle above a blue square, with a white ring`."""
    named = [f"a {item.colour} {item.kind}" for item in placed]
    if len(placed) == 1:
        return named[0]
    first, second = ((item.x, item.y) for item in placed[:2])
    relation = PREDICATES[predicate(first, second)]
    return ", with ".join([f"{named[0]} {relation} {named[1]}", *named[2:]])
