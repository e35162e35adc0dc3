"""FCOS and RetinaNet with the modules of torchvision inside, on any backbone.

Sources: Tian et al., ICCV 2019 (arXiv 1904.01355); Lin et al., ICCV 2017 (arXiv 1708.02002).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead

from kdbench.models.detectors.anchors import AnchorReading, anchor_sizes
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.pretrained import WithTorchvisionsWeights
from kdbench.models.detectors.pyramids import EPSILON, IMAGENET, Pyramid, below_backbone, check_preset, norm_of
from kdbench.models.detectors.readings import Reading
from kdbench.models.inputs import InputSpec

_GROUPS = 32  # of the group norms in FCOS's towers


class OneStage(WithTorchvisionsWeights):
    """A pyramid and a head that all levels share.

    level_modules, stage_modules: paths of the modules that give the pyramid's and the backbone's maps, the finest first.
    reading: says what a level's channels hold.
    """

    reading: Reading
    level_modules: tuple[str, ...]
    stage_modules: tuple[str, ...]
    input_spec: InputSpec | None

    def __init__(
        self, backbone: str, width: int, finest: int, levels: int, in_channels: int, preset: str, epsilon: float = EPSILON
    ) -> None:
        super().__init__()
        check_preset(preset, in_channels)
        self.backbone = Pyramid(
            backbone, width=width, finest=finest, levels=levels, in_channels=in_channels, norm=norm_of(preset, epsilon), learned=True
        )
        self.level_modules = below_backbone(self.backbone.level_modules)
        self.stage_modules = below_backbone(self.backbone.stage_modules)
        self.input_spec = IMAGENET if preset else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The raw levels of normalised images [B, in_channels, H, W], by name: see `reading`."""
        return dict(zip(self.reading.names, (self.predicted(level) for level in self.backbone(images)), strict=True))

    def predicted(self, level: Tensor) -> Tensor:
        """What is said of one level's map [B, width, H, W]."""
        raise NotImplementedError


class _Heads(nn.Module):
    """Under the names that torchvision gives them."""

    classification_head: Any
    regression_head: Any

    def __init__(self, classification: nn.Module, regression: nn.Module) -> None:
        super().__init__()
        self.classification_head, self.regression_head = classification, regression


class PyramidFCOS(OneStage):
    """FCOS with centre-ness, the sides in strides. A level is [B, num_classes + 5, H, W]."""

    def __init__(self, backbone: str, width: int, finest: int, levels: int, preset: str, *, num_classes: int, in_channels: int) -> None:
        super().__init__(backbone, width, finest, levels, in_channels, preset)
        norm = partial(nn.GroupNorm, math.gcd(_GROUPS, width))
        classes = FCOSClassificationHead(width, 1, num_classes, norm_layer=norm)
        self.head = _Heads(classes, FCOSRegressionHead(width, 1, norm_layer=norm))
        self.reading = CellReading(
            num_classes, self.backbone.strides, centreness=True, exponential=False, reach=8, corners=True, overlap=0.6
        )

    def predicted(self, level: Tensor) -> Tensor:
        classes, sides = self.head.classification_head, self.head.regression_head
        around = sides.conv(level)
        return torch.cat([classes.cls_logits(classes.conv(level)), sides.bbox_reg(around).relu(), sides.bbox_ctrness(around)], dim=1)


class RetinaNet(OneStage):
    """RetinaNet of nine anchors a cell. A level is [B, 9 (num_classes + 4), H, W]."""

    reading: AnchorReading

    def __init__(
        self,
        backbone: str,
        width: int,
        finest: int,
        levels: int,
        anchor: int,
        preset: str,
        epsilon: float = EPSILON,
        *,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__(backbone, width, finest, levels, in_channels, preset, epsilon)
        self.reading = AnchorReading(num_classes, self.backbone.strides, sizes=anchor_sizes(anchor, levels))
        self.head = RetinaNetHead(width, self.reading.per_cell[0], num_classes)

    def predicted(self, level: Tensor) -> Tensor:
        heads = ((self.head.classification_head, "cls_logits"), (self.head.regression_head, "bbox_reg"))
        given = [getattr(head, last)(head.conv(level)) for head, last in heads]
        return by_anchor(given, self.reading.per_cell[0])


def by_anchor(maps: list[Tensor], count: int) -> Tensor:
    """Maps [B, count D, H, W] of several D, each anchor by anchor, as one in which an anchor's numbers stand together."""
    images, _, height, width = maps[0].shape
    return torch.cat([x.view(images, count, -1, height, width) for x in maps], dim=2).flatten(1, 2)


def fcos(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet50",
    width: int = 256,
    finest: int = 8,
    levels: int = 5,
    preset: str = "",
) -> PyramidFCOS:
    return PyramidFCOS(backbone, width, finest, levels, preset, num_classes=num_classes, in_channels=in_channels)


def _fcos_on(backbone: str) -> Callable[..., PyramidFCOS]:
    def build(*, num_classes: int, in_channels: int, width: int = 256, finest: int = 8, levels: int = 5, preset: str = "") -> PyramidFCOS:
        return PyramidFCOS(backbone, width, finest, levels, preset, num_classes=num_classes, in_channels=in_channels)

    return build


def retinanet(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet50",
    width: int = 256,
    finest: int = 8,
    levels: int = 5,
    anchor: int = 32,
    preset: str = "",
) -> RetinaNet:
    return RetinaNet(backbone, width, finest, levels, anchor, preset, num_classes=num_classes, in_channels=in_channels)


def _retinanet_on(backbone: str, epsilon: float) -> Callable[..., RetinaNet]:
    def build(
        *, num_classes: int, in_channels: int, width: int = 256, finest: int = 8, levels: int = 5, anchor: int = 32, preset: str = ""
    ) -> RetinaNet:
        return RetinaNet(backbone, width, finest, levels, anchor, preset, epsilon, num_classes=num_classes, in_channels=in_channels)

    return build


fcos_resnet18_fpn = _fcos_on("resnet18")
fcos_resnet50_fpn = _fcos_on("resnet50")
retinanet_resnet18_fpn = _retinanet_on("resnet18", EPSILON)
retinanet_resnet50_fpn = _retinanet_on("resnet50", 0.0)
