"""The statistics of a method across pairs of teacher and student: aggregates with bootstrap intervals, profiles, ranks.

The scores of a method are strata, one a pair: each holds the values of that pair's seeds, of which pairs may have different numbers.
After Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021, arXiv 2108.13264) and
Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 7, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdbench.boards.stats import LEVEL, Interval

RESAMPLES = 2000
SMALLEST_NUMBER_OF_PAIRS = 6  # below it, average ranks say more about the choice of pairs than about methods

Strata = Sequence[Sequence[float]]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From samples [..., N] to one number each, [...]."""


def interquartile_mean(values: ArrayLike) -> NDArray[np.float64]:
    """The mean of the middle half of `values` [..., N], over the last axis: a quarter of them, rounded down, is cut at either end."""
    ordered = np.sort(np.asarray(values, dtype=float), axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1))


def stratified_bootstrap(
    scores: Strata,
    statistic: Statistic = interquartile_mean,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The statistic of all scores together and its interval, by drawing the seeds of each pair anew. The pairs themselves are given.

    The interval is Student's, from the standard deviation of the statistic over the resamples, as a bootstrap's percentiles are too
    narrow for the few seeds there are: its variance lacks the factor n / (n - 1), and its tails are the normal's (Hesterberg, "What
    Teachers Should Know About the Bootstrap", The American Statistician 69, 2015). Both are put right by the degrees of freedom of all
    strata together. Both ends are None where no pair has two seeds. Raises ValueError where a pair has none, or there is no pair.
    """
    strata = [np.asarray(stratum, dtype=float) for stratum in scores]
    if not strata or any(len(stratum) == 0 for stratum in strata):
        raise ValueError("a bootstrap over pairs needs at least one value of each pair")
    middle = float(statistic(np.concatenate(strata)))
    total = sum(len(stratum) for stratum in strata)
    degrees = total - len(strata)
    if degrees == 0:
        return middle, None, None
    from scipy.special import stdtrit

    rng = np.random.default_rng(seed)
    drawn = [stratum[rng.integers(len(stratum), size=(resamples, len(stratum)))] for stratum in strata]
    error = float(np.std(statistic(np.concatenate(drawn, axis=1)), ddof=1)) * math.sqrt(total / degrees)
    half = float(stdtrit(degrees, 0.5 + level / 2)) * error
    return middle, middle - half, middle + half


def probability_of_improvement(scores: Strata, baseline: Strata) -> float:
    """How probable it is that a seed of the method scores above one of `baseline` on a pair drawn at random; ties count half.

    The mean over pairs of the Mann-Whitney statistic divided by the number of couples of seeds. More is better. The two hold the same
    pairs in the same order. Raises ValueError otherwise.
    """
    if len(scores) != len(baseline) or not scores:
        raise ValueError(f"expected the same pairs twice, got {len(scores)} and {len(baseline)}")
    shares = []
    for ours, theirs in zip(scores, baseline, strict=True):
        difference = np.subtract.outer(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float))
        shares.append(float((np.sign(difference) / 2 + 0.5).mean()))
    return float(np.mean(shares))


def performance_profile(scores: Strata, thresholds: Sequence[float]) -> list[float]:
    """For each threshold, the share of runs that score above it, every pair counting the same."""
    if not scores:
        raise ValueError("a profile needs at least one pair")
    above = [(np.asarray(stratum, dtype=float)[:, None] > np.asarray(thresholds, dtype=float)).mean(axis=0) for stratum in scores]
    return [float(share) for share in np.mean(above, axis=0)]


@dataclass(frozen=True)
class AverageRanks:
    """ranks: of each method, averaged over the pairs, 1 is best, in the order given. p_value: Friedman's, that all are equal.

    critical_difference: Nemenyi's. Two methods whose average ranks are closer than it can't be told apart.
    """

    ranks: tuple[float, ...]
    p_value: float
    critical_difference: float


def average_ranks(scores: ArrayLike, level: float = LEVEL) -> AverageRanks:
    """Ranks of methods from their scores [pairs, methods], more is better; tied methods share the mean of their ranks.

    Raises ValueError for fewer than six pairs or three methods: Friedman's test is not one then.
    """
    values = np.asarray(scores, dtype=float)
    pairs, methods = values.shape
    if pairs < SMALLEST_NUMBER_OF_PAIRS or methods < 3:
        raise ValueError(f"average ranks need {SMALLEST_NUMBER_OF_PAIRS} pairs and 3 methods or more, got {pairs} and {methods}")
    from scipy.stats import friedmanchisquare, rankdata

    ranks = rankdata(-values, axis=1)
    alike = bool((values == values[:, :1]).all())  # Friedman's statistic is 0 / 0 then
    p_value = 1.0 if alike else float(friedmanchisquare(*values.T).pvalue)
    return AverageRanks(tuple(float(rank) for rank in ranks.mean(axis=0)), p_value, critical_difference(methods, pairs, level))


def critical_difference(methods: int, pairs: int, level: float = LEVEL) -> float:
    """Nemenyi's: q sqrt(k (k + 1) / 6 N) for k methods on N pairs, q from the Studentised range over sqrt(2) (Demšar 2006, table 5)."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(level, methods, np.inf)) * math.sqrt(methods * (methods + 1) / (12 * pairs))
