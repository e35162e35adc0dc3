"""Stored weights into a model, strictly: what does not fit is said in one line."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.weight_files import misfit_hint, read_weights


def load_weights(model: nn.Module, path: Path, *, name: str, num_classes: int) -> None:
    """Fill every parameter and buffer of `model` from a safetensors or a torch file, as `weight_files.read_weights` reads it.

    Raises UserError where the file can't be read, was made for another number of classes, or for another model than `name`.
    """
    wanted = model.state_dict()
    stored = read_weights(path, wanted)
    misshaped = [key for key in wanted if key in stored and stored[key].shape != wanted[key].shape]
    missing = [key for key in wanted if key not in stored]
    unexpected = [key for key in stored if key not in wanted]
    if misshaped and not missing and not unexpected:
        _check_classes(path, num_classes, [(wanted[key], stored[key]) for key in misshaped])
    for keys, what in ((missing, "is missing"), (unexpected, "is not part of it"), (misshaped, "has another shape")):
        if keys:
            first = keys[0]
            shapes = f": {_shape(stored[first])} in the file, {_shape(wanted[first])} in the model" if keys is misshaped else ""
            hint = misfit_hint(stored, wanted) if keys is not misshaped else ""
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise UserError(f"weights {path} do not fit model {name!r}: {first!r} {what}{shapes}{more}{hint}")
    model.load_state_dict(stored, strict=True)


def _check_classes(path: Path, num_classes: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Raise where the first dimension of the head is all that differs: by far the commonest mistake."""
    stored_classes = {stored.shape[0] for _, stored in pairs if stored.dim()}
    if len(stored_classes) == 1 and all(
        wanted.dim() and wanted.shape[0] == num_classes and wanted.shape[1:] == stored.shape[1:] for wanted, stored in pairs
    ):
        raise UserError(f"weights {path}: the head has {stored_classes.pop()} classes, the data has {num_classes}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
