"""A board: what was measured under one protocol, ranked, and what may be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdbench.boards.published import PublishedFigure
from kdbench.boards.simultaneous import Difference
from kdbench.records.plan import CONTROL, UNDISTILLED, Plan, controls_of

WITHOUT_DISTILLATION = frozenset({UNDISTILLED, "label_smoothing"})
CONTROLS = WITHOUT_DISTILLATION | {CONTROL}  # methods that are there to be beaten
COSTS = ("latency_ms_p50", "params_count", "device_hours")  # what a better metric is weighed against
RowsBy = Literal["method", "student"]
Estimate = tuple[float | None, float | None, float | None]
"""A middle with the low and the high end; all None where it is not known, the ends where there is no interval."""


@dataclass(frozen=True)
class Row:
    """One method of a board, or one student of a board of students.

    Differences are signed so that positive is better; an end of an interval is None where one seed gives none.
    """

    label: str
    method: str
    rank: int | None  # the best rank that it may have; None: fewer seeds than others, or none that finished, so not comparable
    rank_high: int | None  # the worst
    mean: float | None
    low: float | None  # of Student's interval, for new seeds of this row; not for comparing rows
    high: float | None
    gain: float | None  # over the undistilled student, paired by seed, with the interval of this row alone; None for that student itself
    gain_low: float | None
    gain_high: float | None
    over_undistilled: Difference | None  # the gain whose interval holds together with those of all other rows
    gap_recovered: float | None
    gap_low: float | None
    gap_high: float | None
    vs_control: float | None  # over kd, or the row that is named as control, paired by seed; None for the control itself
    vs_control_low: float | None
    vs_control_high: float | None
    vs_control_p: float | None  # the paired t-test's, of this row alone
    over_control: Difference | None  # the difference whose interval holds together with those of all other rows
    values: Mapping[int, float]  # by seed, what `mean` is the mean of
    seeds: int  # that count in the mean, failed ones included
    failed: int  # seeds that diverged or died; where another seed finished, each counts as the undistilled student of its seed
    params: Mapping[str, Any]  # of the method, and `recipe.x` where the search varied it
    searched: frozenset[str]  # which of `params` the search chose
    trials: int | None  # of the search that chose them
    params_count: int | None  # of the deployed student
    flops: int | None
    latency_ms_p50: float | None  # of the deployed network: the median over all finals of the board that deploy the same one
    device_hours: float | None  # what one tuned student costs: the mean of the final trainings plus the whole search
    pareto: tuple[str, ...]  # the COSTS for which no other ranked row has a mean at least as good and is as cheap, and better in one
    pareto_sure: tuple[str, ...]  # those for which it is better than each row that may be as cheap, as far as seeds can tell
    pareto_off: tuple[str, ...]  # those for which a row that is as cheap is surely better
    run_ids: tuple[str, ...]
    better_than: frozenset[str] = frozenset()  # labels of the rows that it is surely better than; ranks count these
    moved_by_samples: float | None = None  # by how much other test samples alone would move the difference to the control
    looked: int = 0  # where seeds are added until rows are decided, the seeds of its last look, which its differences are from
    undecided: bool = False  # whether it was not decided there

    @property
    def verdict(self) -> int:
        """Against the control: 1 surely better, -1 surely worse, 0 can't be told."""
        return verdict(self.over_control)

    @property
    def network(self) -> tuple[object, ...]:
        """What it deploys, by parameters and FLOPs; where one of them is unknown, a network of its own."""
        known = (self.params_count, self.flops)
        return (self.label,) if None in known else known

    @property
    def shown_gain(self) -> Estimate:
        """The gain as boards print it: with the interval that holds for all rows at once, where there is one."""
        return _shown(self.over_undistilled, self.gain)

    @property
    def shown_difference(self) -> Estimate:
        """The difference to the control as boards print it."""
        return _shown(self.over_control, self.vs_control)

    def apart_from(self, other: Row) -> bool:
        """Whether the two rows of one board are told apart: what every ranking, recommendation and picture asks."""
        return other.label in self.better_than or self.label in other.better_than


def verdict(difference: Difference | None) -> int:
    """1: surely better, -1: surely worse, 0: can't be told. A verdict is an interval that leaves out 0."""
    if difference is None:
        return 0
    return (difference.low > 0) - (difference.high < 0)


def _shown(together: Difference | None, alone: float | None) -> Estimate:
    return (alone, None, None) if together is None else (together.middle, together.low, together.high)


@dataclass(frozen=True)
class BesideRow:
    """Finals that stand below a board, and are part of no comparison of its rows.

    kind: `default`, a method at its published default; `cost`, the undistilled student for as long as the best method took in all. label:
    of the row that they stand beside: this method. ahead: how much better that row is, paired by seed, with Student's interval of this one
    difference; None where no seed is shared. cut: whether they would have been trained longer still, had there been no bound.
    """

    kind: Literal["default", "cost"]
    label: str
    mean: float | None
    seeds: int
    ahead: Estimate
    params: Mapping[str, Any]
    cut: bool = False


@dataclass(frozen=True)
class Errors:
    """What the intervals of a board rest on.

    pool: the variance of one seed's value, over all rows but the wide ones. df: degrees of freedom of the critical values. degrees: of
    `pool`. comparisons: of each column. seeds: of the rows that are compared; further: of the controls beside these.
    """

    pool: float
    degrees: int
    df: int
    uneven: bool
    wide: tuple[str, ...]
    comparisons: int
    seeds: int
    further: int = 0


@dataclass(frozen=True)
class Board:
    """Everything measured under one protocol for one teacher and one student, or one method, ranked, the incomplete last."""

    protocol_hash: str
    family: str  # the same for boards whose protocols differ in data, split and networks alone
    task: str
    data: str
    teacher: str | None
    teacher_metric: float | None
    teacher_sha: str | None
    student: str  # empty on a board of students
    primary: str
    higher_is_better: bool
    undistilled: str | None  # label of the row that `gain` is over
    control: str | None  # label of the row that `vs_control` is over
    lead: float | None  # of the teacher over the undistilled student; None where it is not told apart from none
    errors: Errors | None  # None where nothing is told apart: one seed, one row, or seeds that agree exactly
    detectable: float | None  # the smallest true difference to the control that this many seeds find four times in five
    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    published: tuple[PublishedFigure, ...] = ()
    data_hash: str = ""  # of the content of the data set; metrics on other content do not compare
    trainings: frozenset[str] = field(default=frozenset())  # the unit keys of all finals
    method: str | None = None  # on a board of students, the label of the method that all of them were trained with; None on one of methods
    trained: str = ""  # the same for boards whose students were trained alike, however they were searched
    ruleset: str = ""  # by which rule they were searched
    plan: Plan | None = None  # how many finals it was meant to have; None where nobody kept that
    beside: tuple[BesideRow, ...] = ()  # finals that stand below it
    searches: tuple[float, ...] | None = None  # variances between searches and between seeds, or their sum; None for one search a method

    @property
    def rows_by(self) -> RowsBy:
        """What a row is."""
        return "method" if self.method is None else "student"

    @property
    def title(self) -> str:
        """`classification on fashion_mnist: cifar_resnet56 -> cifar_resnet8`, or `... -> students, by kd`."""
        into = self.student if self.method is None else f"students, by {self.method}"
        return f"{self.task} on {self.data}: {self.teacher or 'no teacher'} -> {into}"

    @property
    def decimals(self) -> int:
        """Of its metric: percent and points have two; one that lives below 2, such as an error or a loss, needs four."""
        return 2 if any(abs(row.mean) >= 2 for row in self.rows if row.mean is not None) else 4

    @property
    def best_distilled(self) -> Row | None:
        """The distilled row with the best mean among the ranked ones; None where there is none."""
        return next((row for row in self.rows if row.rank is not None and row.method not in WITHOUT_DISTILLATION), None)

    def meant(self, row: Row) -> int:
        """How many seeds the row is meant to have: by the plan, or without one as many as the others, the controls aside."""
        controls = controls_of([(each.label, each.method) for each in self.rows])
        if self.plan is None:
            rivals = [each.seeds for each in self.rows if each.label not in controls or self.rows_by == "student"]
            return max(rivals, default=row.seeds)
        if self.plan.looks:
            return row.looked or self.plan.seeds
        return self.plan.control_seeds if row.label in controls and self.plan.searches == 1 else self.plan.seeds * self.plan.searches

    @property
    def leaders(self) -> tuple[Row, ...]:
        """The rows that may be the best, best mean first."""
        return tuple(row for row in self.rows if row.rank == 1)

    def row(self, label: str | None) -> Row | None:
        """The row of that label; None where there is none."""
        return next((row for row in self.rows if row.label == label), None)

    def trained_by(self, method: str) -> bool:
        """Whether this is a board of students of the method, by its label or name."""
        return self.method is not None and method in (self.method, self.rows[0].method)

    def names(self, row: Row) -> frozenset[str]:
        """By what a person may ask for the row: its label, and a method's name too."""
        return frozenset({row.label, row.method} if self.method is None else {row.label})
