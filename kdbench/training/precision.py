"""Which precision and memory format train this model fastest here: measured on the model itself, once, and written down."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.experiment import Recipe
from kdbench.models.inputs import model_inputs
from kdbench.training.checkpoint import write_atomically

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# A candidate must win by this much: below it the measurement's noise would choose, and two runs of one experiment would differ.
WORTH_IT = 1.2
_PAIRS = (("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "channels_last"))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Networks run under it; float32 and float64 turn it off."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision in ("bf16", "fp16"))


def place(model: nn.Module, precision: str, memory_format: str, device: torch.device) -> nn.Module:
    """The model on the device, in float64 where asked, its 4-D weights in the memory format."""
    model = model.to(device, dtype=torch.float64 if precision == "fp64" else torch.float32)
    return model.to(memory_format=FORMATS[memory_format])


def images_for(images: Tensor, precision: str, memory_format: str = "contiguous") -> Tensor:
    """A batch as a model placed by `place` takes it; autocast does the narrowing."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return images.to(dtype=dtype, memory_format=FORMATS[memory_format])


def settled(recipe: Recipe, model: nn.Module, image_shape: tuple[int, int, int], device: torch.device, memo: Path) -> Recipe:
    """The recipe with every `auto` replaced by what was measured to be fastest, which is kept in `memo` and read from there next time."""
    if recipe.precision != "auto" and recipe.memory_format != "auto":
        return recipe
    chosen = _remembered(memo)
    if chosen is None:
        precision, memory_format = _fastest(recipe, model, image_shape, device)
        chosen = {"precision": precision, "memory_format": memory_format}
        write_atomically(memo, lambda temporary: temporary.write_text(json.dumps(chosen)))
    return recipe.model_copy(update=chosen)


def _remembered(memo: Path) -> dict[str, str] | None:
    """The choice that was kept; None where there is none, or nothing that this module wrote: it is then measured again."""
    try:
        chosen: dict[str, str] = json.loads(memo.read_text())
        known = chosen["precision"] in DTYPES and chosen["memory_format"] in FORMATS
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return chosen if known else None


def _fastest(recipe: Recipe, model: nn.Module, image_shape: tuple[int, int, int], device: torch.device) -> tuple[str, str]:
    allowed = [pair for pair in _PAIRS if recipe.precision in ("auto", pair[0]) and recipe.memory_format in ("auto", pair[1])]
    if not allowed:  # fp16 and fp64 are never measured: they are asked for by name
        return recipe.precision, "contiguous"
    if len(allowed) == 1:
        return allowed[0]
    images = torch.rand(min(recipe.batch_size, 128), *image_shape, device=device)
    seconds = {pair: _step_seconds(copy.deepcopy(model), images, *pair, device) for pair in allowed}
    best = allowed[0]
    for pair in allowed[1:]:
        if seconds[pair] * WORTH_IT < seconds[best]:
            best = pair
    return best


def _step_seconds(model: nn.Module, images: torch.Tensor, precision: str, memory_format: str, device: torch.device) -> float:
    """The shortest of a few training steps: other load can only lengthen one."""
    model = place(model, precision, memory_format, device).train()
    images = images.to(memory_format=FORMATS[memory_format])
    times = []
    for _ in range(6):
        start = time.perf_counter()
        with autocast(precision, device):
            prediction = model(model_inputs(model, images))
        prediction.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
