"""What a search of m trials would have found: from the trials of a stored study, without a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdbench.boards.stats import LEVEL

Floats = NDArray[np.float64]


def expected_best(values: ArrayLike, default: float | None = None) -> list[float]:
    """The mean of the best of m trials, for m = 1 ... N, over all orders of N trials that were drawn at random (Tang et al. 2020).

    Args:
        values: [N], the validation metrics of trials in random order, more is better.
        default: That of a trial with the default parameters, which is the first of every search: the best of m trials is then the
            better of it and m - 1 of `values`, for m = 1 ... N + 1.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    if default is None:
        return [float(ordered @ _shares_of_best(len(ordered), m)) for m in range(1, len(ordered) + 1)]
    at_least = np.maximum(ordered, default)
    return [default, *(float(at_least @ _shares_of_best(len(ordered), m)) for m in range(1, len(ordered) + 1))]


def chance_of_being_ahead(ours: ArrayLike, theirs: ArrayLike) -> list[float]:
    """The chance that the best of m of `ours` is above the best of m of `theirs`, ties counted half, for m = 1 ... the smaller N.

    ours, theirs: [N] each, as for `expected_best`.
    """
    a, b = (np.sort(np.asarray(each, dtype=float)) for each in (ours, theirs))
    ahead = (a[:, None] > b[None]) + (a[:, None] == b[None]) / 2
    return [float(_shares_of_best(len(a), m) @ ahead @ _shares_of_best(len(b), m)) for m in range(1, min(len(a), len(b)) + 1)]


def interval_of_the_median_best(values: ArrayLike, trials: int, level: float = LEVEL) -> tuple[float | None, float | None]:
    """The interval of the median of the best of `trials` trials, exact whatever the distribution: two of the order statistics.

    An end is None where N trials are too few for it; the upper one needs about log2(2 / (1 - level)) times `trials`.
    """
    from scipy.special import bdtr

    ordered = np.sort(np.asarray(values, dtype=float))
    count, p, tail = len(ordered), 0.5 ** (1 / trials), (1 - level) / 2
    at_most = [float(bdtr(r, count, p)) for r in range(count + 1)]  # P(Bin(N, p) <= r)
    low = max((r for r in range(1, count + 1) if 1 - at_most[r - 1] >= 1 - tail), default=None)
    high = min((r for r in range(1, count + 1) if at_most[r - 1] >= 1 - tail), default=None)
    return None if low is None else float(ordered[low - 1]), None if high is None else float(ordered[high - 1])


def running_best(values: Sequence[float]) -> list[float]:
    """The best value until each trial, in the order in which a search made them; more is better."""
    return [float(best) for best in np.maximum.accumulate(np.asarray(values, dtype=float))]


def _shares_of_best(count: int, m: int) -> Floats:
    """[count]: the chance that the i-th smallest of `count` values is the largest of m of them, drawn without replacement."""
    return np.array([math.comb(i - 1, m - 1) / math.comb(count, m) for i in range(1, count + 1)])
