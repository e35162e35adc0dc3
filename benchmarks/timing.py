"""Interleaved measurements: the arms take turns, so that other load meets all of them, and only ratios within a round count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Clock = Literal["cpu", "wall"]
_COVERAGE = 0.95


@dataclass(frozen=True)
class Spent:
    """Seconds of one piece of work, by the clock on the wall and of this process's CPU time."""

    wall: float
    cpu: float

    def over(self, amount: float) -> Spent:
        """Seconds for one of `amount` equal parts."""
        return Spent(self.wall / amount, self.cpu / amount)


Arm = Callable[[], Spent]


def timed(work: Callable[[], object]) -> Spent:
    """Do the work once."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def arm(work: Callable[[], object], amount: float = 1.0) -> Arm:
    """Work to be timed, of which one call handles `amount` samples; gives seconds a sample."""
    return lambda: timed(work).over(amount)


@dataclass(frozen=True)
class Sample:
    """Repeated values of one quantity. Printed as median and range: noise here is skewed, and a mean would follow the worst round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def resolution(self) -> float:
        """Half the width of the median's 95% interval, as a share of the median; infinite for fewer than 6 values, which have none.

        The interval lies between two order statistics, by the binomial distribution: it assumes independent rounds and no more.
        """
        bounds = _median_interval(sorted(self.values))
        if bounds is None or self.median == 0:
            return math.inf
        return (bounds[1] - bounds[0]) / 2 / abs(self.median)


def _median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    count = len(ordered)
    below, cumulated = -1, 0.0  # the largest k such that at most k values lie under the median in no more than 2.5% of cases
    for k in range(count):
        cumulated += math.comb(count, k) / 2**count
        if cumulated > (1 - _COVERAGE) / 2:
            break
        below = k
    return (ordered[below], ordered[count - 1 - below]) if below >= 0 else None


@dataclass(frozen=True)
class Rounds:
    """What each arm spent, round by round."""

    spent: Mapping[str, Sequence[Spent]]

    def seconds(self, name: str, clock: Clock = "cpu") -> Sample:
        return Sample(tuple(getattr(one, clock) for one in self.spent[name]))

    def ratio(self, above: str, below: str, clock: Clock = "cpu") -> Sample:
        """Seconds of `above` over those of `below`, within each round."""
        return self.combined(lambda s: s[above] / s[below], clock)

    def combined(self, formula: Callable[[Mapping[str, float]], float], clock: Clock = "cpu") -> Sample:
        """Any formula of the arms' seconds, within each round."""
        rounds = zip(*self.spent.values(), strict=True)
        return Sample(tuple(formula({n: getattr(s, clock) for n, s in zip(self.spent, one, strict=True)}) for one in rounds))


def interleave(
    arms: Mapping[str, Arm],
    seconds: float,
    *,
    least: int = 3,
    most: int = 200,
    warm_up: bool = True,
    enough: Callable[[Rounds], bool] | None = None,
) -> Rounds:
    """Let every arm work once a round, until `seconds` are over, `most` rounds are done or `enough` is measured; at least `least` rounds.

    The order is turned round by round, so that no arm always follows the same other. warm_up: one round before, which is not counted.
    """
    end = time.monotonic() + seconds
    names = list(arms)
    for name in names if warm_up else ():
        arms[name]()
    rounds = Rounds({name: [] for name in names})
    spent: dict[str, list[Spent]] = rounds.spent  # type: ignore[assignment]
    done = 0
    while done < least or (done < most and time.monotonic() < end and not (enough is not None and enough(rounds))):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            spent[name].append(arms[name]())
        done += 1
    return rounds


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of the power law seconds ~ size^p, by least squares on logarithms. 1 is linear."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)
