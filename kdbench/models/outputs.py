"""What a model gives for a batch: its prediction and the maps that a method looks at; and the shapes of both, known before training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass
class Outputs:
    """prediction: what the head gives, [B, classes] logits or [B, classes, H, W]; maps: tap name -> [B, D, H, W], [B, N, D] or [B, D].

    peers: of a student, what the networks like it gave that learn beside it, where the method has any.
    """

    prediction: Tensor | dict[str, Tensor]
    maps: dict[str, Tensor] = field(default_factory=dict)
    peers: tuple[Outputs, ...] = ()

    @property
    def logits(self) -> Tensor:
        if isinstance(self.prediction, dict):
            return self.prediction["logits"]
        return self.prediction


@dataclass(frozen=True)
class TapShape:
    """One tap's output for one sample: a map [D, H, W], tokens [N, D] or a vector [D], without the batch dimension."""

    kind: Literal["map", "tokens", "vector"]
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.kind == "tokens" else self.shape[0]


@dataclass(frozen=True)
class Shapes:
    """What a probe of a model found: the prediction's shape for one sample and each tap's."""

    prediction: tuple[int, ...]
    taps: dict[str, TapShape]
