"""PASCAL VOC (Everingham et al., IJCV 2010) and data sets in its layout: boxes from XML, labels per pixel from PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdbench.data.batch import Part
from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.facts import Facts, NotHere, TargetForm
from kdbench.data.frames import PADDING, Colour, Fitting, Frame, InputSize, sides_of
from kdbench.data.image_folder import Files
from kdbench.data.label_map import LabelMap
from kdbench.data.labelled_pixels import labelled_parts
from kdbench.data.object_parts import MOST_OF_ONE, Form, Pictures, object_parts
from kdbench.data.objects import Broken, WhatIfBroken
from kdbench.data.sources import Source
from kdbench.data.views import IGNORED
from kdbench.data.voc_annotations import LABELS, PICTURES, SplitObjects, segmented
from kdbench.errors import UserError, printable

VocTarget = Literal["boxes", "segmentation", "multi_label"]

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_COUNTS = {"segmentation": (1_464, 1_449)}  # training and validation pictures of 2012; of boxes 5,717 and 5,823
_FORMS: dict[VocTarget, TargetForm] = {"boxes": "boxes", "segmentation": "labels", "multi_label": "present"}


def voc(
    path: Path,
    target: VocTarget = "boxes",
    size: InputSize = 512,
    fitting: Fitting = "letterbox",
    padding: Colour = PADDING,
    year: str = "2012",
    train: str = "train",
    test: str = "val",
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=254)] = CLASSES,
    most_objects: Annotated[int, Field(ge=1, le=MOST_OF_ONE)] | None = None,
    broken: WhatIfBroken = "refuse",
) -> Source:
    """Colour pictures from files in PASCAL VOC's layout: JPEGImages, Annotations, ImageSets, SegmentationClass.

    Args:
        path: The folder with JPEGImages in it, or one that holds VOC<year> or VOCdevkit/VOC<year>.
        target: What is asked.
            boxes: the columns of `coco`. A difficult object is one of its `crowd`: it is not learned, and not counted where it is missed.
                A box of VOC counts pixels from 1 and includes the last one; here it is x0 = xmin - 1, x1 = xmax.
            segmentation: uint8 [N, height, width], 0 for the background, then the classes. The border, 255, counts nowhere.
            multi_label: uint8 [N, classes], which classes a picture shows, difficult objects too.
        size: Pixels of the input, one number for both sides, or height and width.
        fitting: `letterbox` scales a picture to fit and pads it on the right or below, `stretch` resizes it to the size. `centre`, of
            segmentation alone, cuts off what does not fit.
        padding: Red, green and blue of the padding. The default is ImageNet's mean, which is about 0 once it is normalised.
        year: Which year's folder is looked for.
        train: The list of pictures to train on, in ImageSets/Main or, of segmentation, ImageSets/Segmentation.
        test: The list of pictures to test on.
        classes: Names of the classes, without the background.
        most_objects: Rows of objects of every sample. A picture with more keeps the largest. As many as are needed by default.
        broken: What to do with a broken annotation: `refuse` ends with an error that names it, `drop` leaves it out and counts it.

    Returns:
        The source. A picture is turned by its EXIF tag only if its annotated size says so.

    Raises:
        NotHere: There is no such folder.
        UserError: A file is missing or not in this format, or an annotation is broken.
    """
    if target != "segmentation" and fitting == "centre":
        raise UserError("data voc: fitting: centre is of target: segmentation, since it would cut boxes off; use letterbox or stretch")
    root = _root(path, year, target, size, len(classes))
    dropped = Broken(broken)
    ignored = None
    if target == "segmentation":
        frame = Frame(sides_of(size), fitting, min(sides_of(size)), padding)
        first, second, read = _labelled(root, (train, test), frame, classes, dropped)
        classes, ignored = ("background", *classes), IGNORED
    else:
        assert fitting != "centre", "it is refused above"
        sides = [SplitObjects(root, split, classes, dropped) for split in (train, test)]
        pictures = [Pictures(Files.of(root / PICTURES, side.names), side.sizes, side.objects) for side in sides]
        form = Form(size, fitting, padding, len(classes), target == "multi_label", most=most_objects)
        first, second, read = object_parts(pictures[0], pictures[1], form, f"data voc: {printable(str(path))}")
    told = printable(f"{root}: {read}; {dropped.said}")
    return Source("voc", first, second, len(classes), classes, IMAGENET_MEAN, IMAGENET_STD, ignored, read=told)


def _labelled(root: Path, splits: tuple[str, str], frame: Frame, classes: tuple[str, ...], broken: Broken) -> tuple[Part, Part, str]:
    """Both parts of a segmentation, and in words what they hold."""
    label_map = LabelMap(
        "voc",
        ("background", *classes),
        {**{number: number for number in range(len(classes) + 1)}, IGNORED: IGNORED},
        way_out=f"{LABELS} must hold numbers of classes, as palette indices or bytes, and {IGNORED}; option classes names others",
    )
    train, test = (segmented(root, split, broken) for split in splits)
    return labelled_parts(train, test, frame, label_map)


def _root(path: Path, year: str, target: VocTarget, size: int | tuple[int, int], classes: int) -> Path:
    for folder in (path, path / f"VOC{year}", path / "VOCdevkit" / f"VOC{year}"):
        if (folder / PICTURES).is_dir():
            return folder
    if path.is_dir():
        raise UserError(f"data voc: {printable(str(path))} holds neither {PICTURES} nor VOC{year} nor VOCdevkit/VOC{year}")
    train, test = _COUNTS.get(target, (5_717, 5_823))
    raise NotHere(
        f"data voc: there is no folder {printable(str(path))}; get VOC{year} from http://host.robots.ox.ac.uk/pascal/VOC, and let path "
        "name the folder with VOCdevkit in it",
        Facts("voc", classes + (target == "segmentation"), size, IMAGENET_MEAN, IMAGENET_STD, train, test, _FORMS[target]),
    )
