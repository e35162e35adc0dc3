"""What a model gives for a batch: its prediction and the maps that a method looks at; and the shapes of both, known before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from kdbench.data.columns import Columns, single
from kdbench.errors import UserError
from kdbench.models.inputs import model_inputs


@dataclass
class Outputs:
    """prediction: what the head gives, such as logits [B, classes] or [B, classes, H, W], or several tensors by name.

    maps: tap name -> [B, D, H, W], [B, N, D] or [B, D].
    peers: of a student, what the networks like it gave that learn beside it, where the method has any.
    others: of a student, what it gave for the further batches that the method showed it, by their names.
    reading: what the network says of how its prediction is read (its attribute `reading`), where a task has networks of several families.
    """

    prediction: Columns
    maps: dict[str, Tensor] = field(default_factory=dict)
    peers: tuple[Outputs, ...] = ()
    others: dict[str, Outputs] = field(default_factory=dict)
    reading: Any = None

    @property
    def logits(self) -> Tensor:
        """The prediction where it is one tensor, its entry `logits` where it is several."""
        return single(self.prediction, "logits")


def reading_of(model: nn.Module) -> Any:
    """What the model says of how its prediction is read; None where it says nothing."""
    return getattr(model, "reading", None)


def predicted(model: nn.Module, inputs: Columns) -> Columns:
    """The model's prediction, [B, ...] each, for inputs with images [B, C, H, W] in [0, 1], resized and normalised as the model wants them.

    Raises UserError as `main_output` does.
    """
    return main_output(model, model(model_inputs(model, inputs)))


def main_output(model: nn.Module, output: Any) -> Columns:
    """The prediction in what the model's `forward` returned: the only place that reads it.

    Of a model that says `prediction_names`, as a task's `build_model` may have it say, the prediction is the entries of these names. A
    `reading` says them too.

    A tensor is the prediction. So is the entry `logits` of a mapping and the attribute `logits` of a named tuple or a data class,
    as the models of transformers and torchvision's GoogLeNet and Inception return them. Everything beside it is left aside:
    auxiliary classifiers add nothing to the loss. Raises UserError for anything else, such as a plain tuple, whose order says nothing.
    """
    names: Sequence[str] = getattr(model, "prediction_names", ()) or getattr(reading_of(model), "names", ())
    found = f"a dictionary of {sorted(map(str, output))}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
    if names:
        if isinstance(output, Mapping) and all(isinstance(output.get(name), Tensor) for name in names):
            return {name: output[name] for name in names}
        raise UserError(f"the model gives {found}; expected a dictionary with the tensors {', '.join(map(repr, names))}")
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    prediction = output if isinstance(output, Tensor) else logits
    if isinstance(prediction, Tensor):
        return prediction
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
    """What a probe of a model found: the prediction's shape for one sample, or several by name, and each tap's.

    reading: as `Outputs.reading`.
    """

    prediction: tuple[int, ...] | dict[str, tuple[int, ...]]
    taps: dict[str, TapShape]
    reading: Any = None

    @property
    def logits(self) -> tuple[int, ...]:
        """As `Outputs.logits`; () where the prediction has none."""
        return self.prediction.get("logits", ()) if isinstance(self.prediction, dict) else self.prediction

    @property
    def predictions(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the prediction's tensors."""
        return tuple(self.prediction.values()) if isinstance(self.prediction, dict) else (self.prediction,)

    def made(self, draw: Callable[[tuple[int, ...]], Tensor], taps: Iterable[str]) -> Outputs:
        """Outputs of these shapes, with the maps at `taps`. draw: makes a batch of one shape."""
        given = self.prediction
        prediction = {name: draw(shape) for name, shape in given.items()} if isinstance(given, dict) else draw(given)
        return Outputs(prediction, {name: draw(self.taps[name].shape) for name in taps}, reading=self.reading)


def in_words(shape: tuple[int, ...] | dict[str, tuple[int, ...]]) -> str:
    """A shape, or several by name, for people: `3x32x32`."""
    if isinstance(shape, dict):
        return ", ".join(f"{name} {in_words(one)}" for name, one in shape.items())
    return "x".join(map(str, shape)) or "1"
