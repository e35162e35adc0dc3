"""A U-Net: down to small maps and up again, each step up beside the map of the same size on the way down.

Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015 (arXiv 1505.04597), with padded
convolutions, batch normalization and bilinear steps up, so that logits have the size of the picture.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.initial_weights import he_by_fan_out, small_head

_DEEPEST = 7  # halvings


class UNet(nn.Module):
    """Steps of w, 2w, 4w, ... channels, `depth` of them behind a max pooling, and as many back up.

    stage_modules: the steps down, the finest first.
    """

    def __init__(self, width: int, depth: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if not 1 <= depth <= _DEEPEST:
            raise UserError(f"depth must be 1 to {_DEEPEST}, got {depth}.")
        widths = [width << step for step in range(depth + 1)]
        self.stage_modules = tuple(f"down.{step}" for step in range(depth + 1))
        self.down = nn.ModuleList(_step(before, after) for before, after in zip([in_channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(_step(wide + narrow, narrow) for narrow, wide in pairwise(widths))
        self.head = nn.Conv2d(width, num_classes, 1)
        he_by_fan_out(self)
        small_head(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of images [B, in_channels, H, W]; H and W are 2^depth or more."""
        passed = [self.down[0](images)]
        for step in list(self.down)[1:]:
            passed.append(step(F.max_pool2d(passed[-1], 2)))
        x = passed.pop()
        for step in reversed(self.up):
            beside = passed.pop()
            x = step(torch.cat([beside, F.interpolate(x, size=beside.shape[-2:], mode="bilinear", align_corners=False)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _step(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalization and ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


def unet(*, num_classes: int, in_channels: int, width: int = 16, depth: int = 4) -> UNet:
    return UNet(width, depth, num_classes=num_classes, in_channels=in_channels)
