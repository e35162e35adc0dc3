"""Stored weights into a model, strictly: what does not fit is said in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.weight_files import misfit_hint, read_weights


def load_weights(model: nn.Module, path: Path, *, name: str, num_classes: int) -> None:
    """Fill every parameter and buffer of `model` from a safetensors or a torch file, as `weight_files.read_weights` reads it.

    Weights that the model ties are one tensor: the file may name it once, or several times with the same content. Raises UserError where
    the file can't be read, was made for another number of classes or for another model than `name`, or has tied weights that differ.
    """
    stored = check_weights(model, path, name=name, num_classes=num_classes)
    model.load_state_dict(stored, strict=True)


def check_weights(model: nn.Module, path: Path, *, name: str, num_classes: int) -> dict[str, Tensor]:
    """What `load_weights` would put into `model`, which may be on the meta device and stays as it is. Raises UserError as that does.

    A model whose weights come under other names too, such as a detector of torchvision's, has a method `translated_weights`.
    """
    stored = read_weights(path, model.state_dict())
    translated = getattr(model, "translated_weights", None)
    if translated is not None:
        stored = translated(stored)
    return matched(stored, model, path, name=name, num_classes=num_classes)


def matched(stored: Mapping[str, Tensor], model: nn.Module, path: Path, *, name: str, num_classes: int) -> dict[str, Tensor]:
    """The `stored` tensors under all names of the model's, which stays as it is. path: of the file that they came from, for messages.

    Raises UserError as `load_weights` does.
    """
    wanted = model.state_dict()
    stored = _tied_again(stored, aliases(wanted), path, name)
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
    return stored


def inherited(model: nn.Module, teacher: Mapping[str, Tensor], *, name: str, of: str) -> dict[str, Tensor]:
    """The teacher's tensors that a student begins with: those that the student has with the same name and shape.

    Args:
        model: the student, which may be on the meta device and stays as it is.
        teacher: the teacher's state_dict.
        name: the student's label, for messages.
        of: the teacher's.

    Raises:
        UserError: no parameter agrees, so that nothing would be learned from it.
    """
    ours = model.state_dict()
    agree = {key: value for key, value in teacher.items() if isinstance(value, Tensor) and key in ours and ours[key].shape == value.shape}
    if not agree.keys() & dict(model.named_parameters(remove_duplicate=False)).keys():
        raise UserError(
            f"students: {name} has weights: teacher, but none of its parameters has the name and shape of one of {of}'s; "
            "remove `weights`, or name a file"
        )
    return agree


def taken_of(taken: Mapping[str, Tensor], model: nn.Module) -> str:
    """`12 of its 20 tensors`, for people."""
    return f"{len(taken)} of its {len(model.state_dict())} tensors"


def aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tied tensors: each name after a tensor's first one -> that first name.

    Two names are one tensor where they lie in the same memory with the same shape and strides. On the meta device nothing has memory:
    there the same Python storage counts.
    """
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in tensors.items():
        if not tensor.numel():  # an empty tensor has no memory that another one could share
            continue
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in first:
            found[name] = first[place]
        else:
            first[place] = name
    return found


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, no two in the same memory, tied ones once, under their first name.

    Raises UserError for an entry that is no tensor, which a module's `get_extra_state` may give.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"the state {name!r} is a {type(value).__name__}, and weights files hold nothing but tensors; make it a tensor")
    tied = aliases(tensors)
    found: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        if name in tied:
            continue
        here = tensor.detach().cpu().contiguous()
        if here.untyped_storage()._cdata in used:  # two parts of one tensor
            here = here.clone()
        used.add(here.untyped_storage()._cdata)
        found[name] = here
    return found


def _tied_again(stored: Mapping[str, Tensor], tied: Mapping[str, str], path: Path, name: str) -> dict[str, Tensor]:
    """The stored tensors with every name of a tied one. Raises UserError where the file has several, and they differ."""
    found = dict(stored)
    for alias, first in tied.items():
        if alias in found and first in found and not torch.equal(found[alias], found[first]):
            raise UserError(f"weights {path} do not fit model {name!r}: it ties {alias!r} to {first!r}, which differ in the file")
        known = found.get(first, found.get(alias))
        if known is not None:
            found[first] = found[alias] = known
    return found


def state_sha256(model: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers as it holds them: names, shapes, types and content.

    Whatever kind of file they were loaded from, and whatever stood in front of the names there: equal networks have equal hashes.
    """
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The same of some tensors of a network, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):  # what a module keeps beside its tensors
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_classes(path: Path, num_classes: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Raise where the first dimension of the head is all that differs: by far the commonest mistake."""
    stored_classes = {stored.shape[0] for _, stored in pairs if stored.dim()}
    if len(stored_classes) == 1 and all(
        wanted.dim() and wanted.shape[0] == num_classes and wanted.shape[1:] == stored.shape[1:] for wanted, stored in pairs
    ):
        raise UserError(f"weights {path}: the head has {stored_classes.pop()} classes, the data has {num_classes}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
