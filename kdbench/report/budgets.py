"""How good each method is after so many trials of its search: from stored studies, without a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from kdbench.boards.stats import t_interval
from kdbench.boards.tuning_curve import chance_of_being_ahead, expected_best, interval_of_the_median_best, running_best
from kdbench.report.charts import Curve

if TYPE_CHECKING:
    from kdbench.report.searches import Search

_FEWEST_STUDIES = 3  # whose mean has an interval that says something
_SHOWN = (1, 2, 5, 10, 20, 50, 100, 200)  # trials of which the table tells


@dataclass(frozen=True)
class Budget:
    """The best validation value of a method after 1, 2, ... trials, and between which values it lies with 95%, where that is known."""

    curve: Curve
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    expected: bool  # over all orders of trials that were drawn at random; else as the search went
    trials: tuple[float, ...] = ()  # of trials that were drawn at random, their values, more is better


def budget(number: int, label: str, studies: Sequence[Search], sampler: str | None, higher_is_better: bool) -> Budget | None:
    """The curve of one method; None where no study has a trial with a value.

    Trials of a random search come in any order: the expected best of m of them, the default always the first, with the exact interval of
    the median. Any other sampler's order is no accident: its running best, the mean over its studies, with Student's interval from three
    on.
    A trial that was stopped early counts with its last value, which is a lower bound; one that failed does not count.
    """
    sign = 1.0 if higher_is_better else -1.0
    values = [[sign * trial.value for trial in study.trials if trial.value is not None and trial.state != "failed"] for study in studies]
    values = [of_study for of_study in values if of_study]
    if not values:
        return None
    length = min(map(len, values))
    if sampler == "random":
        curves = [expected_best(of_study[1:], of_study[0]) for of_study in values]
        pooled = [value for of_study in values for value in of_study[1:]]
        ends = [interval_of_the_median_best(pooled, m) if pooled else (None, None) for m in range(1, length + 1)]
    else:
        curves = [running_best(of_study) for of_study in values]
        several = len(values) >= _FEWEST_STUDIES
        ends = [t_interval([curve[m] for curve in curves])[1:] if several else (None, None) for m in range(length)]
    middle = [sign * fmean(curve[m] for curve in curves) for m in range(length)]
    turned = [(_times(sign, low), _times(sign, high)) if sign > 0 else (_times(sign, high), _times(sign, low)) for low, high in ends]
    steps = tuple(float(m) for m in range(1, length + 1))
    drawn = tuple(value for of_study in values for value in of_study) if sampler == "random" else ()
    lows, highs = tuple(low for low, _ in turned), tuple(high for _, high in turned)
    return Budget(Curve(label, number, steps, tuple(middle)), lows, highs, sampler == "random", drawn)


def _times(sign: float, value: float | None) -> float | None:
    return None if value is None else sign * value


@dataclass(frozen=True)
class AfterTrials:
    """What the table says of a method after so many trials.

    rank: among the methods that have so many. ahead: the chance that so many trials of it have a better best than as many of the control;
    None for the control itself, and where trials are no random draws.
    """

    value: float
    low: float | None
    high: float | None
    rank: int
    ahead: float | None = None


def after_trials(
    budgets: Sequence[Budget], higher_is_better: bool, control: str | None = None
) -> tuple[tuple[int, ...], list[list[AfterTrials | None]]]:
    """The numbers of trials that the table tells of, and for each method what it reached by then; None where its search was shorter."""
    most = max((len(each.curve.values) for each in budgets), default=0)
    shown = tuple(count for count in _SHOWN if count < most) + ((most,) if most else ())
    sign, rows = 1.0 if higher_is_better else -1.0, []
    against = next((each for each in budgets if each.curve.method == control), None)
    for each in budgets:
        row: list[AfterTrials | None] = []
        both = against is not None and each is not against and each.trials and against.trials
        chances = chance_of_being_ahead(each.trials, against.trials) if both and against is not None else []
        for count in shown:
            if count > len(each.curve.values):
                row.append(None)
                continue
            value, others = each.curve.values[count - 1], [b.curve.values[count - 1] for b in budgets if len(b.curve.values) >= count]
            rank = 1 + sum(sign * other > sign * value for other in others)
            ahead = chances[count - 1] if count <= len(chances) else None
            row.append(AfterTrials(value, each.low[count - 1], each.high[count - 1], rank, ahead))
        rows.append(row)
    return shown, rows
