"""Test images that training images nearly equal: a metric on them says less of new images than it seems to.

Two images count as near-duplicates where their 64-bit difference hashes differ in at most 4 bits: of a grey image of 9 x 8 pixels, whether
each pixel is brighter than its right neighbour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdbench.account import cache_home
from kdbench.bounded import parse_json, read_file
from kdbench.data.batch import Part
from kdbench.data.content import keep_for_user
from kdbench.storage.folder import local_path

NEAR = 4  # bits
MOST_PAIRS = 5_000_000_000  # a test image with a training image: comparing these takes half a minute
MOST_DECODED = 100_000  # images in files
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
_AT_ONCE = 4096
_LARGEST_MEMORY = 100  # bytes

Hashes = NDArray[np.uint64]


def near_duplicates(train: Part, test: Part) -> int | None:
    """How many of the test images have a near-duplicate among the training images.

    None for samples that are no images, and for more than are compared within minutes: MOST_PAIRS, or MOST_DECODED in files.
    """
    if len(train) * len(test) > MOST_PAIRS or not (_has_images(train) and _has_images(test)):
        return None
    if (train.encoded is not None or test.encoded is not None) and len(train) + len(test) > MOST_DECODED:
        return None
    learned, tested = (np.concatenate([difference_hashes(images) for images in _images(part)]) for part in (train, test))
    return int(nearly_equal(tested, learned).sum())


def counted_once(train: Part, test: Part, content: str) -> int | None:
    """`near_duplicates`, counted once a data set for each user: the number is kept below `~/.cache/kdbench`.

    content: hash of the data set's content.
    """
    memory = local_path(cache_home(), "XDG_CACHE_HOME") / "kdbench" / "near-duplicates" / f"{content[:32]}.json"
    with suppress(OSError, ValueError):
        kept = parse_json(read_file(memory, _LARGEST_MEMORY))
        if isinstance(kept, int) and not isinstance(kept, bool) and 0 <= kept <= len(test):
            return kept
    found = near_duplicates(train, test)
    if found is not None:
        keep_for_user(memory, json.dumps(found))
    return found


def difference_hashes(images: Tensor) -> Hashes:
    """uint64 [N] of images uint8 [N, C, H, W], grey or with red, green and blue first."""
    pixels = images.float()
    if pixels.shape[1] >= len(_GREY):
        pixels = (pixels[:, : len(_GREY)] * pixels.new_tensor(_GREY).view(1, -1, 1, 1)).sum(1, keepdim=True)
    else:
        pixels = pixels[:, :1]
    small = F.interpolate(pixels, size=(8, 9), mode="bilinear", align_corners=False, antialias=True)[:, 0]
    bits = (small[..., :-1] > small[..., 1:]).flatten(1).numpy()
    hashes: Hashes = np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
    return hashes


def nearly_equal(of: Hashes, among: Hashes) -> NDArray[np.bool_]:
    """Whether each hash has one among the others that differs in at most NEAR bits, bool [N]."""
    others, (distinct, places) = np.unique(among), np.unique(of, return_inverse=True)
    found = np.zeros(len(distinct), dtype=bool)
    for row, one in enumerate(distinct):
        found[row] = bool((np.bitwise_count(others ^ one) <= NEAR).any())
    near: NDArray[np.bool_] = found[places]
    return near


def _has_images(part: Part) -> bool:
    if part.encoded is not None:
        return True
    first = _first(part)
    return first.dtype == torch.uint8 and first.ndim == 4 and min(first.shape[-2:]) >= 8


def _first(part: Part) -> Tensor:
    """The first input of a part that is in memory."""
    column = next(iter(part.columns.values()))
    assert isinstance(column, Tensor)
    return column


def _images(part: Part) -> Iterator[Tensor]:
    """All images, some at a time; those in files as evaluation sees them."""
    for rows in torch.arange(len(part)).split(_AT_ONCE):
        if part.encoded is None:
            images = _first(part)
            yield images[rows if part.rows is None else part.rows[rows]]
        else:
            encoded = part.encoded_images
            with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as pool:
                yield torch.stack(list(pool.map(encoded.decode, rows.tolist())))
