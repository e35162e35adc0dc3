"""VGG with batch norm for small images, in the two sizes that the distillation literature compares on CIFAR-100."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.models.initial_weights import he_by_fan_out, small_head

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE_IMAGE = 64  # pixels; the published code halves such images (Tiny ImageNet) once more, before the last block


class CifarVGG(nn.Module):
    """Five blocks of 3x3 conv-BN-ReLU with max pooling between the first four, global average pooling and one linear layer."""

    stage_modules: ClassVar[tuple[str, ...]] = ("block0", "block1", "block2", "block3", "block4")

    def __init__(self, convs_per_block: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = [_block(before, after, convs_per_block) for before, after in pairwise((in_channels, *_WIDTHS))]
        self.block0, self.block1, self.block2, self.block3, self.block4 = blocks
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        he_by_fan_out(self)
        small_head(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W], at least 8 pixels a side."""
        x = F.max_pool2d(self.block0(images), 2)
        x = F.max_pool2d(self.block1(x), 2)
        x = self.block3(F.max_pool2d(self.block2(x), 2))
        if images.shape[-1] >= _LARGE_IMAGE:
            x = F.max_pool2d(x, 2)
        logits: Tensor = self.classifier(self.block4(x).mean(dim=(2, 3)))
        return logits


def _block(in_channels: int, out_channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
        in_channels = out_channels
    return nn.Sequential(*layers)


def vgg8(*, num_classes: int, in_channels: int) -> CifarVGG:
    """One convolution a block."""
    return CifarVGG(1, num_classes=num_classes, in_channels=in_channels)


def vgg13(*, num_classes: int, in_channels: int) -> CifarVGG:
    """Two convolutions a block."""
    return CifarVGG(2, num_classes=num_classes, in_channels=in_channels)
