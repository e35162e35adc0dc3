"""Images that show nothing: noise as a function of a seed and a sample's index, for training without any real image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdbench.data.batch import Part
from kdbench.data.hashing import hash64
from kdbench.data.kinds import Image
from kdbench.errors import TooMuch, UserError
from kdbench.own_code import are_from_records

_MOST_BYTES_OF_RECORD = 300_000_000
_MOST_BYTES = 32e9  # of all images, which lie in memory
_HASH_BYTES = 8
_HASHES_AT_ONCE = 1 << 20  # 8 MB


def noise_part(like: Part, count: int, seed: int, first: int, name: str) -> Part:
    """A part of `count` samples without labels, whose images are noise. Nothing of an image of `like` gets into it.

    Args:
        like: a part whose inputs have the names and shapes that are wanted. Its pixels are not read.
        count: how many samples.
        seed: another seed gives other images.
        first: the samples' positions are `first`, `first` + 1, ...
        name: what errors call the data set.

    Raises:
        UserError: an input is no image.
        TooMuch: the images do not fit in memory.
    """
    kinds = like.kinds_of_inputs
    if other := [column for column, kind in kinds.items() if type(kind) is not Image]:
        what = f"the input {other[0]!r}" if other[0] else "inputs"
        raise UserError(f"transfer: noise makes images, and samples of data {name!r} have {what} of another kind; use transfer: train")
    shapes = {column: tuple(values.shape[1:]) for column, values in like.columns.items()}
    nbytes, most = count * sum(map(math.prod, shapes.values())), _MOST_BYTES_OF_RECORD if are_from_records() else _MOST_BYTES
    if nbytes > most:
        raise TooMuch(
            f"transfer: noise: {count} images of data {name!r} take {nbytes / 1e9:.1f} GB of memory; "
            f"set transfer_size to at most {int(most * count / nbytes)}"
        )
    index = torch.arange(first, first + count)
    images = {column: noise(seed, place, index, shape) for place, (column, shape) in enumerate(shapes.items())}
    return Part(like.inputs, None, index, kinds=like.kinds).with_inputs(images)


def noise(seed: int, column: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint8 [N, *shape], each byte uniform over 0 to 255: for each index, int64 [N], the same in every process.

    column: tells several images of one sample apart.
    """
    size = math.prod(shape)
    words = torch.arange(-(-size // _HASH_BYTES))
    rows = max(1, _HASHES_AT_ONCE // max(1, len(words)))
    images = torch.empty(len(index), size, dtype=torch.uint8)
    for start in range(0, len(index), rows):
        some = index[start : start + rows, None]
        images[start : start + rows] = hash64(seed, column, some, words).view(torch.uint8)[:, :size]
    return images.view(len(index), *shape)
