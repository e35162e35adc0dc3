"""The rest of a frozen network from one of its taps on: what the teacher would say to features that are not its own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.models.inputs import model_inputs
from kdbench.models.taps import ImageShape, locate


class Tail:
    """Call it with features as they are at the tap, [B, ...] of any batch size: gives what the network makes of them.

    Gradients flow to the features. The front part runs too, on one black image whose features are then replaced: so no network needs to be
    cut, at the price of 1 / B of a forward pass. It is no module, so that a method that keeps one neither trains nor saves the teacher.
    """

    def __init__(self, network: nn.Module, tap: str, image_shape: ImageShape, until: str | None = None) -> None:
        """network: in eval mode, without gradients of its own. until: a later tap, which is then read in place of the prediction.

        Raises UserError for a tap that it has not.
        """
        self.network = network
        self.tap = tap
        self._place = locate(network, image_shape, tap)
        self._end = locate(network, image_shape, until) if until is not None else None
        self._image_shape = image_shape

    def __call__(self, features: Tensor) -> Tensor:
        """The network's prediction, [B, classes], or what is at `until`, as a tap there gives it."""
        place = self._place
        stored = features.permute(0, 2, 3, 1) if place.channels_last else features

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (stored, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return stored

        weight = next(self.network.parameters())
        image = torch.zeros(1, *self._image_shape, device=features.device, dtype=weight.dtype)
        handle = place.module.register_forward_pre_hook(before) if place.reads_input else place.module.register_forward_hook(after)
        maps: dict[str, Tensor] = {}
        with handle, self._end.attach(maps) if self._end is not None else nullcontext():
            prediction: Tensor = self.network(model_inputs(self.network, image))
        return prediction if self._end is None else maps[self._end.name]
