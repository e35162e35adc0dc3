"""Mixup and cutmix as functions of one sample's key: the partner is drawn by hash from the whole part, never from the batch.

So the mixed image of a sample is the same in every batch and on every worker, and a teacher's output for it can be cached like any other.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kdbench.data.draws import QUANTILES, Decision, Draws, inside, levels
from kdbench.data.hashing import below
from kdbench.data.pixels import unit_range

WHOLE = 1 << 16  # what stands for a share of 1; times 255 it is still exact in float32


def partners(rows: Tensor, total: int, draws: Draws) -> Tensor:
    """For each sample, the row of another one of the same part: int64 [B]; its own where it is alone.

    rows: int64 [B], where the samples of `draws` stand in the part; total: samples of the part.
    """
    if total == 1:
        return rows
    return (rows + 1 + draws.below(Decision.PARTNER, total - 1)) % total


def mixed(own: Tensor, other: Tensor, draws: Draws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each image with its partner: blended (mixup) or with a rectangle of it (cutmix), one or the other at even odds where both are on.

    mixup: the own image's share lambda is Beta(mixup, mixup) (Zhang et al., arXiv 1710.09412). cutmix: the rectangle is 1 - lambda of the
    image, lambda Beta(cutmix, cutmix), its centre anywhere, cut at the image's edge (Yun et al., arXiv 1905.04899). 0 turns one off.
    own, other: uint8 [B, C, H, W], seen through the view of `draws`. Returns float32 [B, C, H, W] in [0, 1], and the share of the label
    that is the own one, float32 [B]: of a cut image the share of its pixels.
    """
    if not cutmix:
        return _blended(own, other, _mixup_share(draws, mixup))
    height, width = own.shape[-2:]
    foreign = _cut(height, width, draws, cutmix)
    pixels = torch.where(foreign[:, None], other, own)
    share = 1 - foreign.sum((1, 2)).float() * (1 / (height * width))
    if not mixup:
        return unit_range(pixels), share
    blended, blended_share = _blended(own, other, _mixup_share(draws, mixup))
    is_cut = below(draws.bits(Decision.CUT_OR_BLEND), 2).bool()
    return torch.where(is_cut[:, None, None, None], unit_range(pixels), blended), torch.where(is_cut, share, blended_share)


def mixed_labels(own: Tensor, other: Tensor, share: Tensor, classes: int) -> Tensor:
    """share of the own label and the rest of the partner's: float32 [B, classes], each row a distribution. own, other: int64 [B]."""
    soft = torch.zeros(len(own), classes, device=own.device)
    soft.scatter_add_(1, own[:, None], share[:, None])
    return soft.scatter_add_(1, other[:, None], 1 - share[:, None])


def _blended(own: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """share: int64 [B], of `WHOLE`. Products and sum are whole numbers below 2**24, exact in float32; only the scale is rounded."""
    weight = share.float()[:, None, None, None]
    blended = (own * weight + other * (WHOLE - weight)).mul_(1 / (255 * WHOLE))
    return blended, share.float() * (1 / WHOLE)


def _mixup_share(draws: Draws, alpha: float) -> Tensor:
    return _shares(alpha, draws.index.device)[draws.below(Decision.SHARE, QUANTILES)]


def _cut(height: int, width: int, draws: Draws, alpha: float) -> Tensor:
    """The pixels that come from the partner: bool [B, H, W]."""
    sides = _cut_sides(height, width, alpha, draws.index.device)[draws.below(Decision.SHARE, QUANTILES)]
    centre_down, centre_across = draws.below(Decision.CUT_DOWN, height), draws.below(Decision.CUT_ACROSS, width)
    return inside((height, width), centre_down - sides[:, 0] // 2, centre_across - sides[:, 1] // 2, sides)


def beta_quantiles(alpha: float) -> np.ndarray:
    """`QUANTILES` equally likely values of Beta(alpha, alpha), rising, float64 in [0, 1]."""
    from scipy.special import betaincinv  # takes a quarter of a second, so only who mixes pays

    quantiles: np.ndarray = betaincinv(alpha, alpha, levels())
    return quantiles


@lru_cache(maxsize=16)
def _shares(alpha: float, device: torch.device) -> Tensor:
    return torch.from_numpy(np.rint(beta_quantiles(alpha) * WHOLE).astype(np.int64)).to(device)


@lru_cache(maxsize=16)
def _cut_sides(height: int, width: int, alpha: float, device: torch.device) -> Tensor:
    """Height and width of the rectangle that leaves each quantile's share of the image: int64 [QUANTILES, 2]."""
    rest = np.sqrt(1 - beta_quantiles(alpha))
    return torch.from_numpy(np.stack([rest * height, rest * width], axis=1).astype(np.int64)).to(device)
