"""What is known of a data set without its files, and images that stand in for them where only shapes matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdbench.data.batch import Part
from kdbench.data.columns import Columns
from kdbench.data.frames import sides_of
from kdbench.data.kinds import NO_OBJECT, Boxes, Kind, Masks, Points
from kdbench.data.sources import Source
from kdbench.data.views import IGNORED
from kdbench.errors import UserError

Numbers = tuple[float, ...]
# What a sample's target is: its class, which classes it shows, a class for each pixel, or objects by boxes and what else is known of them.
TargetForm = Literal["class", "present", "labels", "boxes", "masks", "keypoints"]

_OBJECTS = 20  # rows of a stand-in's sample, of which one holds an object


@dataclass(frozen=True)
class Facts:
    """side: pixels of both sides, or height and width. train, test: numbers of images.

    mean, std: one number a channel, of images in [0, 1]. target: the form of the target. points: keypoints of an object.
    """

    name: str
    classes: int
    side: int | tuple[int, int]
    mean: Numbers
    std: Numbers
    train: int
    test: int
    target: TargetForm = "class"
    points: int = 0

    def stand_in(self) -> dict[str, Any]:
        """What to write as `data:` for a source of these classes and shapes that needs no files."""
        known = asdict(self)
        form = {key: known[key] for key in ("target", "points")} if self.target != "class" else {}
        return {"name": f"{__name__}:stand_in", **{key: known[key] for key in ("classes", "side", "mean", "std")}, **form}


class NotHere(UserError):
    """The data set is not on this machine. The message says how to get it, `facts` what is known without it.

    downloadable: whether it can be fetched without anybody's help.
    """

    def __init__(self, message: str, facts: Facts, downloadable: bool = False) -> None:
        super().__init__(message)
        self.facts = facts
        self.downloadable = downloadable


def stand_in(
    classes: int, side: int | tuple[int, int], mean: Numbers, std: Numbers, target: TargetForm = "class", points: int = 0
) -> Source:
    """Noise, an image of each class: what a model or a method is built and timed on where the real images are somewhere else."""
    channels, generator, sides = len(mean), torch.Generator().manual_seed(0), sides_of(side)

    def part(first: int) -> Part:
        images = torch.randint(256, (1, channels, *sides), generator=generator, dtype=torch.uint8)
        columns, kinds = _TARGETS[target](classes, sides, points)
        return Part(images.expand(classes, -1, -1, -1), columns, torch.arange(first, first + classes), kinds=kinds)

    ignored = IGNORED if target == "labels" else None
    return Source("stand_in", part(0), part(classes), classes, tuple(map(str, range(classes))), mean, std, ignored)


_Target = tuple[Columns, dict[str, Kind]]


def _class(classes: int, sides: tuple[int, int], points: int) -> _Target:
    return torch.arange(classes), {}


def _present(classes: int, sides: tuple[int, int], points: int) -> _Target:
    return torch.eye(classes, dtype=torch.uint8), {}


def _labels(classes: int, sides: tuple[int, int], points: int) -> _Target:
    """Every class occurs in each picture that has room for it."""
    labels = (torch.arange(sides[0] * sides[1]) % classes).byte().view(1, *sides)
    return labels.expand(classes, -1, -1), {}


def _boxes(classes: int, sides: tuple[int, int], points: int) -> _Target:
    """One object in the middle of each picture, half as high and wide."""
    height, width = sides
    boxes, labels = torch.zeros(classes, _OBJECTS, 4), torch.full((classes, _OBJECTS), NO_OBJECT)
    boxes[:, 0] = torch.tensor([width / 4, height / 4, width * 3 / 4, height * 3 / 4])
    labels[:, 0] = torch.arange(classes)
    columns: dict[str, Tensor] = {
        "boxes": boxes,
        "labels": labels,
        "crowd": torch.zeros(classes, _OBJECTS, dtype=torch.bool),
        "area": (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]),
        "scale": torch.ones(classes, 2),
        "shift": torch.zeros(classes, 2),
        "size": torch.tensor(sides).repeat(classes, 1),
    }
    return columns, {"boxes": Boxes()}


def _masks(classes: int, sides: tuple[int, int], points: int) -> _Target:
    columns, kinds = _boxes(classes, sides, points)
    assert isinstance(columns, dict)
    masks = torch.zeros(1, 1, *sides, dtype=torch.int64)
    masks[..., sides[0] // 4 : sides[0] * 3 // 4, sides[1] // 4 : sides[1] * 3 // 4] = 1
    return {**columns, "masks": masks.expand(classes, -1, -1, -1)}, {**kinds, "masks": Masks()}


def _keypoints(classes: int, sides: tuple[int, int], points: int) -> _Target:
    columns, kinds = _boxes(classes, sides, points)
    assert isinstance(columns, dict)
    keypoints = torch.zeros(classes, _OBJECTS, points, 3)
    keypoints[:, 0] = torch.tensor([sides[1] / 2, sides[0] / 2, 2.0])
    return {**columns, "keypoints": keypoints.flatten(1, 2)}, {**kinds, "keypoints": Points()}


_TARGETS: dict[TargetForm, Callable[[int, tuple[int, int], int], _Target]] = {
    "class": _class,
    "present": _present,
    "labels": _labels,
    "boxes": _boxes,
    "masks": _masks,
    "keypoints": _keypoints,
}
