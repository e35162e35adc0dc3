"""Masks as run-length encodings, COCO's compressed form: how many pixels are off, on, off, ... down one column after the other.

Encodings that somebody else wrote are checked here before faster-coco-eval's compiled code sees them, which trusts its input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdbench.errors import shown

RLE = dict[str, Any]  # {"size": [height, width], "counts": bytes}, as pycocotools and faster-coco-eval have it

_CODES = 64  # a character is 48 + six bits
_MORE, _SIGN, _BITS = 32, 16, 5  # of the six, the highest says that more follow; the number is signed, its lowest five bits first
_MOST_CHARACTERS = 7  # of a number: a picture has at most 10**8 pixels
# Drawing a polygon takes memory for each pixel of its outline.
_OUTSIDE = 1.0  # how far a polygon may lie outside of its picture, in the picture's sides
_LONGEST_OUTLINE = 100  # times height and width of the picture together
FEWEST_NUMBERS = 6  # of a polygon: three points


class InvalidMask(ValueError):
    """What stands for a mask is none. The message says why, to be read after the name of its object."""


def from_polygons(polygons: Sequence[Any], height: int, width: int) -> bytes:
    """Counts of the mask that polygons [x0, y0, x1, y1, ...] cover together, drawn as pycocotools draws them. Raises InvalidMask."""
    if not polygons:
        raise InvalidMask("has a segmentation without a polygon")
    outlines = [_outline(polygon, height, width) for polygon in polygons]
    from faster_coco_eval.core import mask  # its package takes a quarter of a second, so only who has masks pays

    drawn = mask.frPyObjects([outline.tolist() for outline in outlines], height, width)
    counts: bytes = (drawn[0] if len(drawn) == 1 else mask.merge(drawn))["counts"]
    return counts


def _outline(polygon: Any, height: int, width: int) -> NDArray[np.float64]:
    """x and y in turn of a sound polygon. Raises InvalidMask."""
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        raise InvalidMask("has a segmentation that is no list of polygons, each a list of numbers x, y, x, y, ...")
    if len(polygon) % 2:
        raise InvalidMask(f"has a polygon of {len(polygon)} numbers; expected pairs of x and y")
    if len(polygon) < FEWEST_NUMBERS:
        raise InvalidMask(f"has a polygon of {len(polygon) // 2} points; expected at least {FEWEST_NUMBERS // 2}")
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:
        raise InvalidMask("has a polygon with a number that is too large") from None
    sides = np.array([width, height])
    if not ((points >= -_OUTSIDE * sides) & (points <= (1 + _OUTSIDE) * sides)).all():
        raise InvalidMask("has a polygon far outside of the picture")
    if np.abs(points[1:] - points[:-1]).sum() > _LONGEST_OUTLINE * (height + width):
        raise InvalidMask("has a polygon with an implausibly long outline")
    return points.ravel()


def from_rle(rle: Any, height: int, width: int) -> bytes:
    """Counts of a mask that is run-length encoded, compressed or a list of numbers. Raises InvalidMask, also for another size."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise InvalidMask(f"has an RLE of the size {shown(size)}, and its picture has [{height}, {width}]")
    pixels = height * width
    if isinstance(counts, str):
        if not counts.isascii():
            raise InvalidMask("has an RLE with damaged counts")
        content = counts.encode()
        check_counts(content, pixels)
        return content
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= pixels for count in counts) or sum(counts) != pixels:
        raise InvalidMask(f"has an RLE whose counts do not add up to the {pixels} pixels of its picture")
    from faster_coco_eval.core import mask

    encoded: bytes = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    return encoded


def check_counts(content: bytes, pixels: int) -> None:
    """Raise InvalidMask where compressed counts are damaged, or are not of a picture of so many pixels."""
    codes = np.frombuffer(content, np.uint8).astype(np.int64) - 48
    last = (codes & _MORE) == 0
    ends = last.nonzero()[0]
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    sound = len(codes) > 0 and codes.min() >= 0 and codes.max() < _CODES and last[-1] and int((ends - starts).max()) < _MOST_CHARACTERS
    if not sound:
        raise InvalidMask("has an RLE with damaged counts")
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((codes & (_MORE - 1)) << (_BITS * place), starts)
    negative = (codes[ends] & _SIGN) > 0
    numbers -= negative.astype(np.int64) << (_BITS * (place[ends] + 1))
    # From the fourth count on, what is written is the difference to the last count but one.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    if numbers.min() < 0 or numbers.max() > pixels or numbers.sum() != pixels:
        raise InvalidMask(f"has an RLE whose counts do not add up to the {pixels} pixels of its picture")


@lru_cache(maxsize=4096)
def nothing(height: int, width: int) -> bytes:
    """Counts of a mask that covers no pixel, as polygons are drawn."""
    return from_rle({"size": [height, width], "counts": [height * width]}, height, width)


def areas(counts: Iterable[bytes], height: int, width: int) -> NDArray[np.int64]:
    """Pixels of each mask, int64 [K]."""
    from faster_coco_eval.core import mask

    found: NDArray[np.int64] = np.asarray(mask.area([{"size": [height, width], "counts": each} for each in counts]), np.int64)
    return found


@dataclass(frozen=True)
class Runs:
    """The masks of all pictures of a data set, in one piece of memory.

    content: counts of all masks, one after the other, uint8. ends: int64 [T + 1], mask t is content[ends[t] : ends[t + 1]].
    first: int64 [P + 1], picture p has the masks first[p] .. first[p + 1]. sizes: int64 [P, 2], height and width of the pictures.
    """

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def of(self, picture: int) -> list[RLE]:
        """The masks of one picture at its own size."""
        size = self.sizes[picture].tolist()
        masks = range(self.first[picture], self.first[picture + 1])
        return [{"size": size, "counts": self.content[self.ends[mask] : self.ends[mask + 1]].tobytes()} for mask in masks]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for array in (self.content, self.ends, self.first, self.sizes):
            digest.update(str(array.shape).encode() + array.tobytes())
        return digest.hexdigest()
