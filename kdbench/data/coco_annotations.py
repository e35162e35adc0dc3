"""One JSON file of COCO's format, https://cocodataset.org/#format-data, entry after entry: its pictures, categories and objects.

A box is x, y, width and height in pixels from the upper left corner. What is wrong with an entry goes to `Broken`.
"""

from __future__ import annotations

import math
import os
import stat
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from kdbench.data.json_entries import entries
from kdbench.data.kinds import Points
from kdbench.data.objects import Broken, Flaw, ObjectList, Objects, check_box
from kdbench.data.pictures import MOST_PIXELS
from kdbench.data.run_lengths import InvalidMask, areas, from_polygons, from_rle, nothing
from kdbench.errors import UserError, printable, shown

_TITLES = {"images": "image", "annotations": "annotation", "categories": "category"}  # of an entry of each list
_MOST_PICTURES = 2_000_000
_MOST_CATEGORIES = 100_000
_MOST_KEYPOINTS = 1_000  # of an object
_LARGEST_ID = 2**62
_LEFT_OUT = -1  # the row of a picture that is broken
_UNKNOWN_CATEGORY, _BROKEN_POINTS = "objects of an unknown category", "objects with broken keypoints"
_SIDES = (("left", "right"), ("Left", "Right"))


@dataclass(frozen=True)
class Category:
    """keypoints: names of the points of an object, none where its objects have no points."""

    name: str
    keypoints: tuple[str, ...] = ()


class Annotations:
    """What a file says.

    names, nbytes: path below `folder` and size of each picture's file. sizes_of_pictures: int64 [P, 2], height and width.
    categories: by id.
    """

    def __init__(self, file: Path, folder: Path, target: str, broken: Broken) -> None:
        self.folder, self.where = folder, printable(str(file))
        self.names: list[str] = []
        self.nbytes: list[int] = []
        self.categories: dict[int, Category] = {}
        self._sizes, self._rows = array("q"), dict[int, int]()
        self._found = ObjectList()
        self._target, self._broken, self._keypoints = target, broken, 0
        add = {"images": self._picture, "categories": self._category, "annotations": self._annotation}
        waiting = False
        for name, entry in entries(file, tuple(add)):
            if name == "annotations" and not self._rows:
                waiting = True
            else:
                self._read(name, entry, add[name])
        for name, entry in entries(file, ("annotations",)) if waiting else ():  # which stand before the pictures that they are of
            self._read(name, entry, self._annotation)
        if not self.names:
            raise UserError(f"data coco: {self.where} lists no pictures that are in {printable(str(folder))}")
        if not self.categories:
            raise UserError(f"data coco: {self.where} lists no categories")

    @property
    def sizes_of_pictures(self) -> NDArray[np.int64]:
        return np.array(self._sizes, np.int64).reshape(-1, 2)

    # --- entries -----------------------------------------------------------------------------------------------------

    def _read(self, name: str, entry: dict[str, Any], add: Callable[[int, dict[str, Any]], None]) -> None:
        number = entry.get("id")
        try:
            if not _is_whole(number):
                raise Flaw("has an id that is no whole number", f"{name} without an id")
            add(number, entry)
        except Flaw as flaw:
            self._broken.found(self._named(_TITLES[name], number), flaw)

    def _named(self, title: str, number: Any) -> str:
        return f"data coco: {self.where}: {title} {shown(number)}"

    def _picture(self, number: int, entry: dict[str, Any]) -> None:
        if number in self._rows:
            raise Flaw("is listed twice", "pictures listed twice")
        if len(self._rows) >= _MOST_PICTURES:
            raise UserError(f"data coco: {self.where} lists more than {_MOST_PICTURES:,} pictures")
        self._rows[number] = _LEFT_OUT
        name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
        if not (_is_whole(height) and _is_whole(width) and min(height, width) >= 1 and height * width <= MOST_PIXELS):
            raise Flaw(f"has the size {shown(width)} x {shown(height)}", "pictures without a size")
        if not isinstance(name, str) or not _is_below(name):
            raise Flaw(f"has the file_name {shown(name)}, which is no path below its folder", "pictures without a path")
        try:
            status = os.stat(self.folder / name)
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise Flaw(f"has no file: there is none at {printable(str(self.folder / name))}", "pictures without a file")
        self._rows[number] = len(self.names)
        self.names.append(name)
        self.nbytes.append(status.st_size)
        self._sizes.extend((height, width))

    def _category(self, number: int, entry: dict[str, Any]) -> None:
        name, points = entry.get("name"), entry.get("keypoints", [])
        where = self._named("category", number)
        if number in self.categories:
            raise Flaw("is listed twice", "categories listed twice")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where} must have a name")
        if name in {category.name for category in self.categories.values()}:
            raise UserError(f"{where} has the name {shown(name)}, which another category has; rename one of them")
        if len(self.categories) >= _MOST_CATEGORIES:
            raise UserError(f"data coco: {self.where} lists more than {_MOST_CATEGORIES:,} categories")
        if not isinstance(points, list) or not all(isinstance(point, str) for point in points):
            raise UserError(f"{where} has keypoints that are no list of names")
        self.categories[number] = Category(printable(name), tuple(points))

    def _annotation(self, number: int, entry: dict[str, Any]) -> None:
        image, category = entry.get("image_id"), entry.get("category_id")
        row = self._rows.get(image) if _is_whole(image) else None
        if row is None:
            raise Flaw(f"has the image_id {shown(image)}, which no image has", "objects of an unknown picture")
        if row == _LEFT_OUT:
            return
        if not _is_whole(category):
            raise Flaw(f"has the category_id {shown(category)}, which no category has", _UNKNOWN_CATEGORY)
        height, width = self._sizes[2 * row : 2 * row + 2]
        given = entry.get("bbox")
        if not isinstance(given, list) or len(given) != 4 or not all(map(_is_number, given)):
            raise Flaw(f"has the bbox {shown(given)}, expected x, y, width and height", "objects without a box")
        x, y, wide, high = map(float, given)
        box = (x, y, x + wide, y + high)
        check_box(box, height, width)
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise Flaw(f"has iscrowd {shown(crowd)}, expected 0 or 1", "objects with a damaged iscrowd")
        counts = _drawn(entry.get("segmentation"), height, width) if self._target == "masks" else b""
        area = entry.get("area")
        if "area" not in entry:
            area = float(areas([counts], height, width)[0]) if counts else wide * high
        if not _is_number(area) or area <= 0:
            raise Flaw(f"has the area {shown(area)}, expected a number above 0", "objects without area")
        points = self._points(entry["keypoints"]) if self._target == "keypoints" and "keypoints" in entry else b""
        self._found.add(row, category, box, float(area), bool(crowd), number, counts, points)

    def _points(self, given: Any) -> bytes:
        """Keypoints as float32 [K, 3]."""
        if not isinstance(given, list) or len(given) % 3 or not all(map(_is_number, given)):
            raise Flaw("has keypoints that are no list of numbers x, y, visibility, ...", _BROKEN_POINTS)
        count = len(given) // 3
        self._keypoints = self._keypoints or count
        if count != self._keypoints or count > _MOST_KEYPOINTS:
            raise Flaw(f"has {count} keypoints, and others have {self._keypoints}", _BROKEN_POINTS)
        points = np.array(given, np.float64).reshape(-1, 3)
        if not np.isin(points[:, 2], (0, 1, 2)).all():
            raise Flaw("has a keypoint whose visibility is not 0, 1 or 2", _BROKEN_POINTS)
        return points.astype(np.float32).tobytes()

    # --- what they come to -------------------------------------------------------------------------------------------

    def objects(self, classes: dict[int, str]) -> Objects:
        """The objects of these categories, by id, labelled in their order. Raises UserError for broken ones that are refused."""
        found = self._found
        given, ids = np.array(found.labels, np.int64), np.array(found.ids, np.int64)
        kept = np.ones(len(found), np.bool_)
        _, first = np.unique(ids, return_index=True)
        again = np.ones(len(found), np.bool_)
        again[first] = False
        unknown = ~np.isin(given, list(self.categories)) & ~again
        for row in np.flatnonzero(again).tolist():
            self._broken.found(self._named("annotation", ids[row].item()), Flaw("is listed twice", "objects listed twice"))
        for row in np.flatnonzero(unknown).tolist():
            flaw = Flaw(f"has the category_id {given[row]}, which no category has", _UNKNOWN_CATEGORY)
            self._broken.found(self._named("annotation", ids[row].item()), flaw)
        kept &= ~again & ~unknown & np.isin(given, list(classes))
        order = np.array(sorted(classes), np.int64)
        labels = np.searchsorted(order, given).clip(max=len(order) - 1)
        return found.sorted(labels, kept, self._keypoints)

    def points(self, classes: dict[int, str]) -> Points:
        """How views change an object's points: which of them change places in a mirror, by their names."""
        names = {self.categories[number].keypoints for number in classes} - {()}
        if len(names) != 1 or (self._keypoints and self._keypoints != len(next(iter(names)))):
            raise UserError(
                f"data coco: {self.where} must have one list of keypoints for all categories that are learned, {self._keypoints} names long"
            )
        pairs = mirror_pairs(next(iter(names)))
        return Points(pairs, mirrors=bool(pairs))


def mirror_pairs(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Which points change places in a mirror image: those whose names differ in left and right alone."""
    place = {name: number for number, name in enumerate(names)}
    found = {
        (number, place[name.replace(left, right)])
        for name, number in place.items()
        for left, right in _SIDES
        if left in name and name.replace(left, right) in place
    }
    return tuple(sorted(found))


def check_same_categories(one: Annotations, other: Annotations) -> None:
    """Raise UserError where two files have other categories."""
    here, there = ({number: category.name for number, category in each.categories.items()} for each in (one, other))
    for number in sorted(here.keys() | there.keys()):
        if here.get(number) != there.get(number):
            names = " and ".join(shown(each.get(number)) if number in each else "missing" for each in (here, there))
            raise UserError(f"data coco: {one.where} and {other.where} must have the same categories; {number} is {names}")


def _drawn(segmentation: Any, height: int, width: int) -> bytes:
    """Counts of a mask, which covers at least one pixel."""
    try:
        if isinstance(segmentation, dict):
            counts = from_rle(segmentation, height, width)
        elif isinstance(segmentation, list):
            counts = from_polygons(segmentation, height, width)
        else:
            raise Flaw("has no segmentation", "objects without a mask")
    except InvalidMask as error:
        raise Flaw(str(error), "objects with a broken mask") from None
    # Of polygons, of which a data set has a million, counting their pixels would take as long as drawing them.
    if counts == nothing(height, width) or (isinstance(segmentation, dict) and not areas([counts], height, width)[0]):
        raise Flaw("has a segmentation that covers no pixel", "masks without a pixel")
    return counts


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) <= _LARGEST_ID


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < _LARGEST_ID and math.isfinite(value)


def _is_below(name: str) -> bool:
    """Whether a path stays in the folder that it is relative to, and can be written in a line."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and printable(name) == name
