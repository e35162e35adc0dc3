"""What a model gives for a batch: its prediction and the maps that a method looks at; and the shapes of both, known before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.inputs import model_inputs


@dataclass
class Outputs:
    """prediction: what the head gives, [B, classes] logits or [B, classes, H, W]; maps: tap name -> [B, D, H, W], [B, N, D] or [B, D].

    peers: of a student, what the networks like it gave that learn beside it, where the method has any.
    """

    prediction: Tensor
    maps: dict[str, Tensor] = field(default_factory=dict)
    peers: tuple[Outputs, ...] = ()

    @property
    def logits(self) -> Tensor:
        return self.prediction


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """The model's prediction [B, ...] for images [B, C, H, W] in [0, 1], which are resized and normalised as the model wants them.

    Raises UserError as `main_output` does.
    """
    return main_output(model(model_inputs(model, images)))


def main_output(output: Any) -> Tensor:
    """The prediction in what a network's `forward` returned: the only place that reads it.

    A tensor is the prediction. So is the entry `logits` of a mapping and the attribute `logits` of a named tuple or a data class,
    as the models of transformers and torchvision's GoogLeNet and Inception return them. Everything beside it is left aside:
    auxiliary classifiers add nothing to the loss. Raises UserError for anything else, such as a plain tuple, whose order says nothing.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    prediction = output if isinstance(output, Tensor) else named
    if isinstance(prediction, Tensor):
        return prediction
    found = f"a dictionary of {sorted(map(str, output))}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
    raise UserError(f"the model gives {found}; expected a tensor, a dictionary with 'logits' or a named tuple with `logits`")


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
