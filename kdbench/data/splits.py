"""Cutting a set in two by class, the same way in every process that asks."""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench.data.hashing import hash64


def stratified(target: Tensor, size: int, seed: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose `size` rows so that each class keeps its share to within one row; returns (chosen rows, the other rows), both sorted.

    target: int64 [N], the class of each row. Which rows of a class are chosen is decided by a hash of (seed, row), or of (seed, index)
    where index, int64 [N], is given, so it doesn't depend on a library's random stream. Raises ValueError unless 0 <= size <= N.
    """
    total = len(target)
    if not 0 <= size <= total:
        raise ValueError(f"can't choose {size} of {total} rows")
    rank = torch.empty(total, dtype=torch.long)
    quota = _quotas(torch.bincount(target), size)
    shuffled = hash64(seed, torch.arange(total) if index is None else index).argsort(stable=True)
    by_class = shuffled[target[shuffled].argsort(stable=True)]
    counts = torch.bincount(target)
    starts = counts.cumsum(0) - counts
    rank[by_class] = torch.arange(total) - starts[target[by_class]]
    chosen = rank < quota[target]
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def _quotas(counts: Tensor, size: int) -> Tensor:
    """How many of each class, by largest remainder; a tie goes to the lower class."""
    total = int(counts.sum())
    exact = counts * size
    quota = exact // max(total, 1)
    left = size - int(quota.sum())
    most_left_over = (exact - quota * total).argsort(descending=True, stable=True)[:left]
    quota[most_left_over] += 1
    return quota
