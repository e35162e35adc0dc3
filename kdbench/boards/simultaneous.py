"""Comparisons of all rows of a board at once: one error from rows and seeds, Dunnett's intervals, ranks as intervals, gaps, Pareto fronts.

The rows share their seeds. A row's own spread over three seeds says little, so the residual of the layout (rows x seeds) is the error of
every row, and a row's own where that is larger. A row whose seeds scatter far more than the others' is judged by its own spread alone.
A column of a layout may be a search, whose finals are averaged, instead of a seed: the code is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdbench.boards.stats import LEVEL, POWER

Floats = NDArray[np.float64]
Law = tuple[tuple[float, int], ...]
"""The comparisons with one control: the share of the control's mean in the error of a difference, and how many have this share."""

_WIDE = 0.001  # over the whole board: the chance that a row is called wide where all spreads are equal
_UNEVEN = 0.05  # likewise, that a board is called uneven
_BORROWED = 6  # degrees of freedom that a row of an uneven board takes from the others, at most
_NODES = {"normal": 200, "spread": 128}  # of Gauss-Legendre: errors below 2e-12
_TAIL = 1e-14  # of the spread's distribution, left out at either end


@dataclass(frozen=True)
class Spreads:
    """The error of each row, as `spreads` finds it. All variances are of one seed's value.

    variances: [K], a row's own, `pool` or `rounding`, whichever is largest. own: [K]. degrees: of `pool`. df: what critical values are
    taken for. wide: [K], rows that are left out of `pool`. uneven: whether the other rows' spreads differ. shared: of what a seed does to
    all rows alike. rounding: of a metric that moves in steps.
    """

    variances: Floats
    own: Floats
    pool: float
    degrees: int
    df: int
    wide: NDArray[np.bool_]
    uneven: bool
    shared: float
    rounding: float

    @property
    def correlation(self) -> float:
        """Of two rows over seeds."""
        return self.shared / (self.shared + self.pool) if self.shared else 0.0

    def with_seeds(self, seeds: int) -> Spreads:
        """As if so many seeds had been trained, with the same spreads; the rows' own variances stay those that were measured."""
        d, kept = seeds - 1, int((~self.wide).sum())
        degrees = (kept - 1) * d
        return replace(self, degrees=degrees, df=min(degrees, d + _BORROWED) if self.uneven else degrees)


@dataclass(frozen=True)
class Difference:
    """How much better a row is than the control. The intervals of all rows hold at once.

    error: the standard error of `middle`. critical: half the interval in standard errors. law, df: of all comparisons with this control.
    alone: whether the row is also judged by its own spread, with `degrees` degrees of freedom; these are `df` where it is not.
    """

    middle: float
    error: float
    critical: float
    law: Law
    df: int
    degrees: int
    alone: bool

    @property
    def low(self) -> float:
        return self.middle - self.critical * self.error

    @property
    def high(self) -> float:
        return self.middle + self.critical * self.error

    @property
    def p(self) -> float:
        """Among all comparisons with this control; below 1 - level exactly where the interval leaves out 0."""
        from scipy.special import stdtr

        far = abs(self.middle) / self.error
        p = 1 - _dunnett_probability(far, self.law, self.df)
        if self.alone:
            comparisons = sum(count for _, count in self.law)
            p = max(p, min(1.0, 2 * comparisons * float(stdtr(self.degrees, -far))))
        return max(0.0, p)


def spreads(values: ArrayLike, step: float = 0.0) -> Spreads | None:
    """The errors of the rows of a complete block.

    Args:
        values: [K, n], a row of the board by a seed. K and n are 2 or more.
        step: The smallest difference that the metric can show, such as 100 / N for the accuracy on N samples; 0 where it is not known.

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
    pool, degrees, rounding = total / ((k - 1) * d), (k - 1) * d, step**2 / 12
    if pool == rounding == 0.0:
        return None
    uneven = p * k < _UNEVEN
    df = min(degrees, d + _BORROWED) if uneven else degrees
    shared = max(0.0, float(k * (centred[kept].mean(axis=0) ** 2).sum() / d - pool) / k)
    return Spreads(np.maximum(own, max(pool, rounding)), own, pool, degrees, df, wide, uneven, shared, rounding)


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


def differences(
    values: ArrayLike,
    control: int,
    found: Spreads,
    *,
    extra: Mapping[int, ArrayLike] | None = None,
    level: float = LEVEL,
    comparisons: int | None = None,
) -> dict[int, Difference]:
    """Every other row against the row `control`, by its place; positive is better.

    Args:
        values: [K, n], more is better.
        control: A place in `values`.
        found: The errors of `values`.
        extra: Values of further seeds that few rows have, [e] by the row's place: the same seeds for each row. Those of the control make
            its mean surer, as far as a seed does not do the same to all; a row that has them too is compared with it over all n + e.
        level: Of all intervals together.
        comparisons: How many they are, where those of other rows were made before; by default, those of the rows here.
    """
    from scipy.special import stdtrit

    block, more = np.asarray(values, dtype=float), {row: np.asarray(each, dtype=float) for row, each in (extra or {}).items()}
    rows, seeds = block.shape
    m, d, e = rows - 1 if comparisons is None else comparisons, seeds - 1, len(more.get(control, ()))
    theirs, used = _with_further_seeds(block, control, found, more), _used(found, seeds, e)
    own_extra = float(more[control].mean()) if e else 0.0
    middles, errors, shares = {}, {}, {}
    for i in range(rows):
        if i == control:
            continue
        middle = float(block[i].mean() - block[control].mean())
        if e and i in more:
            middle = float(np.append(block[i], more[i]).mean() - np.append(block[control], more[control]).mean())
            errors[i] = math.sqrt((_with_further_seeds(block, i, found, more) + theirs) / (seeds + e))
            shares[i] = math.sqrt(seeds * theirs / (1 - used)) / ((seeds + e) * errors[i])
        elif e:
            middle += used * (float(block[control].mean()) - own_extra)
            errors[i] = math.sqrt((found.variances[i] + theirs * (1 - used)) / seeds)
            shares[i] = math.sqrt(theirs * (1 - used) / seeds) / errors[i]
        else:
            errors[i] = math.sqrt((found.variances[i] + theirs) / seeds)
            shares[i] = math.sqrt(0.5)
        middles[i] = middle
    law = _law(shares.values(), m)
    critical = dunnett(m, found.df, level) if not e else _critical(law, found.df, level)
    made = {}
    for i, middle in middles.items():
        own, degrees, alone = critical, found.df, bool(found.wide[i] or found.wide[control])
        if alone:
            degrees = d if found.wide[i] and i not in more else d + e
            own = max(critical, float(stdtrit(degrees, 1 - (1 - level) / (2 * m))))
        made[i] = Difference(middle, errors[i], own, law, found.df, degrees, alone)
    return made


def _used(found: Spreads, seeds: int, extra: int) -> float:
    """The weight of the control's further seeds in its mean: all of what they add where a seed does nothing to all rows alike."""
    return (1 - found.correlation) * extra / (seeds + extra)


def _with_further_seeds(block: Floats, row: int, found: Spreads, more: Mapping[int, Floats]) -> float:
    """The variance of a row's values, from its further seeds too."""
    if not len(more.get(row, ())):
        return float(found.variances[row])
    d, further = block.shape[1] - 1, more[row]
    all_of_it = float(np.append(block[row], further).var(ddof=1))
    own = (d * found.own[row] + len(further) * max(0.0, all_of_it - found.shared)) / (d + len(further))
    return float(max(own, found.pool, found.rounding))


def partial_difference(
    row: ArrayLike, control: ArrayLike, rows: int, found: Spreads, control_variance: float | None = None, level: float = LEVEL
) -> Difference | None:
    """A row that misses seeds against the control, over the n' seeds that both have. None for fewer than two of them.

    row, control: [n'], in the order of the seeds. rows: K of the complete block, from which `found` is. control_variance: of the control,
    where it is a row of that block; where it misses seeds itself, its variance is found as the row's.
    """
    from scipy.special import stdtrit

    ours, theirs = (np.asarray(each, dtype=float) for each in (row, control))
    seeds, comparisons = len(ours), max(1, rows - 1)
    if seeds < 2:
        return None
    middle, least = float(ours.mean() - theirs.mean()), max(found.pool, found.rounding)
    variance = max(least, float(theirs.var(ddof=1))) if control_variance is None else control_variance
    error = math.sqrt((max(least, float(ours.var(ddof=1))) + variance) / seeds)
    critical = max(dunnett(comparisons, found.df, level), float(stdtrit(seeds - 1, 1 - (1 - level) / (2 * comparisons))))
    return Difference(middle, error, critical, _law([math.sqrt(0.5)], comparisons), found.df, seeds - 1, alone=True)


def better(values: ArrayLike, found: Spreads, level: float = LEVEL) -> NDArray[np.bool_]:
    """[K, K]: whether the one row is surely better than the other; whoever is, is truly so for all pairs at once, with probability `level`.

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
    told: NDArray[np.bool_] = means[:, None] - means[None] > critical * errors
    return told


def rank_intervals(told: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """For each row, the best and the worst rank that it may have, from what `better` gives; all intervals hold the true ranks at once."""
    rows = len(told)
    return [(1 + int(told[:, i].sum()), rows - int(told[i].sum())) for i in range(rows)]


def fronts(told: NDArray[np.bool_], surely: NDArray[np.bool_], possibly: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows are surely on the Pareto front of the metric and one cost, and which are surely off it. [K] each; the rest may be.

    Args:
        told: [K, K], from `better`.
        surely: [K, K], whether the second of two rows is surely no dearer than the first.
        possibly: [K, K], whether it may be no dearer.
    """
    others = ~np.eye(len(told), dtype=bool)
    off = np.any(surely & told.T & others, axis=1)
    sure = np.all(~(possibly & others) | told, axis=1)
    return np.asarray(sure & ~off), np.asarray(off)


def gap(
    difference: Difference, values: ArrayLike, control: int, found: Spreads, teacher: float, extra: Mapping[int, ArrayLike] | None = None
) -> tuple[float, float, float] | None:
    """The share of the teacher's lead over the undistilled student that a row has made up, with its interval (Fieller 1954).

    Args:
        difference: The row's, from `differences` with the undistilled student as the control. The interval holds 0 where that one does.
        values: [K, n], more is better.
        control: The place of the undistilled student.
        found: The errors of `values`.
        teacher: Its metric, more is better; it is taken as known.
        extra: As for `differences`.

    Returns:
        None where the lead is not surely above 0.
    """
    block, more = np.asarray(values, dtype=float), {row: np.asarray(each, dtype=float) for row, each in (extra or {}).items()}
    seeds, e = block.shape[1], len(more.get(control, ()))
    used, base = _used(found, seeds, e), float(block[control].mean())
    if e:
        base -= used * (base - float(more[control].mean()))
    both = _with_further_seeds(block, control, found, more) / (seeds + e)
    lead, variance = teacher - base, both + (1 - used) * found.shared / seeds
    ends = fieller(difference.middle, lead, difference.error**2, both, variance, difference.critical)
    return None if ends is None or lead <= 0 else (difference.middle / lead, *ends)


def fieller(a: float, b: float, a_variance: float, covariance: float, b_variance: float, critical: float) -> tuple[float, float] | None:
    """The interval of a / b; None where b is not told apart from 0. variances: of a and b as estimates."""
    squared = b**2 - critical**2 * b_variance
    if squared <= 0:
        return None
    middle = a * b - critical**2 * covariance
    half = math.sqrt(max(0.0, middle**2 - squared * (a**2 - critical**2 * a_variance)))
    return (middle - half) / squared, (middle + half) / squared


def search_variances(values: ArrayLike) -> tuple[float, float]:
    """What another search would change, and what another seed would: the variances (between searches, between seeds).

    values: [K, S, n], a row by a search by a final of it; S and n are 2 or more.
    """
    finals = np.asarray(values, dtype=float)
    rows, searches, seeds = finals.shape
    found = spreads(finals.reshape(rows * searches, seeds))
    between_seeds = found.pool if found is not None else 0.0
    means = finals.mean(axis=2)
    squares = ((means - means.mean(axis=1, keepdims=True)) ** 2).sum() / (rows * (searches - 1))
    return max(0.0, float(seeds * squares - between_seeds) / seeds), between_seeds


def smallest_found(rows: int, seeds: int, found: Spreads, extra: int = 0, power: float = POWER, level: float = LEVEL) -> float:
    """The true difference from the control that is found with probability `power`, where all spreads are equal.

    extra: further seeds of the control.
    """
    from scipy.special import chdtr, chdtrc, nctdtrinc

    d, used = seeds - 1, _used(found, seeds, extra)
    floor = float(chdtr(d, d) + chdtrc(d + 2, d))  # what the larger of pool and own is on average, in units of the pool
    law = _law([math.sqrt((1 - used) / (2 - used))], rows - 1)
    critical = _critical(law, found.df, level) if extra else dunnett(rows - 1, found.df, level)
    spread = max(found.pool, found.rounding)
    return float(nctdtrinc(found.df, 1 - power, critical)) * math.sqrt((2 - used) * floor * spread / seeds)


def seeds_needed(rows: int, found: Spreads, difference: float, further: float = 0.0) -> int | None:
    """The fewest seeds with which a true difference from the control is found with probability POWER; None for more than a thousand.

    further: seeds of the control beside these, as a share of them.
    """

    def found_with(seeds: int) -> float:
        return smallest_found(rows, seeds, found.with_seeds(seeds), round(further * seeds))

    low, high = 2, 1000
    if found_with(high) > difference:
        return None
    while low < high:
        middle = (low + high) // 2
        if found_with(middle) <= difference:
            high = middle
        else:
            low = middle + 1
    return low


@cache
def dunnett(comparisons: int, df: int, level: float = LEVEL) -> float:
    """Dunnett's two-sided critical value, for comparisons with one control whose mean varies as theirs do."""
    return _critical(_law([math.sqrt(0.5)], comparisons), df, level)


@cache
def _critical(law: Law, df: int, level: float) -> float:
    return _root(lambda c: _dunnett_probability(c, law, df), level)


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


def _law(shares: Iterable[float], comparisons: int) -> Law:
    """Of one share a comparison. Where these are some of more comparisons, the first stands for those that are not here."""
    counted = Counter(round(share, 12) for share in shares)
    counted[next(iter(counted))] += comparisons - counted.total()
    return tuple(sorted(counted.items()))


def _dunnett_probability(c: float, law: Law, df: int) -> float:
    """P(max |T_i| <= c) for T_i = (l_i Z_0 + sqrt(1 - l_i^2) Z_i) / S, with the shares l_i of the law."""
    from scipy.special import ndtr

    z, z_weights, s, s_weights = _grid(df)
    inner = np.ones((len(s), len(z)))
    for share, count in law:
        other = math.sqrt(1 - share**2)
        upper, shift = c * s[:, None] / other, share / other * z[None]
        inner *= (ndtr(upper - shift) - ndtr(-upper - shift)) ** count
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
