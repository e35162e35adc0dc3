"""The rest of a frozen network from one of its taps on: what the teacher would say to features that are not its own."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from kdbench.data.columns import single
from kdbench.errors import UserError
from kdbench.models.outputs import predicted
from kdbench.models.taps import locate
from kdbench.models.trace import Example, samples

_SAMPLES = 2


class Tail:
    """Call it with features as they are at the tap, [B, ...] of any batch size: gives what the network makes of them.

    Gradients flow to the features. The front part runs too, on one sample whose features are then replaced: so no network needs to be
    cut, at the price of 1 / B of a forward pass. It is no module, so that a method that keeps one neither trains nor saves the teacher.
    """

    def __init__(self, network: nn.Module, tap: str, example: Example, until: str | None = None) -> None:
        """network: in eval mode, without gradients of its own. until: a later tap, to get what is there and not the prediction's logits.

        Raises UserError for a tap that it has not, and for an `until` that does not follow from `tap`.
        """
        self.network = network
        self.tap = tap
        self._place = locate(network, example, tap)
        self._until = locate(network, example, until) if until is not None else None
        self._example = example
        if until is not None and len(self(self._two_samples())) != _SAMPLES:
            raise UserError(f"tap {until!r} does not come after {tap!r}")

    def _two_samples(self) -> Tensor:
        """Features of no meaning: what does not follow from them has the batch size of the front part's sample."""
        weight = next(self.network.parameters())
        return torch.zeros(_SAMPLES, *self._place.shape.shape, device=weight.device, dtype=weight.dtype)

    def __call__(self, features: Tensor) -> Tensor:
        """The network's logits, [B, classes], or the features at `until`: in the precision of `features`, whatever the network's."""
        weight = next(self.network.parameters())
        given = features.to(weight.dtype)
        sample = samples(self._example, 1, device=features.device, dtype=weight.dtype)
        maps: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            hooks.enter_context(self._place.change(lambda _: given))
            if self._until is not None:
                hooks.enter_context(self._until.attach(maps))
            logits = single(predicted(self.network, sample), "logits")
        return (maps[self._until.name] if self._until is not None else logits).to(features.dtype)
