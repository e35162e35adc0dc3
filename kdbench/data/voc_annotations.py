"""The files of PASCAL VOC's layout: lists of pictures, annotations in XML, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc.

What is wrong with a file or an object goes to `Broken`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from kdbench.bounded import read_file
from kdbench.data.image_folder import SUFFIXES, Files
from kdbench.data.objects import Broken, Flaw, ObjectList, Objects, check_box
from kdbench.data.pictures import MOST_PIXELS
from kdbench.data.xml_tree import InvalidXML, read_xml
from kdbench.errors import UserError, nearest, printable, shown

PICTURES, ANNOTATIONS, LABELS = "JPEGImages", "Annotations", "SegmentationClass"  # the folders
_LARGEST_LIST = 20_000_000  # bytes of a file with names of pictures


def _listed(root: Path, kind: str, split: str) -> list[str]:
    """Names of a split's pictures, without their suffix."""
    file = root / "ImageSets" / kind / f"{split}.txt"
    try:
        lines = read_file(file, _LARGEST_LIST).decode().splitlines()
    except OSError as error:
        there = [found.stem for found in file.parent.glob("*.txt")]
        hint = nearest(split, there) if there else ""
        raise UserError(f"data voc: {printable(str(file))} can't be read: {error.strerror or error}{hint}") from error
    except UnicodeDecodeError:
        raise UserError(f"data voc: {printable(str(file))} is not a list of names in UTF-8") from None
    names = [words[0] for line in lines if (words := line.split())]
    for name in names:
        if os.sep in name or name.startswith(".") or printable(name) != name:
            raise UserError(f"data voc: {printable(str(file))} lists {shown(name)}, which is no name of a picture")
    if not names:
        raise UserError(f"data voc: {printable(str(file))} lists no pictures")
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"data voc: {printable(str(file))} lists {shown(twice)} twice; list it once")
    return names


def _pictures(root: Path) -> dict[str, str]:
    """Files with pictures by their names without suffix."""
    found = {}
    for name in sorted(os.listdir(root / PICTURES), reverse=True):  # of several files of a picture the first counts
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES and printable(name) == name:
            found[stem] = name
    return found


def segmented(root: Path, split: str, broken: Broken) -> tuple[Files, Files]:
    """Pictures of a split, and the files that label their pixels."""
    there, pictures, labels = _pictures(root), [], []
    for name in _listed(root, "Segmentation", split):
        label = f"{name}.png"
        try:
            if name not in there:
                raise Flaw(f"has no picture: there is no file {name} in {printable(str(root / 'JPEGImages'))}", "labels without a picture")
            if not (root / LABELS / label).is_file():
                raise Flaw(
                    f"has no labels: there is no file {printable(str(root / 'SegmentationClass' / label))}", "pictures without labels"
                )
        except Flaw as flaw:
            broken.found(f"data voc: {split}: {name}", flaw)
            continue
        pictures.append(there[name])
        labels.append(label)
    if not pictures:
        raise UserError(f"data voc: no picture of {split} is in {printable(str(root))}")
    return Files.of(root / PICTURES, pictures), Files.of(root / LABELS, labels)


class SplitObjects:
    """The pictures of a split, their files in JPEGImages, their heights and widths and the objects in them."""

    def __init__(self, root: Path, split: str, classes: Sequence[str], broken: Broken) -> None:
        self.names: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._found, self._broken = ObjectList(), broken
        self._numbers = {name: number for number, name in enumerate(classes)}
        there = _pictures(root)
        for name in _listed(root, "Main", split):
            file = root / ANNOTATIONS / f"{name}.xml"
            try:
                if name not in there:
                    raise Flaw(
                        f"has no picture: there is no file {name} in {printable(str(root / 'JPEGImages'))}", "annotations without a picture"
                    )
                self._add(file, there[name])
            except Flaw as flaw:
                broken.found(f"data voc: {printable(str(file))}", flaw)
        if not self.names:
            raise UserError(f"data voc: no picture of {split} is in {printable(str(root))}")

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [P, 2], height and width of each picture."""
        return np.array(self._sizes, np.int64).reshape(-1, 2)

    @property
    def objects(self) -> Objects:
        return self._found.sorted()

    def _add(self, file: Path, picture: str) -> None:
        try:
            root = read_xml(file)
        except OSError as error:
            raise Flaw(f"can't be read: {error.strerror or error}", "pictures without an annotation") from None
        except InvalidXML as error:
            raise Flaw(str(error), "annotations that are no XML") from None
        size = {side: _number(root.find(f"size/{side}")) for side in ("height", "width")}
        height, width = (0 if number is None or number != int(number) else int(number) for number in size.values())
        if not (height >= 1 and width >= 1 and height * width <= MOST_PIXELS):
            raise Flaw("has no size with a height and a width", "pictures without a size")
        row = len(self.names)
        self.names.append(picture)
        self._sizes.append((height, width))
        for number, element in enumerate(root.findall("object"), 1):
            try:
                self._object(row, element, height, width)
            except Flaw as flaw:
                self._broken.found(f"data voc: {printable(str(file))}: object {number}", flaw)

    def _object(self, row: int, element: Element, height: int, width: int) -> None:
        name = (element.findtext("name") or "").strip()
        if name not in self._numbers:
            raise Flaw(f"has the class {shown(name)}, which the option classes does not name", "objects of an unknown class")
        sides = [_number(element.find(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if None in sides:
            raise Flaw("has no bndbox of xmin, ymin, xmax and ymax", "objects without a box")
        x0, y0, x1, y1 = (float(side) for side in sides if side is not None)
        box = (x0 - 1, y0 - 1, x1, y1)  # pixels are counted from 1, and the last one belongs to the box
        check_box(box, height, width)
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise Flaw(f"has difficult {shown(difficult)}, expected 0 or 1", "objects with a damaged difficult")
        self._found.add(row, self._numbers[name], box, (box[2] - box[0]) * (box[3] - box[1]), difficult == "1")


def _number(element: Element | None) -> float | None:
    """The number that an element holds; None where there is none."""
    try:
        number = float(element.text or "") if element is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e9 else None
