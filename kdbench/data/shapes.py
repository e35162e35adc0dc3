"""Scenes of coloured shapes as a data set, with any of the targets that a scene has: no file is read, and every answer is exact."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Part
from kdbench.data.drawn import Arrays, check_memory, columns_of, put, statistics, tensors_of
from kdbench.data.options import Seed
from kdbench.data.scenes import MOST_IMAGES, draw_at_least
from kdbench.data.shape_targets import TARGETS, ShapesTarget, TargetName
from kdbench.data.sources import Source

_OWN_NUMBERS = 1  # third number of a sample's seed, for what is asked of a scene; the scene itself is drawn from the first two


def shapes(
    train: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 2000,
    test: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 500,
    size: Annotated[int, Field(ge=16, le=1024)] = 32,
    seed: Seed = 0,
    target: TargetName = "mask",
) -> Source:
    """`train` and `test` pictures of `size` x `size` pixels, each a function of `seed` and its index. Up to three objects a picture.

    Args:
        train: Number of training pictures.
        test: Number of test pictures.
        size: Height and width in pixels.
        seed: Another seed gives other pictures.
        target: What is asked. The inputs are the pictures, uint8 [N, 3, size, size], unless other columns are named.
            mask: uint8 [N, size, size], one label per pixel, 0 is the ground.
            class: int64 [N]; these pictures have one object.
            present: uint8 [N, 5], which kinds a picture shows.
            boxes: boxes float32 [N, 3, 4] of x0, y0, x1, y1 in pixels, labels int64 [N, 3]; padded rows are 0 and -1.
            masks: those of boxes, and masks int64 [N, 1, size, size]: bit k of a pixel says that it shows object k.
            keypoints: points float32 [N, 15, 3] of x, y and visible, five an object, with boxes and labels.
            caption: inputs image and tokens int64 [N, 13]; target int64 [N], equal for pictures with equal captions.
            question: inputs image and tokens int64 [N, 6]; target answer int64 [N] and type int64 [N] (`shape_targets.QUESTIONS`).
            relation: inputs image, boxes float32 [N, 2, 4] of subject and object, and tokens int64 [N, 4] of their names; target int64 [N].
                These pictures have two or three objects.

    Raises:
        TooMuch: The pictures do not fit in memory.
    """
    asked = TARGETS[target]
    check_memory("shapes", {"train": train, "test": test}, size, asked.pixel_bytes)
    images, first = _part(seed, range(train), size, asked)
    _, second = _part(seed, range(MOST_IMAGES, MOST_IMAGES + test), size, asked)
    mean, std = statistics(images)
    names = asked.names
    return Source("shapes", first, second, len(names), names, mean, std, asked.ignored, vocabulary=asked.vocabulary)


def _part(seed: int, indices: range, size: int, asked: ShapesTarget) -> tuple[Tensor, Part]:
    """The pictures, and the part that holds them."""
    images = np.empty((len(indices), 3, size, size), np.uint8)
    inputs: Arrays = {}
    target: Arrays = {}
    for row, index in enumerate(indices):
        scene = draw_at_least(asked.least, seed, index, size, asked.most)
        images[row] = scene.image
        further, wanted = asked.of(scene, np.random.Generator(np.random.PCG64([seed, index, _OWN_NUMBERS])))
        put(inputs, row, len(indices), further)
        put(target, row, len(indices), wanted)
    pictures = torch.from_numpy(images)
    shown = {"image": pictures, **tensors_of(inputs)} if inputs else pictures
    return pictures, Part(shown, columns_of(target), torch.arange(indices.start, indices.stop), kinds=asked.kinds)
