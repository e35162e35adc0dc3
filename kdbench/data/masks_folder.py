"""Folders of pictures and of files that label their pixels, found by patterns and read through a named label map."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.facts import Facts, NotHere
from kdbench.data.frames import PADDING, Colour, Fitting, Frame, InputSize, sides_of
from kdbench.data.image_folder import SUFFIXES, Files
from kdbench.data.label_map import LARGEST_NUMBER, MOST_CLASSES, LabelMap
from kdbench.data.labelled_pixels import labelled_parts
from kdbench.data.named_label_maps import NAMES, named_label_map, own_label_map
from kdbench.data.objects import Broken, Flaw, WhatIfBroken
from kdbench.data.sources import Source
from kdbench.data.views import IGNORED
from kdbench.errors import UserError, first_few, nearest, printable, shown

MapName = Literal["identity", "cityscapes", "ade20k", "camvid", "coco_stuff"]


@dataclass(frozen=True)
class Layout:
    """Where a data set has its files. images, labels: patterns, see `masks_folder`. train, test: names of the parts, of `counts` pictures.

    home: where it can be had.
    """

    images: str
    labels: str
    train: str
    test: str
    counts: tuple[int, int]
    home: str


LAYOUTS = {
    "cityscapes": Layout(
        "leftImg8bit/{part}/*/*_leftImg8bit.png",
        "gtFine/{part}/*/*_gtFine_labelIds.png",
        "train",
        "val",
        (2_975, 500),
        "https://www.cityscapes-dataset.com",
    ),
    "ade20k": Layout(
        "images/{part}/*.jpg", "annotations/{part}/*.png", "training", "validation", (20_210, 2_000), "http://sceneparsing.csail.mit.edu"
    ),
    "camvid": Layout(
        "{part}/*.png", "{part}_labels/*_L.png", "train", "test", (367, 233), "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid"
    ),
    "coco_stuff": Layout(
        "{part}/*.jpg", "stuffthingmaps/{part}/*.png", "train2017", "val2017", (118_287, 5_000), "https://github.com/nightrome/cocostuff"
    ),
}
_OWN = Layout("images/{part}/*", "masks/{part}/*.png", "train", "val", (0, 0), "")


def masks_folder(
    path: Path,
    labels: MapName | dict[int, int] = "identity",
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_CLASSES)] | None = None,
    size: InputSize = 512,
    fitting: Fitting = "letterbox",
    padding: Colour = PADDING,
    images: str | None = None,
    masks: str | None = None,
    train: str | None = None,
    test: str | None = None,
    broken: WhatIfBroken = "refuse",
) -> Source:
    """Colour pictures with a label per pixel, uint8 [N, height, width], from folders of pictures and of label files.

    Args:
        path: The folder of the data set.
        labels: What the pixels of the label files mean.
            cityscapes: the 34 ids of Cityscapes' labelIds files; 19 are learned.
            ade20k: 1 .. 150, less 1; 0 counts nowhere.
            camvid: the colours of CamVid's 32 classes, joined to the 11 that are usual; void counts nowhere.
            coco_stuff: the 182 numbers of COCO-Stuff's pixel maps, of which 171 occur; 255 counts nowhere.
            identity: each number is its class, and 255 counts nowhere. Needs `classes`.
            A mapping of each number that occurs to its class, or to 255 for what counts nowhere. Needs `classes`.
        classes: Names of the classes, in the order of their numbers. Not given with a named map.
        size: Pixels of the input, one number for both sides, or height and width.
        fitting: `letterbox` scales a picture to fit and pads it on the right or below, `stretch` resizes it to the size, `centre` scales it
            to cover the input and cuts off the rest.
        padding: Red, green and blue of the padding. The default is ImageNet's mean, which is about 0 once it is normalised. Labels are 255
            there.
        images: Which pictures, as a path below `path` in which {part} is the part's name and * any name, or a piece of one. By default the
            layout that the data set of the map is published in; of other maps images/{part}/*.
        masks: Where a picture's labels are, with a * for each of `images`. By default as of `images`; of other maps masks/{part}/*.png.
        train: The name of the part to train on.
        test: The name of the part to test on.
        broken: What to do with a picture without labels: `refuse` ends with an error that names it, `drop` leaves it out and counts it.

    Returns:
        The source. A picture is turned by its EXIF tag only if that gives it the size of its labels.

    Raises:
        NotHere: There is no such folder of a data set with a named map.
        UserError: No picture fits the pattern, or one has no labels. A label that the map does not name is found when it is read.
    """
    label_map = _label_map(labels, classes)
    usual = LAYOUTS[labels] if isinstance(labels, str) and labels in LAYOUTS else _OWN
    names = tuple(label_map.classes)
    if not path.is_dir():
        missing = f"data masks_folder: there is no folder {printable(str(path))}"
        if not usual.home:
            raise UserError(missing)
        raise NotHere(
            f"{missing}; get {labels} from {usual.home}, and let path name the folder",
            Facts("masks_folder", len(names), size, IMAGENET_MEAN, IMAGENET_STD, *usual.counts, "labels"),
        )
    dropped, frame = Broken(broken), Frame(sides_of(size), fitting, min(sides_of(size)), padding)
    patterns = images or usual.images, masks or usual.labels
    found = [_pairs(path, *patterns, part, dropped) for part in (train or usual.train, test or usual.test)]
    first, second, read = labelled_parts(found[0], found[1], frame, label_map)
    told = printable(f"{path}: {read}; {dropped.said}")
    return Source("masks_folder", first, second, len(names), names, IMAGENET_MEAN, IMAGENET_STD, IGNORED, read=told)


def _label_map(labels: str | Mapping[int, int], classes: tuple[str, ...] | None) -> LabelMap:
    if isinstance(labels, str) and labels in NAMES:
        if classes is not None:
            raise UserError(f"data masks_folder: labels: {labels} names the classes itself; leave classes out")
        return named_label_map(labels)
    if classes is None:
        raise UserError("data masks_folder: classes must list the names of the classes, or labels name a map: " + ", ".join(NAMES))
    if isinstance(labels, str):
        return own_label_map(None, classes)
    if beyond := sorted({label for label in labels.values() if not 0 <= label < len(classes) and label != IGNORED}):
        raise UserError(f"data masks_folder: labels has the class {beyond[0]}, and classes lists {len(classes)} names")
    if strange := sorted(number for number in labels if not 0 <= number <= LARGEST_NUMBER):
        raise UserError(f"data masks_folder: labels has the number {strange[0]}, expected 0 .. {LARGEST_NUMBER}")
    return own_label_map(dict(labels), classes)


def _pairs(root: Path, images: str, masks: str, part: str, broken: Broken) -> tuple[Files, Files]:
    """The pictures of a part, in the order of their paths, and their labels."""
    places = [_pattern(which, pattern, part) for which, pattern in (("images", images), ("masks", masks))]
    if places[0].count("*") != places[1].count("*"):
        raise UserError(f"data masks_folder: images {shown(images)} and masks {shown(masks)} must have as many * each")
    pictures, labels = list[str](), list[str]()
    for name in _matching(root, places[0]):
        label = _filled(places[1], _stars(places[0], name))
        if not (root / label).is_file():
            flaw = Flaw(f"has no labels: there is no file {printable(str(root / label))}", "pictures without labels")
            broken.found(f"data masks_folder: {printable(str(root / name))}", flaw)
            continue
        pictures.append(name)
        labels.append(label)
    if not pictures:
        there = [entry.name for entry in root.iterdir() if entry.is_dir()]
        first = places[0].split("/")[0]
        hint = nearest(first, there) if "*" not in first and first not in there else f"; it holds {first_few(there)}"
        raise UserError(f"data masks_folder: {printable(str(root))} has no pictures {shown(places[0])}{hint}")
    return Files.of(root, pictures), Files.of(root, labels)


def _pattern(which: str, pattern: str, part: str) -> str:
    """A pattern for one part. Raises UserError where it leads out of its folder."""
    place = pattern.replace("{part}", part)
    if place.startswith("/") or ".." in place.split("/") or printable(place) != place or "*" not in place:
        raise UserError(f"data masks_folder: {which} is {shown(pattern)}, expected a path below `path` with a * for each picture's name")
    return place


def _matching(root: Path, pattern: str) -> list[str]:
    """Paths below `root` that fit a pattern, of pictures, in their order. A * stands for a piece of one name, and no hidden file fits."""
    found = [""]
    for level, piece in enumerate(pattern.split("/")):
        last = level == pattern.count("/")
        fits = re.compile(re.escape(piece).replace(r"\*", ".*"))
        below = list[str]()
        for folder in found:
            try:
                entries = sorted(os.listdir(root / folder)) if "*" in piece else [piece]
            except OSError:
                continue
            for name in entries:
                if not fits.fullmatch(name) or name.startswith(".") or printable(name) != name:
                    continue
                place = os.path.join(folder, name)
                is_picture = os.path.splitext(name)[1].lower() in SUFFIXES and (root / place).is_file()
                if is_picture if last else (root / place).is_dir():
                    below.append(place)
        found = below
    return sorted(found)


def _stars(pattern: str, name: str) -> tuple[str, ...]:
    """What the * of a pattern stand for in a path. Of the last one the suffix of a file is no part."""
    fits = re.compile("".join("([^/]*)" if piece == "*" else re.escape(piece) for piece in re.split(r"(\*)", pattern)))
    match = fits.fullmatch(name)
    assert match is not None, "the path was found by the pattern"
    *rest, last = match.groups()
    return (*rest, os.path.splitext(last)[0] if pattern.endswith("*") else last)


def _filled(pattern: str, stars: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return "".join(piece + star for piece, star in zip(pieces, (*stars, ""), strict=True))
