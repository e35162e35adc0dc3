"""Every random decision about a view, as a pure function of (data seed, sample index, view, decision), and tables to draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, unique
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kdbench.data.hashing import below, hash64

QUANTILES = 4096  # entries of a table that stands for a distribution: each is as likely as any other


@unique
class Decision(IntEnum):
    """What a hash is for. Two decisions never share a number, and a number never changes: the views of old results would."""

    DOWN = 0
    ACROSS = 1
    MIRROR = 2
    OPERATION = 3
    SIGN = 4
    BRIGHTNESS = 5
    CONTRAST = 6
    SATURATION = 7
    ERASED = 8
    ERASED_SIDES = 9
    ERASED_DOWN = 10
    ERASED_ACROSS = 11
    PARTNER = 12
    CUT_OR_BLEND = 13
    SHARE = 14
    CUT_DOWN = 15
    CUT_ACROSS = 16
    RESIZED_CROP = 17


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of some samples. index: int64 [B]; all that is drawn lies on its device."""

    data_seed: int
    index: Tensor
    view: int
    drawn: Mapping[Decision, Tensor] = field(default_factory=dict)  # bits that are known already, int64 [B] each

    def ahead(self, decisions: Sequence[Decision]) -> Draws:
        """The same, with the bits of these decisions drawn at once: for batch after batch of a whole part, `at` then looks them up."""
        counters = torch.tensor([int(decision) for decision in decisions], device=self.index.device)
        bits = hash64(self.data_seed, self.index[:, None], self.view, counters)
        return replace(self, drawn=dict(zip(decisions, bits.unbind(1), strict=True)))

    def at(self, rows: Tensor) -> Draws:
        """Those of some of the samples. rows: int64, where they stand among these."""
        return Draws(self.data_seed, self.index[rows], self.view, {decision: bits[rows] for decision, bits in self.drawn.items()})

    def bits(self, decision: Decision, rounds: int | None = None) -> Tensor:
        """64 bits a sample, int64 [B]; of a decision that is taken several times, [B, rounds]."""
        if rounds is None and decision in self.drawn:
            return self.drawn[decision]
        if rounds is None:
            return hash64(self.data_seed, self.index, self.view, int(decision))
        counters = torch.arange(rounds, device=self.index.device)
        return hash64(self.data_seed, self.index[:, None], self.view, int(decision), counters)

    def below(self, decision: Decision, limit: int | Tensor) -> Tensor:
        """A whole number 0 .. limit - 1 a sample, int64 [B]; limit: one for all, or one a sample."""
        return below(self.bits(decision), limit)

    def chosen(self, decision: Decision, probability: float) -> Tensor:
        """True for about so many of the samples, bool [B]."""
        return self.below(decision, 1 << 32) < round(probability * (1 << 32))


def levels() -> np.ndarray:
    """Where a distribution's `QUANTILES` equally likely values lie: float64 in (0, 1)."""
    return (np.arange(QUANTILES) + 0.5) / QUANTILES


@lru_cache(maxsize=256)
def rectangles(height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], device: torch.device) -> Tensor:
    """Height and width of equally likely rectangles that fit into an image [height, width]: int64 [R, 2].

    area: share of the image, uniform in this range; ratio: width by height, its logarithm uniform in this range. Those that would not fit
    are left out, which is what drawing until one fits comes to. Where none does, the largest of the nearest ratio is the only one.
    """
    steps = round(QUANTILES**0.5)
    grid = (np.arange(steps) + 0.5) / steps
    areas = ((area[0] + (area[1] - area[0]) * grid) * height * width)[:, None]
    ratios = ratio[0] * (ratio[1] / ratio[0]) ** grid
    sides = np.rint(np.stack([np.sqrt(areas / ratios), np.sqrt(areas * ratios)], axis=-1)).clip(min=1).astype(np.int64).reshape(-1, 2)
    fitting = sides[(sides <= (height, width)).all(1)]
    if not len(fitting):
        nearest = min(max(width / height, ratio[0]), ratio[1])
        fitting = np.array([[min(height, round(width / nearest)), min(width, round(height * nearest))]])
    return torch.from_numpy(fitting).to(device)


def inside(shape: tuple[int, int], top: Tensor, left: Tensor, sides: Tensor) -> Tensor:
    """Which pixels a rectangle covers, bool [B, H, W]. top, left: int64 [B], may lie outside; sides: int64 [B, 2] of height and width."""
    rows, columns = (torch.arange(side, device=top.device) for side in shape)
    bottom, right = top + sides[:, 0], left + sides[:, 1]
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]
