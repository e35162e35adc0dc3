"""Files of weights as training scripts leave them: prefixed by a wrapper, or inside a checkpoint beside other things."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from kdbench.bounded import ImplausibleFile, check_safetensors, check_stored
from kdbench.errors import UserError, cut
from kdbench.models.torch_files import HOLDS_OBJECT, check_torch_file

# Keys under which checkpoints commonly hold the weights. Where several of them fit the model, the first in this order counts.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net")
_DEPTH = 3  # mappings inside mappings that are looked into
_COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module, anywhere in a network
_COUNTER = "num_batches_tracked"  # of BatchNorm; files written before PyTorch 0.4.1 have none, and only cumulative averages use it


def read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names that the model has for them. Nothing is unpickled but tensors and plain containers.

    Of a checkpoint, the mapping whose names fit the model is chosen. A prefix is removed where every name has it and every name fits the
    model without it. BatchNorm's counters come from `wanted` where the file has none of them.

    Args:
        path: a safetensors file or a torch file.
        wanted: the model's own state.

    Returns:
        All tensors of the file, or of the chosen mapping. Names and shapes may still differ from the model's.

    Raises:
        UserError: the file can't be read, holds Python objects, or holds several mappings of which none can be preferred.
    """
    stored = _chosen(path, _content(path), wanted)
    renamed = {name.replace(_COMPILED, ""): tensor for name, tensor in stored.items()}
    if len(renamed) == len(stored) and not any(_COMPILED in name for name in wanted):
        stored = renamed
    prefix = _prefix(stored, wanted)
    found = {name[len(prefix or "") :]: tensor for name, tensor in stored.items()}
    if not any(name.endswith(_COUNTER) for name in found):
        found |= {name: tensor for name, tensor in wanted.items() if name.endswith(_COUNTER) and _sibling(name) in found}
    return found


def misfit_hint(stored: Collection[str], wanted: Collection[str]) -> str:
    """What to add to an error on names that don't fit: the prefix without which more of them would, or nothing."""
    names = set(wanted)
    fitting = Counter(prefix for name in stored for prefix in _prefixes_of(name) if name[len(prefix) :] in names)
    best = max(sorted(fitting), key=lambda prefix: fitting[prefix], default="")
    if not best or fitting[best] <= fitting[""]:
        return ""
    return (
        f"; {fitting[best]} of the {len(stored)} names in the file fit without the prefix {best!r}. "
        "Remove it, and the names that the model does not have, from the file"
    )


def _sibling(counter: str) -> str:
    return counter.removesuffix(_COUNTER) + "running_mean"


def _prefixes_of(name: str) -> Iterator[str]:
    """`a.b.weight` has the prefixes ``, `a.` and `a.b.`."""
    yield ""
    yield from (name[: dot.end()] for dot in re.finditer(r"\.", name))


def _prefix(stored: Collection[str], wanted: Collection[str]) -> str | None:
    """The shortest prefix of all stored names without which all are the model's, or None."""
    first = next(iter(stored), "")
    for prefix in _prefixes_of(first):
        if all(name.startswith(prefix) and name[len(prefix) :] in wanted for name in stored):
            return prefix
    return None


def _fits(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether the names are the model's up to a prefix. Weights that are tied, and counters, may be missing."""
    names = {name.replace(_COMPILED, "") for name in stored}
    prefix = _prefix(names, {name.replace(_COMPILED, "") for name in wanted})
    return bool(names) and prefix is not None and 2 * len(names) > len(wanted)


def _chosen(path: Path, content: Any, wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The mapping of the file's content to read weights from."""
    found = dict(_mappings(content))
    if not found:
        raise UserError(f"weights {path}: expected names with tensors, at the top of the file or under a key such as 'state_dict'")
    candidates = {keys: tensors for keys, tensors in found.items() if _fits(tensors, wanted)} or found
    if len(candidates) > 1:
        known = {keys: [WRAPPERS.index(key) for key in keys] for keys in candidates if set(keys) <= set(WRAPPERS)}
        if not known:
            names = ", ".join(repr(".".join(keys)) for keys in candidates)
            first = "".join(f"[{key!r}]" for key in next(iter(candidates)))
            raise UserError(
                f"weights {path}: the file has several sets of tensors: {names}. "
                f"Save one of them in a file of its own, such as torch.save(checkpoint{first}, 'weights.pt')"
            )
        return candidates[min(known, key=lambda keys: known[keys])]
    return next(iter(candidates.values()))


def _mappings(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """All mappings of names to tensors in a file's content, with the keys that lead to them."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield keys, content
    elif len(keys) < _DEPTH:
        for key, value in content.items():
            yield from _mappings(value, (*keys, key))


def _content(path: Path) -> Any:
    check_declared(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals([argparse.Namespace]):  # a script's arguments, which lie beside the weights in timm's checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load: whatever the instructions of a file that somebody else made end in
        python = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        reason = f"{HOLDS_OBJECT}, {python[1]}" if python else cut(str(error).strip().partition("\n")[0], 200)
        raise _unreadable(path, reason or type(error).__name__) from error


def check_declared(path: Path) -> None:
    """Raises UserError where what a file says of itself is more than it can hold, before anything is made from it."""
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
            check_stored(path)
        else:
            check_torch_file(path)
    except FileNotFoundError:
        raise UserError(f"weights {path}: there is no such file") from None
    except ImplausibleFile as error:
        raise _unreadable(path, str(error)) from error
    except OSError as error:
        raise UserError(f"weights {path}: can't be read: {error.strerror or error}") from error


def _unreadable(path: Path, reason: str) -> UserError:
    advice = ". Save the weights alone, with torch.save(model.state_dict(), ...): reading an object would run its code"
    expected = "a safetensors file, nor a torch file of plain tensors"
    return UserError(f"weights {path}: not {expected} ({reason}){advice if reason.startswith(HOLDS_OBJECT) else ''}")
