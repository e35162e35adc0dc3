"""What is known of a data set without its files, and images that stand in for them where only shapes matter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdbench.data.batch import Part
from kdbench.data.sources import Source
from kdbench.errors import UserError

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """side: height and width in pixels. train, test: numbers of images. mean, std: one number a channel, of images in [0, 1]."""

    name: str
    classes: int
    side: int
    mean: Numbers
    std: Numbers
    train: int
    test: int

    def stand_in(self) -> dict[str, Any]:
        """What to write as `data:` for a source of these classes and shapes that needs no files."""
        known = asdict(self)
        return {"name": f"{__name__}:stand_in", **{key: known[key] for key in ("classes", "side", "mean", "std")}}


class NotHere(UserError):
    """The data set is not on this machine. The message says how to get it, `facts` what is known without it.

    downloadable: whether it can be fetched without anybody's help.
    """

    def __init__(self, message: str, facts: Facts, downloadable: bool = False) -> None:
        super().__init__(message)
        self.facts = facts
        self.downloadable = downloadable


def stand_in(classes: int, side: int, mean: Numbers, std: Numbers) -> Source:
    """Noise, an image of each class: what a model or a method is built and timed on where the real images are somewhere else."""
    channels, generator = len(mean), torch.Generator().manual_seed(0)

    def part(first: int) -> Part:
        labels = torch.arange(classes)
        images = torch.randint(256, (1, channels, side, side), generator=generator, dtype=torch.uint8)
        return Part(images.expand(classes, -1, -1, -1), labels, torch.arange(first, first + classes))

    return Source("stand_in", part(0), part(classes), classes, tuple(map(str, range(classes))), mean, std)
