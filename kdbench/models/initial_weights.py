"""The starting weights of the CIFAR networks: He initialisation by fan-out, as their papers train them."""

from __future__ import annotations

from torch import nn


def he_by_fan_out(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (kernel area x output channels)); biases 0, batch norms 1 and 0; linear layers are left alone.

    Source: He et al., ICCV 2015 (arXiv 1502.01852), eq. 14.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def small_head(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw a classifier from N(0, 0.01^2), bias 0, as VGG and MobileNetV2 start theirs: first predictions are near uniform."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
