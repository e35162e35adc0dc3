"""Objects of pictures as the columns that detection learns from, or as the classes that each picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdbench.data.batch import Part, standing_in
from kdbench.data.encoded import EncodedImages
from kdbench.data.encoded_targets import EncodedMasks, EncodedTarget, groups_of
from kdbench.data.frames import Colour, Frame, WholeFitting
from kdbench.data.image_folder import Files
from kdbench.data.kinds import NO_OBJECT, Boxes, Kind, Masks, Points
from kdbench.data.objects import Objects, ranks_in
from kdbench.data.run_lengths import Runs
from kdbench.errors import UserError

MOST_OF_ONE = 1_000  # rows of objects that a sample may have
_MOST_ROWS = 300_000_000  # of all samples; each takes 33 bytes


@dataclass(frozen=True)
class Pictures:
    """Pictures of one part of a data set and the objects in them.

    sizes: int64 [P, 2], height and width of each. annotated: whether annotations say the sizes, so that they decide which picture is turned
    by its EXIF tag; else all are.
    """

    store: Files
    sizes: NDArray[np.int64]
    objects: Objects
    annotated: bool = True


@dataclass(frozen=True)
class Form:
    """What is made of objects.

    size, fitting, padding: see `Frame`. classes: how many there are. several: whether the target is which classes a picture shows.
    masks: whether objects have masks. points: how views change an object's keypoints. most: rows of objects of a sample, as many as are
    needed where it is None.
    """

    size: int | tuple[int, int]
    fitting: WholeFitting
    padding: Colour
    classes: int
    several: bool = False
    masks: bool = False
    points: Points | None = None
    most: int | None = None


def object_parts(train: Pictures, test: Pictures, form: Form, where: str) -> tuple[Part, Part, str]:
    """Both parts, and in words what they hold.

    where: what an error begins with, such as `data coco: /data/coco`. Raises UserError where a sample would have implausibly many objects.
    """
    sides, cut = (train, test), ""
    found = [side.objects for side in sides]
    most = 1
    if not form.several:
        most = _rows([(len(side.sizes), side.objects) for side in sides], form.most, where)
        found = [objects.largest(most) for objects in found]
        if left := sum(len(side.objects) for side in sides) - sum(map(len, found)):
            cut = f" (without {left:,} beyond the {most} largest of a picture)"
    parts, read = list[Part](), []
    for side, objects, what in zip(sides, found, ("train", "test"), strict=True):
        rows, first = torch.arange(len(side.sizes)), sum(map(len, parts))
        sizes = torch.from_numpy(side.sizes) if side.annotated else None
        images = EncodedImages(side.store, rows, form.size, 0, form.fitting, form.padding, sizes)
        if form.several:
            parts.append(_presence_part(images, objects, form.classes, first))
        else:
            parts.append(_detection_part(images, side.sizes, objects, most, first, form))
        read.append(f"{len(rows):,} pictures with {len(objects):,} objects to {what} on")
    return parts[0], parts[1], f"read {' and '.join(read)}{cut}"


def _detection_part(images: EncodedImages, sizes: NDArray[np.int64], objects: Objects, most: int, first: int, form: Form) -> Part:
    """Pictures with the columns that detection learns from, see `docs/experiment.md`.

    Args:
        images: of all pictures, in a frame that shows all of each.
        sizes: int64 [P, 2], height and width of each.
        objects: of these pictures.
        most: rows of objects that every sample has.
        first: the first sample's position.
        form: whether they have masks or points.
    """
    frame, count = images.frame, len(images)
    scale, shift = _placed(frame, sizes)
    rows, ranks = objects.pictures, ranks_in(objects.pictures)
    boxes, area = np.zeros((count, most, 4), np.float32), np.zeros((count, most), np.float32)
    labels, crowd = np.full((count, most), NO_OBJECT, np.int64), np.zeros((count, most), np.bool_)
    boxes[rows, ranks] = objects.boxes * np.tile(scale[rows], 2) + np.tile(shift[rows], 2)
    labels[rows, ranks], crowd[rows, ranks], area[rows, ranks] = objects.labels, objects.crowd, objects.area
    arrays = {"boxes": boxes, "labels": labels, "crowd": crowd, "area": area}
    arrays |= {"scale": scale.astype(np.float32), "shift": shift.astype(np.float32), "size": sizes}
    kinds: dict[str, Kind] = {"boxes": Boxes()}
    if objects.points is not None and form.points is not None:
        each = objects.points.shape[1]
        placed = np.zeros((count, most, each, 3), np.float32)
        placed[rows, ranks] = _placed_points(objects.points, scale[rows], shift[rows])
        arrays["keypoints"] = placed.reshape(count, most * each, 3)
        pairs = tuple((one + each * k, other + each * k) for k in range(most) for one, other in form.points.pairs)
        kinds["keypoints"] = Points(pairs, form.points.mirrors)
    target: dict[str, Tensor | EncodedTarget] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if form.masks:
        runs = Runs(objects.counts, objects.ends, objects.first(count), sizes)
        target["masks"] = EncodedMasks(runs, torch.arange(count), frame, groups_of(most))
        kinds["masks"] = Masks()
    return Part(images, standing_in(target), torch.arange(first, first + count), kinds=kinds)


def _placed(frame: Frame, sizes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and shift of each picture, x and y, float64 [P, 2]."""
    placements = {(height, width): frame.place(height, width) for height, width in {*map(tuple, sizes.tolist())}}
    each = [placements[height, width] for height, width in sizes.tolist()]
    return np.array([p.scale for p in each]).reshape(-1, 2), np.array([p.shift for p in each]).reshape(-1, 2)


def _placed_points(points: NDArray[np.float32], scale: NDArray[np.float64], shift: NDArray[np.float64]) -> NDArray[np.float32]:
    """Points [T, K, 3] in the input; those that nobody labelled stay zeros."""
    placed = points.astype(np.float64)
    placed[..., :2] = points[..., :2] * scale[:, None] + shift[:, None]
    found: NDArray[np.float32] = np.where(points[..., 2:] > 0, placed, 0).astype(np.float32)
    return found


def _presence_part(images: EncodedImages, objects: Objects, classes: int, first: int) -> Part:
    """Pictures with the classes that each shows, uint8 [N, classes] of 0 and 1; a group counts as its class."""
    shown = np.zeros((len(images), classes), np.uint8)
    shown[objects.pictures, objects.labels] = 1
    return Part(images, torch.from_numpy(shown), torch.arange(first, first + len(images)))


def _rows(parts: Sequence[tuple[int, Objects]], most: int | None, where: str) -> int:
    """How many rows of objects a sample has: `most`, or as many as the picture with most objects needs.

    Args:
        parts: how many pictures there are, and their objects.
        most: what the user asks for.
        where: what an error begins with.

    Raises:
        UserError: there would be implausibly many.
    """
    rows, pictures = most or max(objects.most() for _, objects in parts), sum(count for count, _ in parts)
    if rows > MOST_OF_ONE:
        raise UserError(f"{where}: a picture has {rows:,} objects; set most_objects to at most {MOST_OF_ONE:,}, which keeps the largest")
    if rows * pictures > _MOST_ROWS:
        raise UserError(f"{where}: {pictures:,} pictures with {rows:,} rows of objects each do not fit in memory; set most_objects")
    return rows
