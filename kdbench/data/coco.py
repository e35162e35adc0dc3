"""COCO (Lin et al., arXiv 1405.0312) and data sets annotated like it: boxes, masks, keypoints and several labels a picture, from JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kdbench.data.coco_annotations import Annotations, check_same_categories
from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.data.facts import Facts, NotHere, TargetForm
from kdbench.data.frames import PADDING, Colour, InputSize, WholeFitting
from kdbench.data.image_folder import Files
from kdbench.data.object_parts import MOST_OF_ONE, Form, Pictures, object_parts
from kdbench.data.objects import Broken, WhatIfBroken
from kdbench.data.sources import Source
from kdbench.errors import UserError, nearest, printable, shown

CocoTarget = Literal["boxes", "masks", "keypoints", "multi_label"]

# Of the data set of 2017, which has one category with keypoints.
_TRAIN, _VAL, _CATEGORIES, _KEYPOINTS = 118_287, 5_000, 80, 17
_FORMS: dict[CocoTarget, TargetForm] = {"boxes": "boxes", "masks": "masks", "keypoints": "keypoints", "multi_label": "present"}


def coco(
    path: Path,
    target: CocoTarget = "boxes",
    size: InputSize = 640,
    fitting: WholeFitting = "letterbox",
    padding: Colour = PADDING,
    train: str = "train2017",
    test: str = "val2017",
    train_annotations: str | None = None,
    test_annotations: str | None = None,
    categories: Annotated[tuple[str, ...], Field(min_length=1)] | None = None,
    most_objects: Annotated[int, Field(ge=1, le=MOST_OF_ONE)] | None = None,
    broken: WhatIfBroken = "refuse",
) -> Source:
    """Colour pictures and the objects in them, from files in COCO's layout: <path>/train2017/*, <path>/annotations/*.json.

    Args:
        path: The folder of the data set.
        target: What is asked.
            boxes: boxes float32 [N, M, 4] of x0, y0, x1, y1 in pixels of the input and labels int64 [N, M]; padded rows are 0 and -1.
                crowd bool [N, M], groups that are not learned. area float32 [N, M], of the annotation, in pixels of the picture. scale and
                shift float32 [N, 2] of x and y: a position in the input is one in the picture, times scale, plus shift. size int64 [N, 2],
                height and width of the picture.
            masks: these and masks int64 [N, G, height, width]: bit k of group g is object 63 g + k. Drawn when they are asked for.
            keypoints: those of boxes and keypoints float32 [N, M * K, 3] of x, y and COCO's visibility, 0 for a point without a label.
            multi_label: uint8 [N, categories], which categories a picture shows.
        size: Pixels of the input, one number for both sides, or height and width.
        fitting: `letterbox` scales a picture to fit and pads it on the right or below, `stretch` resizes it to the size.
        padding: Red, green and blue of the padding. The default is ImageNet's mean, which is about 0 once it is normalised.
        train: The folder of the pictures to train on, below `path` or `path`/images.
        test: The folder of the pictures to test on.
        train_annotations: The file for `train`, below `path`. By default annotations/instances_<train>.json, of keypoints
            annotations/person_keypoints_<train>.json.
        test_annotations: The file for `test`.
        categories: Names of the categories that are learned; all by default, in the order of their ids.
        most_objects: Rows of objects of every sample. A picture with more keeps the largest. As many as are needed by default.
        broken: What to do with a broken annotation: `refuse` ends with an error that names it, `drop` leaves it out and counts it.

    Returns:
        The source. `class_ids` are the categories' ids. A picture is turned by its EXIF tag only if its annotated size says so.

    Raises:
        NotHere: There is no such folder.
        UserError: A file is missing or not in this format, or an annotation is broken.
    """
    if not path.is_dir():
        points = _KEYPOINTS if target == "keypoints" else 0
        known = (1 if target == "keypoints" else _CATEGORIES) if categories is None else len(categories)
        raise NotHere(
            f"data coco: there is no folder {printable(str(path))}; get COCO from https://cocodataset.org/#download, with the pictures in "
            f"{train} and {test} and the annotations in annotations, and let path name the folder",
            Facts("coco", known, size, IMAGENET_MEAN, IMAGENET_STD, _TRAIN, _VAL, _FORMS[target], points),
        )
    kind = "person_keypoints" if target == "keypoints" else "instances"
    dropped = Broken(broken)
    sides = []
    for folder, given in ((train, train_annotations), (test, test_annotations)):
        file = _file(path, given or f"annotations/{kind}_{folder}.json", f"{folder}_annotations" if given else "")
        sides.append(Annotations(file, _folder(path, folder), target, dropped))
    check_same_categories(*sides)
    classes = _chosen(sides[0], categories)
    found = [side.objects(classes) for side in sides]
    pictures = [
        Pictures(Files(side.folder, tuple(side.names), tuple(side.nbytes)), side.sizes_of_pictures, objects)
        for side, objects in zip(sides, found, strict=True)
    ]
    points_of = sides[0].points(classes) if target == "keypoints" else None
    form = Form(size, fitting, padding, len(classes), target == "multi_label", target == "masks", points_of, most_objects)
    first, second, read = object_parts(pictures[0], pictures[1], form, f"data coco: {printable(str(path))}")
    told, names = printable(f"{path}: {read}; {dropped.said}"), tuple(classes.values())
    return Source("coco", first, second, len(names), names, IMAGENET_MEAN, IMAGENET_STD, read=told, class_ids=tuple(classes))


def _folder(path: Path, name: str) -> Path:
    for folder in (path / name, path / "images" / name):
        if folder.is_dir():
            return folder
    there = sorted({entry.name for parent in (path, path / "images") if parent.is_dir() for entry in parent.iterdir() if entry.is_dir()})
    raise UserError(f"data coco: {printable(str(path))} has no folder {shown(name)} of pictures{nearest(name, there)}")


def _file(path: Path, name: str, option: str) -> Path:
    """The file with annotations. option: which one named it; empty for the usual name."""
    file = path / name
    if file.is_file():
        return file
    there = sorted(str(found.relative_to(path)) for found in file.parent.glob("*.json")) if file.parent.is_dir() else []
    hint = nearest(name, there) if there else ""
    raise UserError(
        f"data coco: there is no file {printable(str(file))}{hint}"
        + ("" if option else ". train_annotations and test_annotations name others")
    )


def _chosen(side: Annotations, categories: tuple[str, ...] | None) -> dict[int, str]:
    """Names of the classes by their ids, in the order in which they are numbered."""
    names = {number: category.name for number, category in sorted(side.categories.items())}
    if categories is None:
        return names
    for name in categories:
        if name not in names.values():
            raise UserError(f"data coco: {side.where} has no category {shown(name)}{nearest(name, names.values())}")
    if len(set(categories)) != len(categories):
        raise UserError("data coco: categories lists a name twice; list it once")
    return {number: name for number, name in names.items() if name in categories}
