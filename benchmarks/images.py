"""Random images of any size, number and classes: what the speed of a step is measured on. Named by dotted path in the benchmark's tasks."""

from __future__ import annotations

import torch

from kdbench.data.batch import Part
from kdbench.data.sources import Source


def random_images(train: int = 1024, test: int = 128, size: int = 32, channels: int = 3, classes: int = 10, seed: int = 0) -> Source:
    """`train` and `test` images [channels, size, size] of noise; labels go round the classes, so that every class has its share."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (train + test, channels, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(train + test) % classes
    positions = torch.arange(train + test)
    parts = [Part(images[rows], labels[rows], positions[rows]) for rows in (slice(0, train), slice(train, None))]
    names = tuple(str(number) for number in range(classes))
    return Source("random_images", parts[0], parts[1], classes, names, (0.5,) * channels, (0.25,) * channels)


RANDOM_IMAGES = f"{__name__}:{random_images.__name__}"
