"""What a model expects of its images: each carries its own normalisation and, where it was trained at one, its own size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.data.columns import Columns, like, named


@dataclass(frozen=True)
class InputSpec:
    """mean, std: one number a channel, for images in [0, 1]. size: pixels a side that images are resized to, None to leave them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError(f"an input needs as many means as standard deviations, these above 0; got {self.mean} and {self.std}")


def model_inputs(model: nn.Module, inputs: Columns) -> Columns:
    """The inputs as `model` was trained to see them: images [B, C, H, W] in [0, 1] -> resized, then normalised by its `input_spec`.

    Of a model with several inputs, `input_spec` holds one InputSpec by name of each input that is an image; the others pass. A model
    without `input_spec` gets the images as they are: whoever made it normalises inside, or wants [0, 1].
    """
    spec = getattr(model, "input_spec", None)
    if spec is None:
        return inputs
    specs = {"": spec} if isinstance(spec, InputSpec) else spec
    return like({name: _seen(specs.get(name), tensor) for name, tensor in named(inputs, "").items()}, inputs)


def _seen(spec: InputSpec | None, images: Tensor) -> Tensor:
    if spec is None:
        return images
    if spec.size is not None and images.shape[-2:] != (spec.size, spec.size):
        images = F.interpolate(images, size=(spec.size, spec.size), mode="bilinear", align_corners=False, antialias=True)
    mean, std = _constants(spec, images.device, images.dtype)
    return (images - mean) / std


@lru_cache(maxsize=64)
def _constants(spec: InputSpec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation as [C, 1, 1]: kept, because making them anew would stall a GPU at every step."""
    # Made outside inference mode, or a later backward pass could not use them.
    with torch.inference_mode(False):
        mean, std = (torch.tensor(numbers, device=device, dtype=dtype).view(-1, 1, 1) for numbers in (spec.mean, spec.std))
    return mean, std
