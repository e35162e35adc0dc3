"""Reading one tap as another kind: tokens as a map, a map as tokens, either as a vector; and bringing two maps to one size or width."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.outputs import TapShape

_PREFIXES = (0, 1, 2)  # a transformer's class and distillation tokens stand before its patches


def shape_of(features: Tensor) -> TapShape:
    """The shape, without the batch, of what was tapped: [B, D, H, W], [B, N, D] or [B, D]."""
    kinds: dict[int, Literal["map", "tokens", "vector"]] = {4: "map", 3: "tokens", 2: "vector"}
    return TapShape(kinds[features.dim()], tuple(features.shape[1:]))


def map_shape(shape: TapShape) -> tuple[int, int, int]:
    """[D, H, W] of a tap read as a map: tokens lie on a square grid, row by row, behind their class tokens.

    Raises UserError for a vector, and for tokens that make no square.
    """
    if shape.kind == "map":
        channels, height, width = shape.shape
        return channels, height, width
    if shape.kind == "tokens":
        count, channels = shape.shape
        for prefix in _PREFIXES:
            side = math.isqrt(count - prefix) if count > prefix else 0
            if side and side * side == count - prefix:
                return channels, side, side
        raise UserError(f"{count} tokens make no square grid, with or without class tokens, so they can't be read as a map")
    raise UserError(f"a vector of {shape.shape[0]} numbers can't be read as a map; tap a stage or a block instead")


def class_tokens(shape: TapShape) -> int:
    """How many of a tap's tokens are none of the grid's. Raises UserError as `map_shape` does."""
    _, height, width = map_shape(shape)
    return shape.shape[0] - height * width if shape.kind == "tokens" else 0


def as_map(features: Tensor, shape: TapShape) -> Tensor:
    """[B, D, H, W] of what was tapped: a map as it is, tokens [B, N, D] without class tokens on their grid."""
    if shape.kind == "map":
        return features
    channels, height, width = map_shape(shape)
    return features[:, class_tokens(shape) :].transpose(1, 2).reshape(-1, channels, height, width)


def as_tokens(features: Tensor, shape: TapShape) -> Tensor:
    """[B, H * W, D] of what was tapped: tokens without class tokens, a map row by row."""
    if shape.kind == "tokens":
        return features[:, class_tokens(shape) :]
    return features.flatten(2).transpose(1, 2)


def as_vector(features: Tensor) -> Tensor:
    """[B, D] of what was tapped: a map's mean over space, tokens' mean over all of them, a vector as it is."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features


def to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, *, H, W] at the smaller of their sizes: the larger one is averaged down (adaptive average pooling)."""
    if first.shape[-2:] == second.shape[-2:]:
        return first, second
    size = min(first.shape[-2], second.shape[-2]), min(first.shape[-1], second.shape[-1])
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)


def to_size_of(other: Tensor, features: Tensor) -> Tensor:
    """Features [B, D, *, *] at the height and width of the map `other`, interpolated linearly between the centres of positions."""
    if features.shape[-2:] == other.shape[-2:]:
        return features
    return F.interpolate(features, other.shape[-2:], mode="bilinear", align_corners=False)


def to_width(student: int, teacher: int) -> nn.Module:
    """A pointwise convolution from the student's number of channels to the teacher's; nothing where they are the same."""
    return nn.Identity() if student == teacher else nn.Conv2d(student, teacher, kernel_size=1)
