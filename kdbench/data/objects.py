"""Objects of pictures as they are read from annotations of any format: packed, in pixels of their pictures.

What is wrong with an annotation ends in one line, or leaves the annotation out and is counted: `Broken`.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdbench.errors import UserError

WhatIfBroken = Literal["refuse", "drop"]
ROUNDING = 1.0  # pixels by which a box may stick out of its picture: annotations are rounded
MOST_OBJECTS = 20_000_000  # of a data set
_POINT_BYTES = 12  # three numbers in single precision


class Flaw(Exception):
    """One annotation or picture is broken.

    problem: what is wrong, to be read after the name of what is broken. kind: the same without numbers and names, to be read after a count.
    """

    def __init__(self, problem: str, kind: str) -> None:
        super().__init__(problem)
        self.problem, self.kind = problem, kind


@dataclass
class Broken:
    """What is done with broken annotations: the first ends in an error, or all are left out and counted by what is wrong."""

    what: WhatIfBroken
    counts: Counter[str] = field(default_factory=Counter)

    def found(self, where: str, flaw: Flaw) -> None:
        """Leave something out. where: what it is, with its file. Raises UserError where broken annotations are refused."""
        if self.what == "refuse":
            raise UserError(f"{where} {flaw.problem}. Mend it, or set broken: drop")
        self.counts[flaw.kind] += 1

    @property
    def said(self) -> str:
        """What was left out, in words."""
        told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        return f"left out: {told}" if told else "nothing is left out"


def check_box(box: Sequence[float], height: int, width: int) -> None:
    """Raise Flaw where a box x0, y0, x1, y1 in pixels of its picture has no area, sticks out of the picture, or has no part in it."""
    x0, y0, x1, y1 = box
    if not (x1 > x0 and y1 > y0):
        raise Flaw(f"has a box without area, {_rounded(box)}", "boxes without area")
    apart = x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0
    if apart or x0 < -ROUNDING or y0 < -ROUNDING or x1 > width + ROUNDING or y1 > height + ROUNDING:
        raise Flaw(f"has a box outside of its picture of {width} x {height} pixels, {_rounded(box)}", "boxes outside of their picture")


def _rounded(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{number:g}" for number in box) + "] (x0, y0, x1, y1)"


class ObjectList:
    """Objects as they are read, in any order, packed as they come: a data set has a million."""

    def __init__(self) -> None:
        self.pictures, self.labels, self.ids = array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.crowd = bytearray()
        self.counts, self.ends = bytearray(), array("q", [0])
        self.points: list[bytes] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def add(
        self,
        picture: int,
        label: int,
        box: Sequence[float],
        area: float,
        crowd: bool = False,
        number: int = 0,
        counts: bytes = b"",
        points: bytes = b"",
    ) -> None:
        """One object.

        Args:
            picture: the row of its picture.
            label: its class, or another number that `numbered` turns into one.
            box: x0, y0, x1, y1 in pixels of the picture.
            area: in pixels of the picture.
            crowd: whether it is a group that is not learned.
            number: what the format calls it.
            counts: its mask, run-length encoded.
            points: its keypoints, float32 [K, 3]; empty where it has none.

        Raises:
            UserError: there are implausibly many.
        """
        if len(self) >= MOST_OBJECTS:
            raise UserError(f"more than {MOST_OBJECTS:,} objects in one set of annotations; split it")
        self.pictures.append(picture)
        self.labels.append(label)
        self.ids.append(number)
        self.boxes.extend(box)
        self.areas.append(area)
        self.crowd.append(crowd)
        self.counts += counts
        self.ends.append(len(self.counts))
        self.points.append(points)

    def sorted(self, labels: NDArray[np.int64] | None = None, kept: NDArray[np.bool_] | None = None, points: int = 0) -> Objects:
        """Those that are kept, those of a picture one after the other.

        labels: int64 [T], of all; those that were given by default. kept: bool [T]; all by default. points: how many an object has.
        """
        pictures = np.array(self.pictures, np.int64)
        order = np.arange(len(self)) if kept is None else np.flatnonzero(kept)
        empty = bytes(_POINT_BYTES * points)
        joined = b"".join(each or empty for each in self.points) if points else b""
        whole = Objects(
            pictures,
            np.array(self.boxes, np.float64).reshape(-1, 4),
            np.array(self.labels, np.int64) if labels is None else labels,
            np.frombuffer(bytes(self.crowd), np.bool_),
            np.array(self.areas, np.float64),
            np.frombuffer(bytes(self.counts), np.uint8),
            np.array(self.ends, np.int64),
            np.frombuffer(joined, np.float32).reshape(-1, points, 3) if points else None,
        )
        return whole.taken(order[pictures[order].argsort(kind="stable")])


@dataclass(frozen=True)
class Objects:
    """T objects, those of a picture one after the other, in pixels of their pictures.

    pictures, labels: int64 [T]. boxes: float64 [T, 4]. crowd: bool [T]. area: float64 [T]. counts, ends: see `Runs`. points: float32
    [T, K, 3], None where objects have none.
    """

    pictures: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    counts: NDArray[np.uint8]
    ends: NDArray[np.int64]
    points: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def first(self, pictures: int) -> NDArray[np.int64]:
        """int64 [P + 1]: picture p has the objects first[p] .. first[p + 1]."""
        return np.searchsorted(self.pictures, np.arange(pictures + 1)).astype(np.int64)

    def most(self) -> int:
        """Objects of the picture that has most, and at least 1."""
        return max(1, int(np.bincount(self.pictures).max(initial=0)))

    def largest(self, most: int) -> Objects:
        """At most so many of a picture, those with the largest area, in their order."""
        by_area = np.lexsort((-self.area, self.pictures))
        ranks = np.empty(len(self), np.int64)
        ranks[by_area] = ranks_in(self.pictures[by_area])
        kept = np.flatnonzero(ranks < most)
        return self.taken(kept)

    def taken(self, rows: NDArray[np.int64]) -> Objects:
        """Some of the objects, in the order of `rows`, int64 [R]."""
        starts, ends, counts = self.ends[:-1][rows], self.ends[1:][rows], self.counts.data
        joined = b"".join(counts[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
        return Objects(
            self.pictures[rows],
            self.boxes[rows],
            self.labels[rows],
            self.crowd[rows],
            self.area[rows],
            np.frombuffer(joined, np.uint8),
            np.concatenate([[0], (ends - starts).cumsum()]),
            self.points[rows] if self.points is not None else None,
        )


def ranks_in(pictures: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which object of its picture each is, of objects in the order of their pictures."""
    starts = np.searchsorted(pictures, pictures)
    return np.arange(len(pictures)) - starts
