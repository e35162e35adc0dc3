"""Arithmetic on uint8 images in whole numbers: the same bits on every device and for every batch that an image may be in."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 256  # what stands for a factor of 1

_GREY = (19595, 38470, 7471)  # of red, green and blue in 2**16ths: ITU-R BT.601's 0.299, 0.587, 0.114
_CENTRE = 5  # weight of a pixel beside its eight neighbours' 1 when it is smoothed, as in PIL's filter SMOOTH


def unit_range(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    # A product, because CUDA divides by a scalar as a product and CPU doesn't: the two would differ in the last bit.
    return images.float().mul_(1 / 255)


def blend(base: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """base + factor (image - base) in 256ths of a factor, rounded and cut to 0 .. 255: uint8, the image itself where the factor is UNIT.

    image: whole numbers; base, factor (not negative): whole numbers that broadcast against it.
    """
    base = base.int()
    # In place, since memory for whole batches costs more than the arithmetic.
    changed = (image - base).mul_(factor.int()).add_(base * UNIT + UNIT // 2)
    return changed.bitwise_right_shift_(8).clamp_(0, 255).byte()


def grey(images: Tensor) -> Tensor:
    """Brightness of each pixel: int32 [B, 1, H, W] from uint8 [B, C, H, W]; of three channels ITU-R BT.601's, of others the mean."""
    if images.shape[1] != 3:
        return images.sum(1, keepdim=True, dtype=torch.int32) // images.shape[1]
    red, green, blue = images.int().split(1, dim=1)
    brightness: Tensor = (red * _GREY[0] + green * _GREY[1] + blue * _GREY[2] + (1 << 15)) >> 16
    return brightness


def mean_grey(images: Tensor) -> Tensor:
    """Mean brightness of each image, rounded: int64 [B, 1, 1, 1]."""
    brightness = grey(images)
    pixels = brightness.shape[-1] * brightness.shape[-2]
    return (brightness.sum((1, 2, 3), keepdim=True) + pixels // 2) // pixels


def smoothed(images: Tensor) -> Tensor:
    """Each pixel averaged with its eight neighbours, weight 5 to 1; the outermost pixels as they are. int32 [B, C, H, W]."""
    whole = images.int()
    height, width = images.shape[-2:]
    if min(height, width) < 3:
        return whole
    columns = whole[..., :-2] + whole[..., 1:-1] + whole[..., 2:]
    total = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :] + (_CENTRE - 1) * whole[..., 1:-1, 1:-1]
    weight = 8 + _CENTRE
    whole = whole.clone()
    whole[..., 1:-1, 1:-1] = (total + weight // 2) // weight
    return whole


def histogram(images: Tensor) -> Tensor:
    """How often each value occurs in each channel: int64 [B, C, 256] from uint8 [B, C, H, W]."""
    values = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, values, torch.ones_like(values))


def taken(images: Tensor, places: Tensor) -> Tensor:
    """images [B, C, H, W] at the pixels `places`, int64 [B, h, w] row-major, the same for every channel: [B, C, h, w]."""
    batch, channels = images.shape[:2]
    wanted = places.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, wanted).view(batch, channels, *places.shape[1:])
