"""Statistics of one row or one pair of rows: intervals, differences paired by seed, Pareto fronts by means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
POWER = 0.8  # the usual chance to find a difference that is there (Cohen 1988)

Interval = tuple[float, float | None, float | None]
"""A mean with the low and high end of its interval; both ends are None for a single value, which has no spread."""


def t_interval(values: Sequence[float], level: float = LEVEL, variance: float | None = None) -> Interval:
    """The mean of independent `values` and Student's t-interval that holds the true mean with probability `level`.

    variance: of one value, where it is known better than from these.

    Raises ValueError for no values.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    error = standard_error(values)
    if error is None:
        return mean, None, None
    if variance is not None:
        error = math.sqrt(variance / len(values))
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.5 + level / 2)) * error
    return mean, mean - half, mean + half


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, from the unbiased variance; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = LEVEL) -> Interval | None:
    """The mean of `a[seed] - b[seed]` over the seeds that both have, with its t-interval; None where they share no seed.

    Pairing removes what a seed does to both alike (the order of the data, the initial weights). It costs degrees of freedom, so where a
    seed does little to both the interval may be wider than that of two independent means.
    """
    common = sorted(a.keys() & b.keys())
    return t_interval([a[seed] - b[seed] for seed in common], level) if common else None


def paired_p_value(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """The two-sided p-value of the paired t-test over the seeds that both have; None for fewer than two of them.

    It is below 0.05 exactly where `paired_difference`'s 95% interval leaves out 0.
    """
    common = sorted(a.keys() & b.keys())
    differences = [a[seed] - b[seed] for seed in common]
    error = standard_error(differences)
    if error is None:
        return None
    mean = float(np.mean(differences))
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    from scipy.special import stdtr

    return 2 * float(stdtr(len(common) - 1, -abs(mean) / error))


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one dominates; more is better in every coordinate, so a cost goes in negated. Equal points share their fate.

    points: [N, D]. A point dominates another if it is at least as good in every coordinate and better in one.
    """
    values = np.asarray(points, dtype=float)
    if len(values) == 0:
        return []
    at_least = (values[:, None] >= values[None]).all(axis=2)
    better = (values[:, None] > values[None]).any(axis=2)
    dominated: NDArray[np.bool_] = np.any(at_least & better, axis=0)
    return [not row for row in dominated.tolist()]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume that `points` [N, D] dominate above `reference` [D]; more is better in every coordinate.

    By slicing along the last coordinate, which is exact and quick for the fronts of a board. What lies below the reference adds nothing.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(reference)) - np.asarray(reference, dtype=float)
    return _volume(values[(values > 0).all(axis=1)])


def _volume(points: NDArray[np.float64]) -> float:
    """The union of the boxes from the origin to each of the points [N, D], all of whose coordinates are positive."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    heights = np.unique(points[:, -1])
    thickness = np.diff(heights, prepend=0.0)
    return sum(float(thick) * _volume(points[points[:, -1] >= height, :-1]) for thick, height in zip(thickness, heights, strict=True))
