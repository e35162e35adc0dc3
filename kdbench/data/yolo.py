"""Boxes in text files beside the pictures, as YOLO's trainers read them: a line an object, in shares of the picture's width and height.

The format: https://docs.ultralytics.com/datasets/detect. A file data.yaml names the classes and the folders.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from kdbench import yaml12
from kdbench.bounded import read_file
from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.frames import PADDING, Colour, InputSize, WholeFitting
from kdbench.data.image_folder import SUFFIXES, Files
from kdbench.data.labelled_pixels import sizes_in_headers
from kdbench.data.object_parts import MOST_OF_ONE, Form, Pictures, object_parts
from kdbench.data.objects import Broken, Flaw, ObjectList, WhatIfBroken, check_box
from kdbench.data.sources import Source
from kdbench.errors import UserError, cut, nearest, printable, shown

_LARGEST_LABELS = 10_000_000  # bytes of a file
_LARGEST_LIST = 100_000_000  # bytes of a file with paths of pictures
_MOST_CLASSES = 100_000
_BOX, _POLYGON = 5, 7  # numbers of a line with a box, and the fewest of one with a polygon: a class, then pairs


def yolo(
    path: Path,
    target: Literal["boxes", "multi_label"] = "boxes",
    size: InputSize = 640,
    fitting: WholeFitting = "letterbox",
    padding: Colour = PADDING,
    train: str = "train",
    test: str = "val",
    most_objects: Annotated[int, Field(ge=1, le=MOST_OF_ONE)] | None = None,
    broken: WhatIfBroken = "refuse",
) -> Source:
    """Colour pictures with boxes from text files: images/train/x.jpg has its objects in labels/train/x.txt, data.yaml names the classes.

    Args:
        path: The folder with data.yaml, or a file in its form. Everything else lies below its folder.
        target: What is asked: `boxes`, the columns of `coco`, or `multi_label`, uint8 [N, classes], which classes a picture shows.
        size: Pixels of the input, one number for both sides, or height and width.
        fitting: `letterbox` scales a picture to fit and pads it on the right or below, `stretch` resizes it to the size.
        padding: Red, green and blue of the padding. The default is ImageNet's mean, which is about 0 once it is normalised.
        train: The key of data.yaml that names the pictures to train on: a folder, a file that lists pictures, or several of them.
        test: The key that names the pictures to test on.
        most_objects: Rows of objects of every sample. A picture with more keeps the largest. As many as are needed by default.
        broken: What to do with a broken line: `refuse` ends with an error that names it, `drop` leaves it out and counts it.

    Returns:
        The source. Pictures are turned upright by their EXIF tag, as those who draw boxes see them. A picture without a label file has no
        object. A line with a polygon counts as the box around it.

    Raises:
        UserError: data.yaml or a folder is missing, or a line is broken.
    """
    file = path if path.is_file() else path / "data.yaml"
    said = _read_yaml(file)
    classes = _classes(said, printable(str(file)))
    dropped = Broken(broken)
    first_side, second_side = (_pictures(file, said, key, len(classes), dropped) for key in (train, test))
    form = Form(size, fitting, padding, len(classes), target == "multi_label", most=most_objects)
    first, second, read = object_parts(first_side, second_side, form, f"data yolo: {printable(str(path))}")
    told = printable(f"{file}: {read}; {dropped.said}")
    return Source("yolo", first, second, len(classes), classes, IMAGENET_MEAN, IMAGENET_STD, read=told)


def _read_yaml(file: Path) -> Mapping[str, Any]:
    where = printable(str(file))
    try:
        said = yaml12.load(read_file(file, yaml12.LONGEST).decode())
    except OSError as error:
        there = [found.name for found in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        hint = nearest(file.name, there) + " path may name the file" if there else ""
        raise UserError(f"data yolo: {where} can't be read: {error.strerror or error}{hint}") from error
    except UnicodeDecodeError:
        raise UserError(f"data yolo: {where} is not UTF-8") from None
    except yaml12.InvalidYAML as error:
        raise UserError(f"data yolo: {where}: {error}") from None
    if not isinstance(said, Mapping):
        raise UserError(f"data yolo: {where} must have the keys names, train and val")
    return said


def _classes(said: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names of the classes, in their order."""
    names = said.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names or len(names) > _MOST_CLASSES:
        raise UserError(f"data yolo: {where} must list the classes: `names: [cat, dog]`, or `names: {{0: cat, 1: dog}}`")
    for number in range(len(names)):
        if number not in names:
            raise UserError(f"data yolo: {where}: names must number the classes from 0 without a gap, and {number} is missing")
    if (count := said.get("nc", len(names))) != len(names):
        raise UserError(f"data yolo: {where}: nc is {shown(count)}, and names lists {len(names)} classes")
    return tuple(printable(cut(str(names[number]))) for number in range(len(names)))


def _pictures(file: Path, said: Mapping[str, Any], key: str, classes: int, broken: Broken) -> Pictures:
    """The pictures that a key of data.yaml names, and the objects in them."""
    root = file.parent
    names = _sound(root, _names(file, said, key), broken)
    store = Files.of(root, names)
    sizes, found, without = sizes_in_headers(store), ObjectList(), 0
    for row, name in enumerate(names):
        labels = root / _labels_of(name)
        if not os.path.lexists(labels):
            without += 1
            continue
        _add_lines(found, row, labels, sizes[row], classes, broken)
    if without == len(names):
        raise UserError(
            f"data yolo: no picture of {key} has a label file; {printable(str(root / names[0]))} would have "
            f"{printable(str(root / _labels_of(names[0])))}"
        )
    return Pictures(store, np.array(sizes, np.int64).reshape(-1, 2), found.sorted(), annotated=False)


def _sound(root: Path, names: Sequence[str], broken: Broken) -> list[str]:
    """Those pictures that are there."""
    sound = []
    for name in names:
        if (root / name).is_file():
            sound.append(name)
        else:
            flaw = Flaw("is listed, and there is no such file", "pictures without a file")
            broken.found(f"data yolo: {printable(str(root / name))}", flaw)
    if not sound:
        raise UserError(f"data yolo: {printable(str(root))} holds no pictures ending in {', '.join(SUFFIXES)}")
    return sound


def _names(file: Path, said: Mapping[str, Any], key: str) -> list[str]:
    """Paths of the pictures of a key below the folder of `file`, in their order."""
    where = f"data yolo: {printable(str(file))}"
    if key not in said:
        raise UserError(f"{where} has no key {shown(key)}{nearest(key, map(str, said))}")
    given = said[key] if isinstance(said[key], list) else [said[key]]
    found: list[str] = []
    for entry in given:
        if not isinstance(entry, str) or not entry:
            raise UserError(f"{where}: {key} is {shown(entry)}, expected a folder or a file that lists pictures")
        place = _below(file.parent, said.get("path"), entry)
        if place is None:
            raise UserError(f"{where}: {key} is {shown(entry)}, which is neither a folder nor a file below {printable(str(file.parent))}")
        if (file.parent / place).is_dir():
            found += _in_folder(file.parent, place)
        else:
            found += _in_list(file.parent, place)
    if twice := len(found) - len(set(found)):
        raise UserError(f"{where}: {key} lists {twice} pictures twice; list each once")
    return found


def _below(root: Path, beneath: Any, entry: str) -> str | None:
    """The path of an entry below `root`, None where there is none.

    `path` of data.yaml is often a folder on the machine of whoever wrote it, and entries of exported data sets begin with `../` though they
    lie beside the file. So an entry is looked for beneath `path` and without it, and never outside of `root`.
    """
    parts = [part for part in PurePosixPath(entry).parts if part not in ("..", "/")]
    folders = [PurePosixPath(beneath)] if isinstance(beneath, str) else []
    for folder in [*folders, PurePosixPath()]:
        if folder.is_absolute() or ".." in folder.parts:
            continue
        place = folder.joinpath(*parts)
        if (root / place).exists():
            return str(place)
    return None


def _in_folder(root: Path, folder: str) -> list[str]:
    """Pictures in a folder and the folders inside it, in the order of their paths."""
    found = list[str]()
    for place, folders, files in os.walk(root / folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."))
        found += (os.path.relpath(os.path.join(place, name), root) for name in pictures if printable(name) == name)
    return sorted(found)


def _in_list(root: Path, file: str) -> list[str]:
    """Pictures that a text file lists, a path a line."""
    where = printable(str(root / file))
    try:
        lines = read_file(root / file, _LARGEST_LIST).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data yolo: {where} can't be read as a list of pictures: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for line in filter(None, map(str.strip, lines)):
        place = PurePosixPath(line)
        if place.is_absolute() or ".." in place.parts or printable(line) != line:
            raise UserError(f"data yolo: {where} lists {shown(line)}, which is no path below {printable(str(root))}")
        found.append(str(place))
    return found


def _labels_of(name: str) -> str:
    """Where the objects of a picture are: images/a/x.jpg has labels/a/x.txt, and a picture in no folder `images` has them beside it."""
    folders = list(PurePosixPath(name).parts[:-1])
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return str(PurePosixPath(*folders, PurePosixPath(name).stem + ".txt"))


def _add_lines(found: ObjectList, row: int, file: Path, size: tuple[int, int], classes: int, broken: Broken) -> None:
    """Read the objects of one picture. size: its height and width."""
    where = f"data yolo: {printable(str(file))}"
    try:
        lines = read_file(file, _LARGEST_LABELS).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        flaw = Flaw(f"can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}", "label files that can't be read")
        return broken.found(where, flaw)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, box = _object(line, size, classes)
        except Flaw as flaw:
            broken.found(f"{where}: line {number}", flaw)
            continue
        found.add(row, label, box, (box[2] - box[0]) * (box[3] - box[1]))
    return None


def _object(line: str, size: tuple[int, int], classes: int) -> tuple[int, tuple[float, float, float, float]]:
    """The class and the box, x0, y0, x1, y1 in pixels, of a line. size: height and width of the picture."""
    try:
        first, *numbers = map(float, line.split())
    except ValueError:
        raise Flaw(f"is {shown(line)}, which is no list of numbers", _NO_OBJECT) from None
    if 1 + len(numbers) != _BOX and (1 + len(numbers) < _POLYGON or len(numbers) % 2):
        raise Flaw(
            f"has {1 + len(numbers)} numbers, expected a class and x, y, width and height, or a class and the x, y of three points or more",
            _NO_OBJECT,
        )
    if not all(map(math.isfinite, (first, *numbers))):
        raise Flaw(f"is {shown(line)}, in which a number is not finite", _NO_OBJECT)
    if not (first.is_integer() and 0 <= first < classes):
        raise Flaw(f"has the class {first:g}, expected a whole number from 0 to {classes - 1}", "objects of an unknown class")
    height, width = size
    if 1 + len(numbers) == _BOX:
        x, y, wide, high = numbers
        shares = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    else:
        shares = (min(numbers[0::2]), min(numbers[1::2]), max(numbers[0::2]), max(numbers[1::2]))
    box = (shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height)
    check_box(box, height, width)
    return int(first), box


_NO_OBJECT = "lines that are no object"
