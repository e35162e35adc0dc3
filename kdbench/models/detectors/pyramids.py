"""Feature pyramids on backbones by name, with the layout of torchvision's `BackboneWithFPN`, so that its weights fit.

Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017 (arXiv 1612.03144).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from kdbench.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from kdbench.errors import UserError, shown
from kdbench.models.backbones import Norm, body
from kdbench.models.inputs import InputSpec

COARSEST = 32  # stride of the last map that a backbone gives; coarser levels are made from the pyramid
MOST_LEVELS = 8
PRESETS = ("", "coco_v1")
EPSILON = 1e-5  # of frozen statistics, as of torch's own
IMAGENET = InputSpec(IMAGENET_MEAN, IMAGENET_STD)


class Pyramid(nn.Module):
    """A backbone's maps, merged from the coarsest to the finest, `width` channels each; and coarser ones made from the last.

    level_modules, stage_modules: paths inside this module. strides: of the levels.
    """

    body: Any

    def __init__(self, backbone: str, *, width: int, finest: int, levels: int, in_channels: int, norm: Norm, learned: bool) -> None:
        """learned: coarser levels are convolutions of stride 2; without it they take every second pixel."""
        super().__init__()
        if finest not in (4, 8, 16, 32):
            raise UserError(f"finest = {finest}: the stride of the finest level must be 4, 8, 16 or 32")
        if not 1 <= levels <= MOST_LEVELS:
            raise UserError(f"levels must be 1 to {MOST_LEVELS}, got {levels}.")
        self.strides = tuple(finest << level for level in range(levels))
        own = [stride for stride in self.strides if stride <= COARSEST]
        self.body = body(backbone, own, in_channels=in_channels, norm=norm)
        extra: Any = _Coarser(width, levels - len(own), learned)
        self.fpn = FeaturePyramidNetwork(list(self.body.channels), width, extra)
        self.level_modules = (*(f"fpn.layer_blocks.{level}" for level in range(len(own))), *(f"fpn.extra_blocks.{x}" for x in extra.names))
        self.stage_modules = tuple(f"body.{path}" for path in self.body.taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The levels' maps [B, width, ceil(H / stride), ceil(W / stride)], the finest first."""
        return list(self.fpn(self.body(images)).values())


class _Coarser(ExtraFPNBlock):  # type: ignore[misc]
    """Levels beyond the backbone's: `p6`, `p7`, ... as RetinaNet and FCOS have them, or every second pixel."""

    def __init__(self, width: int, count: int, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.names = tuple(f"p{6 + number}" for number in range(count))
        for name in self.names:
            layer = nn.Conv2d(width, width, 3, stride=2, padding=1) if learned else nn.MaxPool2d(1, stride=2)
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(cast(Tensor, layer.bias))
            self.add_module(name, layer)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for number, name in enumerate(self.names):
            last = F.relu(results[-1]) if self.learned and number else results[-1]
            results.append(getattr(self, name)(last))
            names.append(name)
        return results, names


def below_backbone(paths: Sequence[str]) -> tuple[str, ...]:
    """Paths inside a detector whose pyramid is called `backbone`."""
    return tuple(f"backbone.{path}" for path in paths)


def check_preset(preset: str, in_channels: int) -> None:
    """Raise UserError unless a detector can be built as `preset` says."""
    if preset not in PRESETS:
        raise UserError(
            f"preset {shown(preset)} is unknown. Available: coco_v1, which builds a network as torchvision's COCO_V1 weights need it."
        )
    if preset and in_channels != 3:
        raise UserError(f"preset coco_v1 is for images of three channels, and these have {in_channels}; leave preset out")


def norm_of(preset: str, epsilon: float = EPSILON) -> Norm:
    """What the backbone normalises with: frozen statistics where it begins with torchvision's weights.

    epsilon: what these weights were trained with; 0 before torchvision 0.8.
    """
    return partial(FrozenBatchNorm2d, eps=epsilon) if preset else nn.BatchNorm2d
