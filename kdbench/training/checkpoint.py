"""Checkpoints and weights on disk: written beside and renamed, so that a reader sees a whole file or none."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from kdbench.data.columns import Columns, alone, named
from kdbench.errors import UserError, in_one_line, not_written
from kdbench.models.torch_files import check_torch_file
from kdbench.models.weights import portable
from kdbench.storage.folder import file_sha256 as file_sha256
from kdbench.storage.working_copy import fetch_later, upload


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, flush it to disk, and only then give it its name. In a working copy it is uploaded.

    Raises DiskFull where there is no space, StorageFailed where it can't be uploaded, RunFailed where the folder can't be written.
    Leaves no temporary file behind unless the process is killed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise not_written(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    upload(path)


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Keep a training's whole state. Tensors and plain values only: it is read with weights_only."""
    data = BytesIO()  # torch's own writer hides why a write failed
    torch.save(dict(state), data)
    write_atomically(path, lambda temporary: temporary.write_bytes(data.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` kept, here or on another machine.

    None where there is none or it can't be read: training then starts anew, which gives the same.
    """
    try:
        here = fetch_later(path)
        check_torch_file(here)
        state: dict[str, Any] = torch.load(here, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None
    return state


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write a model's tensors as safetensors under plain keys; returns the SHA-256 of the file, the same for the same weights.

    Tied weights are written once, under their first name; `load_weights` and `safetensors.torch.load_model` tie them again.
    No metadata: safetensors writes several entries in an order that differs from process to process.
    """
    data = save_safetensors(portable(tensors))
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return hashlib.sha256(data).hexdigest()


_NUMBERS = (torch.float16, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool)  # of predictions
_OF_SEVERAL = "prediction."


def pack_predictions(prediction: Columns, index: Tensor) -> bytes:
    """Predictions, in the precision that they come in, with the positions of their samples, as safetensors.

    One tensor is called `prediction`, several are `prediction.NAME` each.
    """
    tensors = named(prediction, "prediction")
    if not alone(prediction):
        tensors = {f"{_OF_SEVERAL}{name}": tensor for name, tensor in tensors.items()}
    return save_safetensors({**{name: tensor.contiguous() for name, tensor in tensors.items()}, "index": index.contiguous()})


def unpack_predictions(data: bytes) -> tuple[Columns, Tensor]:
    """What `pack_predictions` packed: predictions [N, ...] and index int64 [N].

    Raises UserError where these are no such predictions.
    """
    try:
        tensors = load_safetensors(data)
        index = tensors.pop("index")
        several = {name.removeprefix(_OF_SEVERAL): tensor for name, tensor in tensors.items() if name.startswith(_OF_SEVERAL)}
        prediction = several or tensors["prediction"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # a dtype that this torch does not have is a KeyError
        raise UserError(f"these are no predictions that kdbench kept ({in_one_line(error)})") from error
    found = named(prediction, "prediction")
    fits = index.dtype == torch.int64 and index.dim() == 1 and len(found) == len(tensors)
    for tensor in found.values():
        fits = fits and tensor.dtype in _NUMBERS and tensor.dim() >= 1 and len(tensor) == len(index)
    if not fits:
        shapes = ", ".join(str([*tensor.shape]) for tensor in found.values())
        raise UserError(f"these are no predictions that kdbench kept (tensors of shapes {shapes} and {[*index.shape]})")
    return prediction, index
