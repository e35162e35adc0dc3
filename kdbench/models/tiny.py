"""Networks that train in seconds on a laptop: one classifier and two segmentation networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.models.initial_weights import he_by_fan_out, small_head


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class TinyCNN(nn.Module):
    """Three 3x3 conv-BN-ReLU of w, 2w and 4w channels, global average pooling and one linear layer."""

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, width: int, stem_stride: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.layer1 = _conv_bn_relu(in_channels, width, stem_stride)
        self.layer2 = _conv_bn_relu(width, 2 * width, 2)
        self.layer3 = _conv_bn_relu(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        he_by_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(images))).mean(dim=(2, 3)))
        return logits


class FCN(nn.Module):
    """Encode to a quarter of the resolution, look around with dilated convolutions, decode through one skip connection."""

    # The encoder alone: the decoder comes back through resolutions that it has already had.
    stage_modules: ClassVar[tuple[str, ...]] = ("down1", "context")

    def __init__(self, width: int, dilations: Sequence[int], *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.down1 = _conv_bn_relu(in_channels, width, 2)
        self.down2 = _conv_bn_relu(width, 2 * width, 2)
        self.context = nn.Sequential(*(_conv_bn_relu(2 * width, 2 * width, dilation=d) for d in dilations))
        self.fuse = _conv_bn_relu(3 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)
        he_by_fan_out(self)
        small_head(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] at the resolution of the images [B, in_channels, H, W], whatever it is."""
        half = self.down1(images)
        quarter = self.context(self.down2(half))
        x = self.fuse(torch.cat([half, _resize(quarter, half.shape[-2:])], dim=1))
        return _resize(self.head(x), images.shape[-2:])


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


def tiny_cnn(*, num_classes: int, in_channels: int, width: int = 16, stem_stride: int = 2) -> TinyCNN:
    return TinyCNN(width, stem_stride, num_classes=num_classes, in_channels=in_channels)


def tiny_fcn(*, num_classes: int, in_channels: int, width: int = 8) -> FCN:
    return FCN(width, (1,), num_classes=num_classes, in_channels=in_channels)


def small_fcn(*, num_classes: int, in_channels: int, width: int = 32) -> FCN:
    return FCN(width, (1, 2), num_classes=num_classes, in_channels=in_channels)
