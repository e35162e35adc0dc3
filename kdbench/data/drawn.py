"""What data sets of drawn scenes share: samples that are written row by row, the memory that they take, mean and deviation of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdbench.data.columns import Columns
from kdbench.errors import TooMuch
from kdbench.own_code import are_from_records

Arrays = dict[str, NDArray[Any]]  # of one sample or of all, by name; a lone target has the name ""

_MOST_BYTES_OF_RECORD = 300_000_000
_MOST_BYTES = 32e9  # of all pictures and masks, which lie in memory
PIXEL_BYTES = 4  # three colours and a class


def check_memory(name: str, images: Mapping[str, int], size: int, pixel_bytes: int = PIXEL_BYTES) -> None:
    """Raise TooMuch where so many pictures of `size` x `size` pixels do not fit in memory.

    name: of the data set. images: how many of each option. pixel_bytes: of a picture and its target.
    """
    count, most = sum(images.values()), _MOST_BYTES_OF_RECORD if are_from_records() else _MOST_BYTES
    if (nbytes := count * size * size * pixel_bytes) > most:
        raise TooMuch(
            f"data {name}: {count} images of {size}x{size} take {nbytes / 1e9:.0f} GB; lower {', '.join(images)} or size, "
            f"to at most {most / 1e9:g} GB"
        )


def put(columns: Arrays, row: int, rows: int, sample: Arrays) -> None:
    """Write one sample to its row; the first sample says which columns there are."""
    for name, values in sample.items():
        if name not in columns:
            columns[name] = np.empty((rows, *values.shape), values.dtype)
        columns[name][row] = values


def columns_of(arrays: Arrays) -> Columns:
    """The arrays as tensors; a lone one with the name "" as a tensor alone."""
    tensors = tensors_of(arrays)
    return tensors.get("", tensors)


def tensors_of(arrays: Arrays) -> dict[str, Tensor]:
    """The arrays as tensors on the same memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], from whole numbers: exact, so the same on every machine."""
    values = torch.arange(256)
    counts = [torch.bincount(images[:, channel].flatten().long(), minlength=256) for channel in range(images.shape[1])]
    means = [int((count * values).sum()) / int(count.sum()) for count in counts]
    squares = [int((count * values * values).sum()) / int(count.sum()) for count in counts]
    deviations = [math.sqrt(square - mean * mean) for square, mean in zip(squares, means, strict=True)]
    return tuple(round(mean / 255, 4) for mean in means), tuple(round(deviation / 255, 4) for deviation in deviations)
