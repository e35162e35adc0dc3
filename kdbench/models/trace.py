"""What every module of a model gives, seen in one forward pass that leaves no mark on the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdbench.data.columns import Columns, mapped, named, tensors
from kdbench.models.inputs import model_inputs
from kdbench.models.outputs import TapShape, main_output

# Samples to run a model on: two real ones as a network gets them, or the shape [C, H, W] of an image, for black ones.
Example = tuple[int, int, int] | Columns

# An output whose first dimension is not this is not one per sample: a window of an attention layer, a position table.
_SAMPLES = 2


@dataclass(frozen=True)
class Seen:
    """One module's output for one sample. channels_last: it comes as [B, H, W, D] and is a [B, D, H, W] map once permuted."""

    shape: TapShape
    channels_last: bool = False


@dataclass
class Trace:
    """A forward pass. The dictionaries are in the order in which modules finished, by their last call.

    input_size: height and width of the image that went in, after the model's own resizing; None where no input is an image.
    prediction: shape for one sample, or several by name.
    seen: path -> output. odd: path -> why that module's output can't be tapped.
    classifier: path of the last linear layer that gives the prediction from one vector a sample, and that vector's length.
    patches: height and width of the patches that a convolution without overlap and padding cuts the image into.
    """

    input_size: tuple[int, int] | None
    prediction: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    seen: dict[str, Seen] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    classifier: tuple[str, int] | None = None
    patches: tuple[int, int] | None = None

    def stride(self, shape: TapShape) -> int | None:
        """Input pixels for one position of a map, rounded; None for tokens and vectors."""
        return round(self.input_size[0] / shape.shape[1]) if shape.kind == "map" and self.input_size is not None else None


def trace(model: nn.Module, example: Example) -> Trace:
    """Run `model` once on two samples, in eval mode and without gradients.

    Training flags, buffers and random states are afterwards what they were. Raises UserError where the model gives nothing that
    `main_output` knows.
    """
    inputs = model_inputs(model, samples(example, _SAMPLES, **_placement(model)))
    image = next((tensor.shape[1:] for tensor in tensors(inputs) if tensor.is_floating_point() and tensor.ndim == 4), None)
    found = Trace(input_size=(image[-2], image[-1]) if image is not None else None)
    with _undisturbed(model), ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            if path:
                hooks.enter_context(module.register_forward_hook(_observer(found, path, _declares_channels_last(model), image)))
        output = main_output(model, model(inputs))
    found.prediction = sample_shapes(output)
    if found.classifier is not None:
        last_linear = found.seen.get(found.classifier[0])
        if last_linear is None or last_linear.shape.shape != named(output, "logits").get("logits", torch.empty(0)).shape[1:]:
            found.classifier = None
    return found


def _cuts_patches(module: nn.Conv2d) -> bool:
    return module.kernel_size == module.stride and max(module.stride) > 1 and module.padding in ((0, 0), "valid")


def _observer(found: Trace, path: str, channels_last: bool, image: torch.Size | None) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A forward hook that notes what the module at `path` gives. image: shape [C, H, W] of the model's input, where one is an image."""

    def observe(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.seen.pop(path, None)  # a module that runs again is seen at its last call
        found.odd.pop(path, None)
        if isinstance(module, nn.Conv2d) and _cuts_patches(module) and args and args[0].shape[1:] == image:
            found.patches = (module.kernel_size[0], module.kernel_size[1])
        if not isinstance(output, Tensor):
            found.odd[path] = f"gives a {type(output).__name__}, not a tensor"
            return
        seen = describe(tuple(output.shape), found.input_size, channels_last) if output.is_floating_point() else None
        if seen is None:
            found.odd[path] = f"gives {output.dtype} of shape {list(output.shape)}, which is neither map, tokens nor vector of a sample"
            return
        found.seen[path] = seen
        if isinstance(module, nn.Linear) and seen.shape.kind == "vector":
            found.classifier = (path, module.in_features)

    return observe


def describe(shape: tuple[int, ...], input_size: tuple[int, int] | None, prefers_channels_last: bool = False) -> Seen | None:
    """Tell maps, tokens and vectors apart by the shape [2, ...] of a batch of two; None for anything else.

    Of a map, the two dimensions in proportion to the image are its height and width. Where both readings are possible
    ([B, 16, 16, 16]) the model's own declaration decides, and channels come first without one. So they do without an image.
    """
    if shape[:1] != (_SAMPLES,):
        return None
    if len(shape) == 2:
        return Seen(TapShape("vector", shape[1:]))
    if len(shape) == 3:
        return Seen(TapShape("tokens", shape[1:]))
    if len(shape) != 4:
        return None
    _, first, second, third = shape
    if input_size is None:
        channels = (third, first, second) if prefers_channels_last else (first, second, third)
        return Seen(TapShape("map", channels), channels_last=prefers_channels_last)
    channels_first = _in_proportion(second, third, input_size)
    if _in_proportion(first, second, input_size) and (prefers_channels_last or not channels_first):
        return Seen(TapShape("map", (third, first, second)), channels_last=True)
    return Seen(TapShape("map", (first, second, third))) if channels_first else None


def _in_proportion(height: int, width: int, input_size: tuple[int, int]) -> bool:
    """Whether height : width is the image's, give or take the rounding of one position."""
    return abs(height * input_size[1] - width * input_size[0]) < max(input_size)


def samples(example: Example, count: int, **placement: Any) -> Columns:
    """So many samples to run a model on: those of the example over and over. placement: device and dtype; whole numbers keep their type."""
    if isinstance(example, tuple):
        return torch.zeros(count, *example, **placement)

    def some(tensor: Tensor) -> Tensor:
        rows = tensor[torch.arange(count, device=tensor.device) % len(tensor)]
        return rows.to(**placement) if tensor.is_floating_point() else rows.to(device=placement.get("device"))

    return mapped(example, some)


def sample_shapes(columns: Columns) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """The shape of one row, or of one of each."""
    if isinstance(columns, dict):
        return {name: tuple(tensor.shape[1:]) for name, tensor in columns.items()}
    return tuple(columns.shape[1:])


def _declares_channels_last(model: nn.Module) -> bool:
    """timm's transformers over windows say that their maps are NHWC."""
    return str(getattr(model, "output_fmt", "")) == "NHWC"


def _placement(model: nn.Module) -> dict[str, Any]:
    """Device and floating type of the first parameter: where the model lives and what it computes in."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {}


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Afterwards every random generator is what it was: torch's on all devices, NumPy's and Python's."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - the one that user code may draw from
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" or torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside every training flag and random state as before."""
    flags = [(module, module.training) for module in model.modules()]
    device = _placement(model).get("device", torch.device("cpu"))
    with generators_kept(device):
        model.eval()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training
