"""SSDLite with the modules of torchvision inside, on any backbone.

Sources: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016 (arXiv 1512.02325); Sandler et al., "MobileNetV2", CVPR 2018 (arXiv
1801.04381), section 6.2; Howard et al., "Searching for MobileNetV3", ICCV 2019 (arXiv 1905.02244), section 6.3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.ops import Conv2dNormActivation

from kdbench.errors import UserError
from kdbench.models.backbones import body, see_channels
from kdbench.models.bounds import cut_down
from kdbench.models.detectors.anchors import DefaultBoxReading
from kdbench.models.detectors.one_stage import by_anchor
from kdbench.models.detectors.pretrained import WithTorchvisionsWeights
from kdbench.models.detectors.pyramids import check_preset
from kdbench.models.inputs import InputSpec

_MOBILE = ("mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2")
_FIRST_STRIDE = 16
_RATIOS = (2.0, 3.0)
_SMALLEST, _LARGEST = 0.2, 0.95  # default boxes of the first and of the last level, as shares of the picture
_WIDEST = 512  # channels of the first level behind the backbone
_NARROWEST = 16
_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


class SSDLite(WithTorchvisionsWeights):
    """Two maps of a backbone, at strides 16 and 32, further ones behind it, and depthwise predictions for each of them.

    level_modules: paths of the modules that give the maps, the finest first. stage_modules: of the backbone's two.
    """

    def __init__(self, backbone: str, width: int, levels: int, preset: str, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_preset(preset, in_channels)
        if not 2 <= levels <= 6:
            raise UserError(f"levels must be 2 to 6, got {levels}.")
        self.backbone: Any = (
            _mobile(backbone, width, levels, in_channels) if backbone in _MOBILE else _Maps(backbone, width, levels, in_channels)
        )
        scales = tuple(_SMALLEST + (_LARGEST - _SMALLEST) * level / (levels - 1) for level in range(levels))
        strides = tuple(_FIRST_STRIDE << level for level in range(levels))
        self.reading = DefaultBoxReading(num_classes, strides, scales=(*scales, 1.0), ratios=(_RATIOS,) * levels)
        self.head = SSDLiteHead(_channels(self.backbone, in_channels), list(self.reading.per_cell), num_classes + 1, _NORM)
        first: tuple[str, ...] = ("features.0", "features.1")
        if isinstance(self.backbone, _Maps):
            first = tuple(f"body.{path}" for path in self.backbone.body.taps)
        self.stage_modules = tuple(f"backbone.{path}" for path in first)
        self.level_modules = (*self.stage_modules, *(f"backbone.extra.{number}" for number in range(levels - 2)))
        self.input_spec: InputSpec | None = InputSpec((0.5,) * 3, (0.5,) * 3) if preset else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The raw levels of normalised images [B, in_channels, H, W], by name: see `DefaultBoxReading`."""
        heads = (self.head.classification_head.module_list, self.head.regression_head.module_list)
        counts = self.reading.per_cell
        return {
            name: by_anchor([head[level](seen) for head in heads], counts[level])
            for level, (name, seen) in enumerate(zip(self.reading.names, self.backbone(images).values(), strict=True))
        }


def _mobile(name: str, width: int, levels: int, in_channels: int) -> nn.Module:
    """Torchvision's layout: MobileNet up to the expansion of its last block of stride 2, the rest of it, and `extra`."""
    tail: dict[str, Any] = {"reduced_tail": True} if name.startswith("mobilenet_v3") else {}
    with cut_down() as kept:
        network: Any = torchvision_models.get_model(name, weights=None, norm_layer=_NORM, **tail)
        see_channels(network, in_channels)
        features = network.features
        kept(features)
    drawn(features)
    last = [position for position, layer in enumerate(features) if getattr(layer, "_is_cn", False)][-1]
    if name == "mobilenet_v2":
        features[last].block = features[last].conv  # as the blocks of MobileNetV3 call it
    found: nn.Module = SSDLiteFeatureExtractorMobileNet(features, last, _NORM, width_mult=width / _WIDEST, min_depth=_NARROWEST)
    found.extra = nn.ModuleList(list(found.get_submodule("extra").children())[: levels - 2])
    return found


class _Maps(nn.Module):
    """A backbone's maps at strides 16 and 32, and further ones behind the last."""

    body: Any

    def __init__(self, name: str, width: int, levels: int, in_channels: int) -> None:
        super().__init__()
        self.body = body(name, (_FIRST_STRIDE, 2 * _FIRST_STRIDE), in_channels=in_channels)
        widths = [max(_NARROWEST, width // share) for share in (1, 2, 2, 4)][: levels - 2]
        before = [self.body.channels[-1], *widths]
        self.extra = nn.ModuleList(_halved(first, after) for first, after in zip(before, widths, strict=False))
        drawn(self.extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = dict(self.body(images))
        for number, layer in enumerate(self.extra, start=2):
            maps[str(number)] = layer(maps[str(number - 1)])
        return maps


def _halved(in_channels: int, channels: int) -> nn.Sequential:
    """A bottleneck with a depthwise convolution of stride 2."""
    part = partial(Conv2dNormActivation, norm_layer=_NORM, activation_layer=nn.ReLU6)
    half = channels // 2
    return nn.Sequential(
        part(in_channels, half, kernel_size=1), part(half, half, kernel_size=3, stride=2, groups=half), part(half, channels, kernel_size=1)
    )


def drawn(network: nn.Module) -> None:
    """Draw all convolutions from N(0, 0.03^2), biases 0, as torchvision's SSDLite does."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.03)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _channels(backbone: nn.Module, in_channels: int) -> list[int]:
    """Of the maps that a backbone gives, seen on a black picture."""
    parameter = next(backbone.parameters())
    training = backbone.training
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, in_channels, 64, 64, device=parameter.device, dtype=parameter.dtype))
    backbone.train(training)
    return [x.shape[1] for x in maps.values()]


def ssdlite(
    *, num_classes: int, in_channels: int, backbone: str = "mobilenet_v3_large", width: int = 512, levels: int = 6, preset: str = ""
) -> SSDLite:
    """width: channels of the first level behind the backbone; the later ones have a half and a quarter of it."""
    return SSDLite(backbone, width, levels, preset, num_classes=num_classes, in_channels=in_channels)


def ssdlite320_mobilenet_v3_large(*, num_classes: int, in_channels: int, width: int = 512, levels: int = 6, preset: str = "") -> SSDLite:
    return SSDLite("mobilenet_v3_large", width, levels, preset, num_classes=num_classes, in_channels=in_channels)
