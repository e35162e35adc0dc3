"""What is known of a data set without its files, and images that stand in for them where only shapes matter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdbench.data.batch import Part
from kdbench.data.sources import Source
from kdbench.errors import UserError

Numbers = tuple[float, ...]
_EACH_CLASS = 2  # images of a class in each part of a stand-in, so that a validation part can be cut


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
    """The data set is not on this machine. The message says how to get it, `facts` what is known without it."""

    def __init__(self, message: str, facts: Facts) -> None:
        super().__init__(message)
        self.facts = facts


def stand_in(classes: int, side: int, mean: Numbers, std: Numbers) -> Source:
    """Noise, a few images a class: what a model or a method is built and timed on where the real images are somewhere else."""
    channels, generator = len(mean), torch.Generator().manual_seed(0)

    def part(first: int) -> Part:
        labels = torch.arange(classes).repeat(_EACH_CLASS)
        images = torch.randint(256, (1, channels, side, side), generator=generator, dtype=torch.uint8)
        return Part(images.expand(len(labels), -1, -1, -1), labels, torch.arange(first, first + len(labels)))

    return Source("stand_in", part(0), part(_EACH_CLASS * classes), classes, tuple(map(str, range(classes))), mean, std)
