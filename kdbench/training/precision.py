"""Which precision and memory format train this model fastest here, and whether compiling pays: measured once and kept."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.bounded import ImplausibleFile, parse_json, read_file
from kdbench.data.columns import Columns, mapped, tensors
from kdbench.errors import RunFailed
from kdbench.experiment import Recipe
from kdbench.models.inputs import model_inputs
from kdbench.models.outputs import main_output
from kdbench.models.trace import Example, samples
from kdbench.storage.working_copy import fetch
from kdbench.training.checkpoint import write_atomically

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# A candidate must win by this much: below it the measurement's noise would choose, and two runs of one experiment would differ.
WORTH_IT = 1.2
# torch.compile on CPUs: at most 1.36 times as fast after 22 s and more, measured on small networks.
_BEST_SAVING = 0.3
_LEAST_COMPILE_SECONDS = 20.0
_LARGEST_MEMO = 1_000_000  # bytes; one of a few recipes has a hundred
_PAIRS = (("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "channels_last"))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Networks run under it; float32 and float64 turn it off."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision in ("bf16", "fp16"))


def to_device(model: nn.Module, precision: str, memory_format: str, device: torch.device) -> nn.Module:
    """The model on the device, in float64 where asked, its 4-D weights in the memory format."""
    model = model.to(device, dtype=torch.float64 if precision == "fp64" else torch.float32)
    return model.to(memory_format=FORMATS[memory_format])


def placed_inputs(inputs: Columns, precision: str, memory_format: str = "contiguous") -> Columns:
    """A batch's inputs as a model placed by `to_device` takes them; autocast does the narrowing. Whole numbers stay as they are."""
    dtype = torch.float64 if precision == "fp64" else torch.float32

    def placed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype=dtype, memory_format=FORMATS[memory_format]) if tensor.ndim == 4 else tensor.to(dtype)

    return mapped(inputs, placed)


def any_loss(prediction: Columns) -> Tensor:
    """A scalar that every number of a prediction takes part in: for timing a backward pass."""
    return torch.stack([tensor.float().square().mean() for tensor in tensors(prediction)]).sum()


def noise_like(example: Example, count: int, device: torch.device) -> Columns:
    """So many samples to time a network with: noise where the example says no more than an image's shape."""
    return torch.rand(count, *example, device=device) if isinstance(example, tuple) else samples(example, count, device=device)


@dataclass(frozen=True)
class Memo:
    """The files that keep what `auto` measured for one model, task and device.

    path: the file for one `question`: the precision and memory format that the user asked for, and the batch size.
    earlier: the file that older code wrote for all questions together. It is read and never written.
    """

    path: Path
    earlier: Path | None = None


def question(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what `auto` measures. A memo's name hashes it."""
    return {"precision": recipe.precision, "memory_format": recipe.memory_format, "batch_size": recipe.batch_size}


def unmeasured(recipe: Recipe) -> Recipe:
    """The recipe for a few steps that only have to work: plain choices for `auto`, and no compilation."""
    plain = {name: value for name, value in (("precision", "fp32"), ("memory_format", "contiguous")) if getattr(recipe, name) == "auto"}
    return recipe.model_copy(update={**plain, "compile": False})


def settled(recipe: Recipe, model: nn.Module, example: Example, images: int, device: torch.device, memo: Memo) -> Recipe:
    """The recipe with every `auto` replaced by the choice that was measured to be fastest. Explicit values stay as they are.

    A measured choice is kept in `memo` and read from there the next time, since another choice would be another protocol.

    Args:
        images: The number of images in a training's epoch. It decides whether a training is long enough for compilation to pay.
        device: Where the measured steps run.
    """
    if "auto" not in (recipe.precision, recipe.memory_format, recipe.compile):
        return recipe
    steps = str(recipe.epochs * max(1, images // recipe.batch_size))
    kept, earlier, measured = _remembered(memo.path), _remembered(memo.earlier), {}
    candidates = _candidates(recipe)
    pair = candidates[0] if len(candidates) == 1 else _kept_pair(kept, candidates) or _kept_pair(earlier, candidates)
    if pair is None:
        pair = _fastest(recipe, model, example, device)
        kept, measured = {}, {"precision": pair[0], "memory_format": pair[1]}
    recipe = recipe.model_copy(update={"precision": pair[0], "memory_format": pair[1]})
    if recipe.compile == "auto":
        pays = kept.get("compile", {}).get(steps)
        if pays is None and _kept_pair(earlier, [pair]):
            pays = earlier.get("compile", {}).get(steps)
        if pays is None:
            pays = compiling_pays(recipe, model, example, int(steps), device)
            measured["compile"] = kept.get("compile", {}) | {steps: pays}
        recipe = recipe.model_copy(update={"compile": pays})
    if measured:
        write_atomically(memo.path, lambda temporary: temporary.write_text(json.dumps(kept | measured)))
    return recipe


def _kept_pair(memo: Mapping[str, Any], candidates: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The precision and memory format of a memo's content; None where a measurement between `candidates` can't have chosen them."""
    pair = (memo.get("precision"), memo.get("memory_format"))
    return next((candidate for candidate in candidates if candidate == pair), None)


def _remembered(memo: Path | None) -> dict[str, Any]:
    """The content of a memo: precision and memory format, and for each number of steps whether compiling pays.

    Empty where the file is missing or was not written by this module: the choice is then measured again.
    """
    if memo is None:
        return {}
    try:
        chosen = parse_json(read_file(fetch(memo, newest=True), _LARGEST_MEMO))
    except (FileNotFoundError, ImplausibleFile, ValueError):
        return {}
    except OSError as error:
        raise RunFailed(f"the measured choice {memo} can't be read: {error.strerror or error}") from error
    pays = chosen.get("compile", {}) if isinstance(chosen, dict) else None
    return chosen if isinstance(pays, dict) and all(isinstance(value, bool) for value in pays.values()) else {}


def compiling_pays(recipe: Recipe, model: nn.Module, example: Example, steps: int, device: torch.device) -> bool:
    """Whether `torch.compile`, its own time counted, shortens a training of so many steps. The recipe's precision is no `auto` any more.

    It is measured only where it could: where the best that was ever seen of it would save more than the least that it ever took.
    """
    inputs = noise_like(example, min(recipe.batch_size, 128), device)
    try:
        plain = _step_seconds(copy.deepcopy(model), inputs, recipe.precision, recipe.memory_format, device)
    except Exception:  # a user's model may fail in training mode: the training says how, with its name and a traceback in a log
        return False
    if plain * steps * _BEST_SAVING < _LEAST_COMPILE_SECONDS:
        return False
    start = time.perf_counter()
    faster = _step_seconds(copy.deepcopy(model), inputs, recipe.precision, recipe.memory_format, device, compiled=True)
    spent = time.perf_counter() - start
    return spent * WORTH_IT < (plain - faster) * steps


def _candidates(recipe: Recipe) -> list[tuple[str, str]]:
    """The pairs of precision and memory format to choose from; one alone where the recipe leaves no choice."""
    if "auto" not in (recipe.precision, recipe.memory_format):
        return [(recipe.precision, recipe.memory_format)]
    pairs = [pair for pair in _PAIRS if recipe.precision in ("auto", pair[0]) and recipe.memory_format in ("auto", pair[1])]
    return pairs or [(recipe.precision, "contiguous")]  # fp16 and fp64 are never measured: users ask for them by name


def _fastest(recipe: Recipe, model: nn.Module, example: Example, device: torch.device) -> tuple[str, str]:
    """The pair whose training step is the shortest; the first one unless another wins by `WORTH_IT`."""
    allowed = _candidates(recipe)
    inputs = noise_like(example, min(recipe.batch_size, 128), device)
    seconds = {pair: _step_seconds(copy.deepcopy(model), inputs, *pair, device) for pair in allowed}
    best = allowed[0]
    for pair in allowed[1:]:
        if seconds[pair] * WORTH_IT < seconds[best]:
            best = pair
    return best


def compiled_call(model: nn.Module, device: torch.device) -> Callable[[Columns], Any]:
    """The model's forward pass through `torch.compile`, on a GPU replayed as a CUDA graph. The model itself stays as it is."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is a CUDA compiler and no GPU
    compiled: Callable[[Columns], Any] = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else "default")
    return compiled


def _step_seconds(
    model: nn.Module, inputs: Columns, precision: str, memory_format: str, device: torch.device, compiled: bool = False
) -> float:
    """The shortest of a few training steps: other load can only lengthen one."""
    model = to_device(model, precision, memory_format, device).train()
    call = compiled_call(model, device) if compiled else model
    inputs = placed_inputs(inputs, "fp32", memory_format)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        with autocast(precision, device):
            prediction = main_output(model, call(model_inputs(model, inputs)))
        any_loss(prediction).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
