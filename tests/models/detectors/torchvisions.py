"""Torchvision's detectors beside ours: the same random weights, and pictures of which two are padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

from kdbench.models.build import ModelSpec, build_model
from kdbench.models.detectors.pyramids import IMAGENET
from kdbench.models.inputs import InputSpec

CLASSES = 5
ALL = 4000  # more boxes than a picture has after suppression
SMALL = {"min_size": 128, "max_size": 256}  # then none of the pictures is resized


def ours(name: str, mean: tuple[float, ...] = (0.5,) * 3, **options: Any) -> Any:
    spec = ModelSpec.model_validate({"name": name, **options})
    return build_model(spec, num_classes=CLASSES, in_channels=3, image_size=128, mean=mean, std=(0.25,) * 3).eval()


def theirs(name: str, background: bool, **options: Any) -> Any:
    """With weights that find something everywhere, as random ones don't."""
    torch.manual_seed(3)
    network: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES + background, **options).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


@torch.no_grad()
def tame(network: Any, spreads: dict[str, tuple[float, float]]) -> None:
    """Let layers give numbers around a mean with a spread, on the pictures: random weights give hundreds, whose scores are all 1.

    spreads: path of a layer -> mean and standard deviation.
    """
    for path, (mean, spread) in spreads.items():
        layer, seen = network.get_submodule(path), []
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        handle = layer.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].flatten()))
        network(pictures())
        handle.remove()
        layer.weight.mul_(spread / torch.cat(seen).std())
        nn.init.constant_(layer.bias, mean)


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, *size, generator=generator) for size in ((128, 256), (100, 256), (128, 190))]


def padded(spec: InputSpec = IMAGENET, size: tuple[int, int] = (128, 256)) -> tuple[Tensor, Tensor]:
    """What torchvision makes of the pictures: normalised, then padded with zeros; and their heights and widths [B, 2]."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (spec.mean, spec.std))
    batch = torch.zeros(len(pictures()), 3, *size)
    for row, picture in enumerate(pictures()):
        batch[row, :, : picture.shape[1], : picture.shape[2]] = (picture - mean) / std
    return batch, torch.tensor([picture.shape[1:] for picture in pictures()])


def assert_same(kept: dict[str, Tensor], found: list[dict[str, Tensor]], background: bool) -> None:
    """Boxes to 1e-3 pixels, scores to 1e-5, classes exactly.

    Boxes that lie in the padding alone have no area once they are cut at the picture's edge. Torchvision's one-stage detectors keep them,
    ours don't, so they are left out. For the same reason all boxes are compared and not the best hundred.
    """
    for row, image in enumerate(found):
        real = ((image["boxes"][:, 2:] - image["boxes"][:, :2]) >= 1e-2).all(1)
        count = int(real.sum())
        assert count > 10
        assert int((kept["scores"][row] > 0).sum()) == count
        assert kept["scores"][row].diff().max() <= 0
        # Scores that differ by rounding alone may stand in another order, so each box is looked up.
        each = [(kept["boxes"], image["boxes"], 1e-3), (kept["scores"][..., None], image["scores"][:, None], 1e-5)]
        same = kept["classes"][row, :count, None] == image["labels"][real] - int(background)
        for given, wanted, tolerance in each:
            same &= (given[row, :count, None] - wanted[real]).abs().amax(-1) <= tolerance
        assert same.any(0).all()
        assert same.any(1).all()
