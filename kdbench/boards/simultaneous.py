"""Comparisons of all rows of a board at once: one error from rows and seeds, Dunnett's intervals, ranks as intervals.

The rows share their seeds. A row's own spread over three seeds says little, so the residual of the layout (rows x seeds) is the error of
every row, and a row's own where that is larger. A row whose seeds scatter far more than the others' is judged by its own spread alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdbench.boards.stats import LEVEL, POWER

Floats = NDArray[np.float64]

_WIDE = 0.001  # over the whole board: the chance that a row is called wide where all spreads are equal
_UNEVEN = 0.05  # likewise, that a board is called uneven
_BORROWED = 6  # degrees of freedom that a row of an uneven board takes from the others, at most
_NODES = {"normal": 200, "spread": 128}  # of Gauss-Legendre: errors below 2e-12
_TAIL = 1e-14  # of the spread's distribution, left out at either end


@dataclass(frozen=True)
class Spreads:
    """The error of each row, as `spreads` finds it. All variances are of one seed's value.

    variances: [K], a row's own or `pool`, whichever is larger. own: [K]. degrees: of `pool`. df: what critical values are taken for.
    wide: [K], rows that are left out of `pool`. uneven: whether the other rows' spreads differ.
    """

    variances: Floats
    own: Floats
    pool: float
    degrees: int
    df: int
    wide: NDArray[np.bool_]
    uneven: bool


@dataclass(frozen=True)
class Difference:
    """How much better a row is than the control. The intervals of all rows hold at once; `p` is below 0.05 where one leaves out 0."""

    middle: float
    low: float
    high: float
    p: float


def spreads(values: ArrayLike) -> Spreads | None:
    """The errors of the rows of a complete block.

    Args:
        values: [K, n], a row of the board by a seed. K and n are 2 or more.

    Returns:
        None where all seeds agree exactly, so that nothing is known of the error.
    """
    block = np.asarray(values, dtype=float)
    rows, seeds = block.shape
    d = seeds - 1
    centred = block - block.mean(axis=1, keepdims=True)
    wide = np.zeros(rows, dtype=bool)
    while True:
        kept = ~wide
        k = int(kept.sum())
        squares = ((centred - centred[kept].mean(axis=0)) ** 2).sum(axis=1)
        squares[squares < (1e-9 * np.abs(block).max()) ** 2] = 0.0
        total = float(squares[kept].sum())
        own = squares / (d * np.where(kept, 1 - 1 / k, 1 + 1 / k))
        p = _largest_spread(squares, kept, total, d)
        if p * rows < _WIDE and rows - k < rows // 4:
            wide[np.argmax(np.where(kept, squares, -1.0))] = True
            continue
        break
    pool, degrees = total / ((k - 1) * d), (k - 1) * d
    if pool == 0.0:
        return None
    uneven = p * k < _UNEVEN
    return Spreads(np.maximum(own, pool), own, pool, degrees, min(degrees, d + _BORROWED) if uneven else degrees, wide, uneven)


def _largest_spread(squares: Floats, kept: NDArray[np.bool_], total: float, d: int) -> float:
    """The p-value of the largest ratio of a kept row's variance to the others'; 1 where fewer than four rows are kept."""
    from scipy.special import fdtrc

    k = int(kept.sum())
    if k < 4:
        return 1.0
    rest = (total - squares[kept] * k / (k - 1)) / ((k - 2) * d)
    if (rest <= 0).any():
        return 1.0
    return float(fdtrc(d, (k - 2) * d, (squares[kept] / (d * (1 - 1 / k)) / rest).max()))


def differences(values: ArrayLike, control: int, found: Spreads, level: float = LEVEL) -> dict[int, Difference]:
    """Every other row against the row `control`, by its place; positive is better. values: [K, n], more is better."""
    from scipy.special import stdtr, stdtrit

    block = np.asarray(values, dtype=float)
    rows, seeds = block.shape
    comparisons, d = rows - 1, seeds - 1
    critical = dunnett(comparisons, found.df, level)
    made = {}
    for i in range(rows):
        if i == control:
            continue
        middle = float(block[i].mean() - block[control].mean())
        error = math.sqrt((found.variances[i] + found.variances[control]) / seeds)
        own, p = critical, 1 - _dunnett_probability(abs(middle) / error, comparisons, found.df)
        if found.wide[i] or found.wide[control]:
            own = max(critical, float(stdtrit(d, 1 - (1 - level) / (2 * comparisons))))
            p = max(p, min(1.0, 2 * comparisons * float(stdtr(d, -abs(middle) / error))))
        made[i] = Difference(middle, middle - own * error, middle + own * error, max(0.0, p))
    return made


def partial_difference(row: ArrayLike, control: ArrayLike, rows: int, found: Spreads, level: float = LEVEL) -> Difference | None:
    """A row that misses seeds against the control, over the n' seeds that both have. None for fewer than two of them.

    row, control: [n'], in the order of the seeds. rows: K of the complete block, from which `found` is.
    """
    from scipy.special import stdtr, stdtrit

    ours, theirs = (np.asarray(each, dtype=float) for each in (row, control))
    seeds, comparisons = len(ours), rows - 1
    if seeds < 2:
        return None
    middle = float(ours.mean() - theirs.mean())
    variance = max(found.pool, float(ours.var(ddof=1))) + max(found.pool, float(theirs.var(ddof=1)))
    error = math.sqrt(variance / seeds)
    critical = max(dunnett(comparisons, found.df, level), float(stdtrit(seeds - 1, 1 - (1 - level) / (2 * comparisons))))
    p = max(
        1 - _dunnett_probability(abs(middle) / error, comparisons, found.df),
        min(1.0, 2 * comparisons * float(stdtr(seeds - 1, -abs(middle) / error))),
    )
    return Difference(middle, middle - critical * error, middle + critical * error, p)


def rank_intervals(values: ArrayLike, found: Spreads, level: float = LEVEL) -> list[tuple[int, int]]:
    """For each row, the best and the worst rank that it may have; all intervals hold the true ranks at once with probability `level`.

    values: [K, n], more is better.
    """
    from scipy.special import stdtrit

    block = np.asarray(values, dtype=float)
    rows, seeds = block.shape
    means = block.mean(axis=1)
    critical = np.full((rows, rows), tukey(rows, found.df, level))
    either = found.wide[:, None] | found.wide[None]
    critical[either] = np.maximum(critical[either], float(stdtrit(seeds - 1, 1 - (1 - level) / (2 * (rows - 1)))))
    errors = np.sqrt((found.variances[:, None] + found.variances[None]) / seeds)
    better = means[:, None] - means[None] > critical * errors
    return [(1 + int(better[:, i].sum()), rows - int(better[i].sum())) for i in range(rows)]


def smallest_found(rows: int, seeds: int, found: Spreads, power: float = POWER, level: float = LEVEL) -> float:
    """The true difference from the control that is found with probability `power`, where all spreads are equal."""
    from scipy.special import chdtr, chdtrc, nctdtrinc

    d = seeds - 1
    floor = float(chdtr(d, d) + chdtrc(d + 2, d))  # what the larger of pool and own is on average, in units of the pool
    return float(nctdtrinc(found.df, 1 - power, dunnett(rows - 1, found.df, level))) * math.sqrt(2 * floor * found.pool / seeds)


@cache
def dunnett(comparisons: int, df: int, level: float = LEVEL) -> float:
    """Dunnett's two-sided critical value, for comparisons with one control whose mean varies as theirs do."""
    return _root(lambda c: _dunnett_probability(c, comparisons, df), level)


@cache
def tukey(rows: int, df: int, level: float = LEVEL) -> float:
    """Tukey's critical value for all pairs of `rows`, in units of the standard error of a difference."""
    return _root(lambda q: _range_probability(q, rows, df), level)


def _root(probability: Callable[[float], float], level: float) -> float:
    from scipy.optimize import brentq

    high = 2.0
    while probability(high) < level:
        high *= 2
    return float(brentq(lambda x: probability(x) - level, 0.0, high, xtol=1e-12))


def _dunnett_probability(c: float, comparisons: int, df: int) -> float:
    """P(max |T_i| <= c) for T_i = (Z_0 + Z_i) / (sqrt 2 S)."""
    from scipy.special import ndtr

    z, z_weights, s, s_weights = _grid(df)
    half = math.sqrt(0.5)
    upper, shift = c * s[:, None] / half, z[None]
    inner = (ndtr(upper - shift) - ndtr(-upper - shift)) ** comparisons
    return float(s_weights @ inner @ z_weights)


def _range_probability(q: float, rows: int, df: int) -> float:
    """P(range of `rows` normals <= sqrt 2 q S)."""
    from scipy.special import ndtr

    z, z_weights, s, s_weights = _grid(df)
    inner = (ndtr(z[None]) - ndtr(z[None] - math.sqrt(2) * q * s[:, None])) ** (rows - 1)
    return float(rows * (s_weights @ inner @ z_weights))


@cache
def _grid(df: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Nodes and weights, densities included: of a standard normal, and of S, whose square is chi-squared over its degrees of freedom."""
    from scipy.special import chdtri, gammaln

    z, z_weights = np.polynomial.legendre.leggauss(_NODES["normal"])
    z, z_weights = 9 * z, 9 * z_weights
    low, high = (math.sqrt(float(chdtri(df, tail)) / df) for tail in (1 - _TAIL, _TAIL))
    s, s_weights = np.polynomial.legendre.leggauss(_NODES["spread"])
    s, s_weights = (high - low) / 2 * s + (high + low) / 2, (high - low) / 2 * s_weights
    density = np.exp(math.log(2) + df / 2 * math.log(df / 2) - gammaln(df / 2) + (df - 1) * np.log(s) - df * s**2 / 2)
    return z, z_weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), s, s_weights * density
