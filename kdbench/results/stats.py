"""The small statistics of a leaderboard: means with t-intervals, differences paired by seed, recovered share of the gap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.95
SMALLEST_GAP = 0.5  # points; below it, the share of the gap that a method recovers is noise divided by noise

Interval = tuple[float, float | None, float | None]
"""A mean with the low and high end of its interval; both ends are None for a single value, which has no spread."""


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent `values` and Student's t-interval that holds the true mean with probability `level`.

    Raises ValueError for no values.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    error = standard_error(values)
    if error is None:
        return mean, None, None
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

    Pairing removes what a seed does to both alike (the order of the data, the initial weights), so the interval is the tighter one.
    """
    common = sorted(a.keys() & b.keys())
    return t_interval([a[seed] - b[seed] for seed in common], level) if common else None


def gap_recovered(
    student: float, undistilled: float, teacher: float, error: float | None = None, higher_is_better: bool = True
) -> float | None:
    """The share of the teacher's lead over the undistilled student that the student has made up; 1 equals the teacher.

    `error`: standard error of `undistilled`. None where the lead is under 0.5 points or two standard errors, or where there is none.
    """
    sign = 1.0 if higher_is_better else -1.0
    lead = sign * (teacher - undistilled)
    if lead < max(SMALLEST_GAP, 2 * (error or 0.0)):
        return None
    return sign * (student - undistilled) / lead
