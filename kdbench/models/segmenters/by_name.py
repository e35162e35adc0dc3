"""DeepLabV3, FCN and LR-ASPP on backbones by name. The layers have the names that torchvision gives them, so that its weights fit.

They give logits at the size of their input. Torchvision's auxiliary classifiers are left out: they add nothing to what is deployed.
Sources: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017 (arXiv 1706.05587); Long et al., "Fully
Convolutional Networks for Semantic Segmentation", CVPR 2015 (arXiv 1411.4038); Howard et al., "Searching for MobileNetV3", ICCV 2019
(arXiv 1905.02244), section 6.4.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.lraspp import LRASPPHead

from kdbench.models.backbones import dilated_body, low_and_high_body


class OnBackbone(nn.Module):
    """A backbone that gives maps by name, and a classifier that reads them.

    stage_modules: paths of the modules that give the backbone's maps.
    """

    def __init__(self, backbone: Any, classifier: nn.Module, read: str | None) -> None:
        """read: the name of the map that the classifier reads; None where it reads all."""
        super().__init__()
        self.backbone, self.classifier, self._read = backbone, classifier, read
        self.stage_modules = tuple(f"backbone.{path}" for path in backbone.taps)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes, H, W] of normalised images [B, in_channels, H, W]."""
        maps = self.backbone(images)
        logits = self.classifier(maps if self._read is None else maps[self._read])
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3(*, num_classes: int, in_channels: int, backbone: str = "resnet50", width: int = 256, rate: int = 12) -> OnBackbone:
    """width: channels of the classifier. rate: of its first dilated convolution; the two others have two and three times as much."""
    body = dilated_body(backbone, in_channels)
    classifier = nn.Sequential(
        ASPP(body.channels[-1], (rate, 2 * rate, 3 * rate), width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, num_classes, 1),
    )
    return OnBackbone(body, classifier, "out")


def deeplabv3_resnet18(*, num_classes: int, in_channels: int, width: int = 256, rate: int = 12) -> OnBackbone:
    return deeplabv3(num_classes=num_classes, in_channels=in_channels, backbone="resnet18", width=width, rate=rate)


def deeplabv3_resnet50(*, num_classes: int, in_channels: int, width: int = 256, rate: int = 12) -> OnBackbone:
    return deeplabv3(num_classes=num_classes, in_channels=in_channels, width=width, rate=rate)


def deeplabv3_mobilenet_v3_large(*, num_classes: int, in_channels: int, width: int = 256, rate: int = 12) -> OnBackbone:
    return deeplabv3(num_classes=num_classes, in_channels=in_channels, backbone="mobilenet_v3_large", width=width, rate=rate)


def fcn(*, num_classes: int, in_channels: int, backbone: str = "resnet50", width: int = 0) -> OnBackbone:
    """width: channels of the classifier; a quarter of the backbone's without it."""
    body = dilated_body(backbone, in_channels)
    width = width or body.channels[-1] // 4
    classifier = nn.Sequential(
        nn.Conv2d(body.channels[-1], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(width, num_classes, 1),
    )
    return OnBackbone(body, classifier, "out")


def fcn_resnet50(*, num_classes: int, in_channels: int, width: int = 0) -> OnBackbone:
    return fcn(num_classes=num_classes, in_channels=in_channels, width=width)


def lraspp(*, num_classes: int, in_channels: int, backbone: str = "mobilenet_v3_large", width: int = 128) -> OnBackbone:
    """width: channels between the backbone's last map and the logits."""
    body = low_and_high_body(backbone, in_channels)
    return OnBackbone(body, LRASPPHead(*body.channels, num_classes, width), None)


def lraspp_mobilenet_v3_large(*, num_classes: int, in_channels: int, width: int = 128) -> OnBackbone:
    return lraspp(num_classes=num_classes, in_channels=in_channels, width=width)
