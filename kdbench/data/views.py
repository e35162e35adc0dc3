"""Augmentation as a pure function of (data seed, sample index, view): any worker can replay any view in any order.

That is what lets a teacher's outputs be cached under augmentation. A sample has views 0, 1, 2, ...; each of them is augmented, view 0 too.
Evaluation uses no augmentation.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kdbench.data.hashing import below, hash64
from kdbench.data.options import StrictOptions

IGNORED = 255  # the label of a pixel that has none: a crop brings them in from outside the image

_DOWN, _ACROSS, _MIRROR = 0, 1, 2  # which decision a hash is for


class Augment(StrictOptions):
    """How a view differs from its image."""

    crop: Annotated[int, Field(ge=0)] = 0  # pixels of black padding on every side, then a random crop back to the size
    flip: bool = False  # mirrored left to right, half of the time

    @property
    def none(self) -> bool:
        """Whether every view is the image itself."""
        return not (self.crop or self.flip)


def augment(images: Tensor, target: Tensor, index: Tensor, view: int, data_seed: int, spec: Augment) -> tuple[Tensor, Tensor]:
    """One view of each image, and its target.

    images: uint8 [B, C, H, W]; target: [B] or any other per-image form, returned as it is, or labels per pixel [B, H, W],
    which move with the image and come back as int64, IGNORED where the crop reached outside. index: int64 [B], on the images' device.
    Returns float32 [B, C, H, W] in [0, 1] and the target.
    """
    dense = target.ndim == 3
    if dense:
        target = target.long()
    if not spec.none:
        source = _source_pixels(images.shape[-2:], index, view, data_seed, spec)
        images = _taken(F.pad(images, (spec.crop,) * 4), source)
        if dense:
            target = _taken(F.pad(target, (spec.crop,) * 4, value=IGNORED).unsqueeze(1), source).squeeze(1)
    return unit_range(images), target


def unit_range(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    # A product, because CUDA divides by a scalar as a product and CPU doesn't: the two would differ in the last bit.
    return images.float().mul_(1 / 255)


def _source_pixels(shape: torch.Size, index: Tensor, view: int, data_seed: int, spec: Augment) -> Tensor:
    """For each sample and output pixel, the pixel of the padded image that it shows: int64 [B, H, W], row-major."""
    height, width = shape
    decisions = torch.arange(3, device=index.device)
    bits = hash64(data_seed, index[:, None], view, decisions)
    shifts = below(bits, 2 * spec.crop + 1)
    rows = torch.arange(height, device=index.device) + shifts[:, _DOWN, None]
    columns = torch.arange(width, device=index.device).expand(len(index), -1)
    if spec.flip:
        mirrored = below(bits[:, _MIRROR, None], 2).bool()
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shifts[:, _ACROSS, None]
    return rows[:, :, None] * (width + 2 * spec.crop) + columns[:, None, :]


def _taken(padded: Tensor, source: Tensor) -> Tensor:
    """padded [B, C, H + 2p, W + 2p] at the pixels `source` [B, H, W], the same for every channel."""
    batch, channels = padded.shape[:2]
    height, width = source.shape[1:]
    places = source.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(batch, channels, height, width)
