"""Scenes of coloured shapes as a data set, with any of the targets that a scene has: no file is read, and every answer is exact."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kdbench.data.batch import Part
from kdbench.data.columns import Columns
from kdbench.data.options import Seed
from kdbench.data.scenes import MOST_IMAGES, draw_at_least
from kdbench.data.shape_targets import TARGETS, Arrays, ShapesTarget, TargetName
from kdbench.data.sources import Source
from kdbench.errors import TooMuch
from kdbench.own_code import are_from_records

_MOST_BYTES_OF_RECORD = 300_000_000
_MOST_BYTES = 32e9  # of all pictures and masks, which lie in memory
_PIXEL_BYTES = 4  # three colours and a class
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
            keypoints: points float32 [N, 15, 3] of x, y and visible, five an object, with boxes and labels.
            caption: inputs image and tokens int64 [N, 13]; target int64 [N], equal for pictures with equal captions.
            question: inputs image and tokens int64 [N, 6]; target answer int64 [N] and type int64 [N] (`shape_targets.QUESTIONS`).
            relation: inputs image, boxes float32 [N, 2, 4] of subject and object, and tokens int64 [N, 4] of their names; target int64 [N].
                These pictures have two or three objects.

    Raises:
        TooMuch: The pictures do not fit in memory.
    """
    nbytes, most_bytes = (train + test) * size * size * _PIXEL_BYTES, _MOST_BYTES_OF_RECORD if are_from_records() else _MOST_BYTES
    if nbytes > most_bytes:
        raise TooMuch(
            f"data shapes: {train + test} images of {size}x{size} take {nbytes / 1e9:.0f} GB; lower train, test or size, "
            f"to at most {most_bytes / 1e9:g} GB"
        )
    asked = TARGETS[target]
    images, first = _part(seed, range(train), size, asked)
    _, second = _part(seed, range(MOST_IMAGES, MOST_IMAGES + test), size, asked)
    mean, std = _statistics(images)
    names = asked.names
    return Source("shapes", first, second, len(names), names, mean, std, asked.ignored, vocabulary=asked.vocabulary)


def _part(seed: int, indices: range, size: int, asked: ShapesTarget) -> tuple[Tensor, Part]:
    """The pictures, and the part that holds them."""
    images = np.empty((len(indices), 3, size, size), np.uint8)
    inputs: dict[str, NDArray[Any]] = {}
    target: dict[str, NDArray[Any]] = {}
    for row, index in enumerate(indices):
        scene = draw_at_least(asked.least, seed, index, size, asked.most)
        images[row] = scene.image
        further, wanted = asked.of(scene, np.random.Generator(np.random.PCG64([seed, index, _OWN_NUMBERS])))
        _put(inputs, row, len(indices), further)
        _put(target, row, len(indices), wanted)
    pictures = torch.from_numpy(images)
    shown = {"image": pictures, **_tensors(inputs)} if inputs else pictures
    return pictures, Part(shown, _columns(target), torch.arange(indices.start, indices.stop), kinds=asked.kinds)


def _put(columns: dict[str, NDArray[Any]], row: int, rows: int, sample: Arrays) -> None:
    """Write one sample to its row; the first sample says which columns there are."""
    for name, values in sample.items():
        if name not in columns:
            columns[name] = np.empty((rows, *values.shape), values.dtype)
        columns[name][row] = values


def _columns(arrays: dict[str, NDArray[Any]]) -> Columns:
    tensors = _tensors(arrays)
    return tensors.get("", tensors)


def _tensors(arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], from whole numbers: exact, so the same on every machine."""
    values = torch.arange(256)
    counts = [torch.bincount(images[:, channel].flatten().long(), minlength=256) for channel in range(images.shape[1])]
    means = [int((count * values).sum()) / int(count.sum()) for count in counts]
    squares = [int((count * values * values).sum()) / int(count.sum()) for count in counts]
    deviations = [math.sqrt(square - mean * mean) for square, mean in zip(squares, means, strict=True)]
    return tuple(round(mean / 255, 4) for mean in means), tuple(round(deviation / 255, 4) for deviation in deviations)
