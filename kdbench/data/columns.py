"""One tensor, or several by name: what a sample's inputs, a task's target and a network's prediction are.

Every tensor has one row a sample and a fixed shape. Nothing outside this file asks which of the two it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Columns = Tensor | dict[str, Tensor]


def mapped(columns: Columns, change: Callable[[Tensor], Tensor]) -> Columns:
    """`change` of the tensor, or of each."""
    return {name: change(tensor) for name, tensor in columns.items()} if isinstance(columns, dict) else change(columns)


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, one after the other; the parts have the same columns."""
    names = named(parts[0], "")
    return like({name: torch.cat([named(part, "")[name] for part in parts]) for name in names}, parts[0])


def named(columns: Columns, only: str) -> dict[str, Tensor]:
    """By name; a single tensor under the name `only`."""
    return columns if isinstance(columns, dict) else {only: columns}


def single(columns: Columns, name: str) -> Tensor:
    """The one tensor, or the one of this name."""
    return columns[name] if isinstance(columns, dict) else columns


def several(columns: Columns | None) -> dict[str, Tensor]:
    """Columns that have names."""
    assert isinstance(columns, dict), "expected several tensors by name"
    return columns


def like(tensors: Mapping[str, Tensor], columns: Columns) -> Columns:
    """`tensors`, which `named` made of such columns, as these: the one tensor, or all by name."""
    return dict(tensors) if isinstance(columns, dict) else next(iter(tensors.values()))


def tensors(columns: Columns) -> tuple[Tensor, ...]:
    """All of them, in their order."""
    return tuple(columns.values()) if isinstance(columns, dict) else (columns,)


def alone(columns: Columns) -> bool:
    """Whether they are one tensor without a name."""
    return not isinstance(columns, dict)


def rounded(columns: Columns) -> Columns:
    """Numbers in half precision, whole numbers and truth values as they are."""
    return mapped(columns, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)


def wide(values: Tensor) -> Tensor:
    """In single precision, or double where it is that."""
    return values if values.dtype == torch.float64 else values.float()


def widened(columns: Columns) -> Columns:
    """Numbers in single precision, or double where they are; whole numbers and truth values as they are."""
    return mapped(columns, lambda tensor: wide(tensor) if tensor.is_floating_point() else tensor)


def described(columns: Columns | None) -> str:
    """Types and shapes of one row, for errors."""
    if columns is None:
        return "none"
    forms = {name: f"{str(t.dtype).removeprefix('torch.')} {[*t.shape[1:]]}".removesuffix(" []") for name, t in named(columns, "").items()}
    return ", ".join(f"{name} {form}".strip() for name, form in forms.items())
