"""MobileNetV2 and the two ShuffleNets in the variants for small images that the distillation literature compares on CIFAR-100."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.models.initial_weights import he_by_fan_out, small_head


def _conv_bn(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups, so that the next grouped convolution sees all of them. [B, D, H, W] -> the same."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class InvertedResidual(nn.Module):
    """Expand 1x1, filter each channel 3x3, project 1x1 without a ReLU (Sandler et al., CVPR 2018)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _conv_bn(in_channels, hidden)
        self.filter = _conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = _conv_bn(hidden, out_channels)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]."""
        out: Tensor = self.project(F.relu(self.filter(F.relu(self.expand(x)))))
        return x + out if self.adds_input else out


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 whose second stage keeps its resolution: 32 pixels end at 2."""

    stage_modules: ClassVar[tuple[str, ...]] = tuple(f"blocks.{i}" for i in range(7))
    _SETTINGS = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    _LAST_CHANNELS = 1280

    def __init__(self, width_factor: float, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = int(32 * width_factor)
        self.stem = _conv_bn(in_channels, channels, 3, stride=2)
        stages = []
        for expansion, base, count, stride in self._SETTINGS:
            width = int(base * width_factor)
            first = InvertedResidual(channels, width, stride, expansion)
            stages.append(nn.Sequential(first, *(InvertedResidual(width, width, 1, expansion) for _ in range(count - 1))))
            channels = width
        self.blocks = nn.Sequential(*stages)
        self.widen = _conv_bn(channels, self._LAST_CHANNELS)
        self.relu = nn.ReLU()  # a module, so that the map that is averaged can be tapped
        self.classifier = nn.Linear(self._LAST_CHANNELS, num_classes)
        he_by_fan_out(self)
        small_head(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = self.blocks(F.relu(self.stem(images)))
        logits: Tensor = self.classifier(self.relu(self.widen(x)).mean(dim=(2, 3)))
        return logits


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, shuffle, per-channel 3x3, grouped 1x1 (Zhang et al., CVPR 2018). With stride 2 the pooled input is appended."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        added = out_channels - in_channels if stride == 2 else out_channels
        middle = added // 4
        self.first_groups = first_groups
        self.stride = stride
        self.squeeze = _conv_bn(in_channels, middle, groups=first_groups)
        self.filter = _conv_bn(middle, middle, 3, stride, groups=middle)
        self.project = _conv_bn(middle, added, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride], after the ReLU."""
        out = _shuffle(F.relu(self.squeeze(x)), self.first_groups)
        out = self.project(F.relu(self.filter(out)))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return F.relu(out + x)


class CifarShuffleNetV1(nn.Module):
    """Three groups, a 1x1 stem of 24 channels at full resolution and stages of 240, 480 and 960 channels."""

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")
    _GROUPS = 3
    _STEM = 24

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = _conv_bn(in_channels, self._STEM)
        self.layer1 = self._stage(self._STEM, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.classifier = nn.Linear(960, num_classes)

    def _stage(self, in_channels: int, out_channels: int, count: int) -> nn.Sequential:
        # The stem's few channels are not grouped by the first 1x1 convolution that reads them.
        first_groups = 1 if in_channels == self._STEM else self._GROUPS
        first = ShuffleV1Block(in_channels, out_channels, 2, self._GROUPS, first_groups)
        rest = (ShuffleV1Block(out_channels, out_channels, 1, self._GROUPS, self._GROUPS) for _ in range(count - 1))
        return nn.Sequential(first, *rest)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.stem(images)))))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class ShuffleV2Block(nn.Module):
    """Half of the channels pass untouched, half are filtered, then both are interleaved (Ma et al., ECCV 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.enter = _conv_bn(half, half)
        self.filter = _conv_bn(half, half, 3, groups=half)
        self.leave = _conv_bn(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        kept, changed = x.chunk(2, dim=1)
        changed = F.relu(self.leave(self.filter(F.relu(self.enter(changed)))))
        return _shuffle(torch.cat([kept, changed], dim=1), 2)


class ShuffleV2Down(nn.Module):
    """Halve the resolution on two paths and interleave them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.short_filter = _conv_bn(in_channels, in_channels, 3, 2, groups=in_channels)
        self.short_leave = _conv_bn(in_channels, half)
        self.enter = _conv_bn(in_channels, half)
        self.filter = _conv_bn(half, half, 3, 2, groups=half)
        self.leave = _conv_bn(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / 2, W / 2]."""
        short = F.relu(self.short_leave(self.short_filter(x)))
        long = F.relu(self.leave(self.filter(F.relu(self.enter(x)))))
        return _shuffle(torch.cat([short, long], dim=1), 2)


class CifarShuffleNetV2(nn.Module):
    """Width 1: a 1x1 stem of 24 channels at full resolution, stages of 116, 232 and 464 channels, widened to 1024 before the pooling."""

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = _conv_bn(in_channels, 24)
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.widen = _conv_bn(464, 1024)
        self.relu = nn.ReLU()  # a module, so that the map that is averaged can be tapped
        self.classifier = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(ShuffleV2Down(in_channels, out_channels), *(ShuffleV2Block(out_channels) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.stem(images)))))
        logits: Tensor = self.classifier(self.relu(self.widen(x)).mean(dim=(2, 3)))
        return logits


def mobilenetv2_half(*, num_classes: int, in_channels: int) -> CifarMobileNetV2:
    """Half the width; the last convolution keeps its 1280 channels."""
    return CifarMobileNetV2(0.5, num_classes=num_classes, in_channels=in_channels)


def shufflenetv1(*, num_classes: int, in_channels: int) -> CifarShuffleNetV1:
    return CifarShuffleNetV1(num_classes=num_classes, in_channels=in_channels)


def shufflenetv2(*, num_classes: int, in_channels: int) -> CifarShuffleNetV2:
    return CifarShuffleNetV2(num_classes=num_classes, in_channels=in_channels)
