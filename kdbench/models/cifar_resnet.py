"""ResNets and wide ResNets for small images, in the sizes that the distillation literature compares on CIFAR-100."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.models.initial_weights import he_by_fan_out


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU()  # a module, so that what it reads can be tapped

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride], after the ReLU."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu(residual + self.shortcut(x))
        return activated


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of basic blocks; depth = 6 n + 2 with n blocks a stage."""

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, widths: tuple[int, int, int, int], *, num_classes: int, in_channels: int, stem_stride: int) -> None:
        """widths: channels of the stem and of the three stages."""
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, widths[0], stem_stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(BasicBlock, blocks, widths[0], widths[1], 1)
        self.layer2 = _stage(BasicBlock, blocks, widths[1], widths[2], 2)
        self.layer3 = _stage(BasicBlock, blocks, widths[2], widths[3], 2)
        self.fc = nn.Linear(widths[3], num_classes)
        he_by_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each convolution (Zagoruyko & Komodakis, BMVC 2016); the output has no ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if in_channels != out_channels else None
        self.relu = nn.ReLU()  # a module, so that what it reads can be tapped

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]. A convolved shortcut reads the activated input, an identity the raw one."""
        activated = self.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-widen: three stages of pre-activation blocks of 16, 32 and 64 times `widen` channels; depth = 6 n + 4."""

    stage_modules: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, widen: int, *, num_classes: int, in_channels: int, stem_stride: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = _conv3x3(in_channels, 16, stem_stride)
        self.layer1 = _stage(PreActivationBlock, blocks, 16, 16 * widen, 1)
        self.layer2 = _stage(PreActivationBlock, blocks, 16 * widen, 32 * widen, 2)
        self.layer3 = _stage(PreActivationBlock, blocks, 32 * widen, 64 * widen, 2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * widen, num_classes)
        he_by_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(self.relu(self.bn(x)).mean(dim=(2, 3)))
        return logits


def _stage(block: Callable[[int, int, int], nn.Module], count: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """`count` blocks, the first of which changes width and resolution."""
    return nn.Sequential(block(in_channels, out_channels, stride), *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def _resnet(depth: int) -> Callable[..., CifarResNet]:
    """Stages of `width`, 2 `width` and 4 `width` channels behind a stem of `width`."""

    def build(*, num_classes: int, in_channels: int, width: int = 16, stem_stride: int = 1) -> CifarResNet:
        widths = (width, width, 2 * width, 4 * width)
        return CifarResNet(depth, widths, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)

    return build


def _resnet_x4(depth: int) -> Callable[..., CifarResNet]:
    """Four times the stages, but twice the stem: 32, 64, 128, 256."""

    def build(*, num_classes: int, in_channels: int, width: int = 64, stem_stride: int = 1) -> CifarResNet:
        widths = (max(1, width // 2), width, 2 * width, 4 * width)
        return CifarResNet(depth, widths, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)

    return build


def _wide_resnet(depth: int, widen: int) -> Callable[..., WideResNet]:
    def build(*, num_classes: int, in_channels: int, stem_stride: int = 1) -> WideResNet:
        return WideResNet(depth, widen, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)

    return build


cifar_resnet8 = _resnet(8)
cifar_resnet14 = _resnet(14)
cifar_resnet20 = _resnet(20)
cifar_resnet32 = _resnet(32)
cifar_resnet44 = _resnet(44)
cifar_resnet56 = _resnet(56)
cifar_resnet110 = _resnet(110)
resnet8x4 = _resnet_x4(8)
resnet32x4 = _resnet_x4(32)
wrn_16_1 = _wide_resnet(16, 1)
wrn_16_2 = _wide_resnet(16, 2)
wrn_40_1 = _wide_resnet(40, 1)
wrn_40_2 = _wide_resnet(40, 2)
