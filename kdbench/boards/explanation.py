"""Where every figure of a board's row comes from: the runs, their values by seed, and how the figure follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from kdbench.boards.board import Board, Row
from kdbench.boards.filters import check_row
from kdbench.boards.finals import search_hours
from kdbench.boards.formatting import interval, ranks, short
from kdbench.boards.simultaneous import Difference
from kdbench.errors import UserError
from kdbench.records.record import RunRecord


@dataclass(frozen=True)
class Run:
    """One seed of the row. `value` is what counts: of `counted`, which is another run where this one failed; None where nothing does.

    undistilled, control: the runs of the same seed that gain and vs_kd are over, with their values.
    """

    seed: int
    run_id: str
    status: str
    failure: str | None
    value: float | None
    counted: str | None
    undistilled: tuple[str, float] | None
    control: tuple[str, float] | None
    predictions: str | None
    predictions_sha256: str | None


@dataclass(frozen=True)
class Figure:
    """One figure of the row: its name as in JSON, what it is, how it follows, and the runs that it follows from."""

    name: str
    value: str
    how: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """A row of one board, traced. findings: those of the whole board."""

    title: str
    protocol_hash: str
    method: str
    runs: tuple[Run, ...]
    figures: tuple[Figure, ...]
    findings: tuple[str, ...] = ()


def explain(boards: Sequence[Board], records: Iterable[RunRecord], method: str) -> list[Explanation]:
    """The rows with that label or method, one explanation each. Raises UserError where no board has one.

    records: all that the boards were made from, and the teachers'.
    """
    by_id = {record.run_id: record for record in records}
    found = [_explanation(board, row, by_id) for board in boards for row in board.rows if method in (row.label, row.method)]
    if not found:
        check_row(boards, method, "--explain")
        raise UserError(f"--explain {method}: no board has this method")
    return found


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """As plain data for JSON."""
    return asdict(explanation)


def _explanation(board: Board, row: Row, by_id: Mapping[str, RunRecord]) -> Explanation:
    runs = tuple(_run(by_id[run_id], row, board, by_id) for run_id in row.run_ids)
    figures = tuple(_Trace(board, row, runs, by_id).figures())
    return Explanation(board.title, board.protocol_hash, row.label, runs, figures, board.findings)


def _run(record: RunRecord, row: Row, board: Board, by_id: Mapping[str, RunRecord]) -> Run:
    seed = record.seed
    undistilled, control = (_of_seed(board, label, seed, by_id) for label in (board.undistilled, board.control))
    value = row.values.get(seed)
    failed = value is None or record.status == "failed" or record.test_metric is None or not math.isfinite(record.test_metric)
    counted = None if value is None else (undistilled[0] if undistilled else None) if failed else record.run_id
    return Run(
        seed,
        record.run_id,
        record.status,
        record.failure,
        value,
        counted,
        undistilled if row.label != board.undistilled else None,
        control if row.label != board.control else None,
        record.predictions_uri,
        record.predictions_sha256,
    )


def _of_seed(board: Board, label: str | None, seed: int, by_id: Mapping[str, RunRecord]) -> tuple[str, float] | None:
    row = board.row(label)
    if row is None or seed not in row.values:
        return None
    return next((run_id, row.values[seed]) for run_id in row.run_ids if by_id[run_id].seed == seed)


class _Trace:
    """The figures of one row, in the order of the board's columns."""

    def __init__(self, board: Board, row: Row, runs: Sequence[Run], by_id: Mapping[str, RunRecord]) -> None:
        self.board, self.row, self.runs, self.by_id = board, row, runs, by_id
        self.decimals = board.decimals
        self.sign = 1.0 if board.higher_is_better else -1.0
        self.counted = tuple(run.counted for run in runs if run.counted is not None)

    def figures(self) -> list[Figure]:
        found = [
            self._rank(),
            self._mean(),
            self._paired("gain", "undistilled", "gain"),
            self._together("gain_all", self.row.over_undistilled, self.board.undistilled),
            self._gap(),
            self._paired("vs_kd", "control", "vs_control"),
            self._p(),
            self._together("vs_kd_all", self.row.over_control, self.board.control),
        ]
        found += [self._cost(name) for name in ("latency_ms_p50", "params_count", "flops")]
        return [figure for figure in [*found, self._device_hours(), self._params()] if figure is not None]

    def _rank(self) -> Figure:
        row = self.row
        if row.rank is None:
            why = "every seed failed" if row.mean is None and row.failed else f"{row.seeds} seeds that count, not all that others have"
            return Figure("rank", "none", why, row.run_ids)
        above = [other for other in self.board.rows if row.label in other.better_than]
        below = [other for other in self.board.rows if other.label in row.better_than]
        ranked = sum(other.rank is not None for other in self.board.rows)
        if self.board.errors is None:
            how = f"nothing is known of the error: any of the {ranked} places may be its own"
        else:
            told = [f"{self._who(above)} surely better, {self._who(below)} surely worse, of {ranked}"]
            told.append(f"by Tukey's critical value for {ranked} rows ({self.board.errors.df} degrees of freedom)")
            how = "; ".join(told)
        others = [run for other in self.board.rows if other is not row and other.rank is not None for run in other.run_ids]
        return Figure("rank", ranks(row.rank, row.rank_high), how, (*row.run_ids, *others))

    @staticmethod
    def _who(rows: Sequence[Row]) -> str:
        return f"{len(rows)} ({', '.join(row.label for row in rows)})" if rows else "nobody"

    def _mean(self) -> Figure | None:
        row = self.row
        values, what = self._replicates(row.values)
        if row.mean is None:
            return None
        sum_ = " + ".join(self._number(value) for value in values)
        shown = interval(row.mean, row.low, row.high, f".{self.decimals}f")
        return Figure("mean", shown, f"({sum_}) / {len(values)}{what}{self._t(values)}", self.counted)

    def _replicates(self, by_seed: Mapping[int, float]) -> tuple[list[float], str]:
        """What the row is compared by: the values by seed, or of several searches the means of their finals; and what is said of these."""
        plan = self.board.plan
        if plan is None or plan.searches == 1:
            return [*by_seed.values()], ""
        searches: dict[int, list[float]] = {}
        for seed, value in by_seed.items():
            searches.setdefault(seed // plan.seeds, []).append(value)
        return [fmean(finals) for finals in searches.values() if len(finals) == plan.seeds], ", of each search the mean of its finals"

    def _paired(self, name: str, other: str, field: str) -> Figure | None:
        row = self.row
        middle, low, high = (getattr(row, field + end) for end in ("", "_low", "_high"))
        if middle is None:
            return None
        couples = [(run, getattr(run, other)) for run in self.runs if run.value is not None and getattr(run, other) is not None]
        by_seed = {run.seed: self.sign * (run.value - against[1]) for run, against in couples if run.value is not None}
        differences, what = self._replicates(by_seed)
        listed = ", ".join(f"{difference:+.{self.decimals}f}" for difference in differences)
        label = self.board.undistilled if other == "undistilled" else self.board.control
        turned = "" if self.sign > 0 else ", turned so that positive is better"
        return Figure(
            name,
            interval(middle, low, high, f"+.{self.decimals}f"),
            f"mean of the differences to {label} by {'search' if what else 'seed'}{turned}: {listed}{self._t(differences)}",
            (*self.counted, *(against[0] for _, against in couples)),
        )

    def _together(self, name: str, difference: Difference | None, against: str | None) -> Figure | None:
        """The interval that holds together with those of the other rows."""
        errors, other = self.board.errors, self.board.row(against)
        if difference is None or errors is None or other is None:
            return None
        d = self.decimals
        of = f"spread over {'seeds' if self.board.searches is None else 'searches'} that all rows share (variance {errors.pool:.3g})"
        if self.row.looked and self.board.plan is not None:
            level = self.board.plan.levels[self.board.plan.looks.index(self.row.looked)]
            of = f"spread of the rows that were looked at with {self.row.looked} seeds, where all intervals hold at once with {level:.4g}"
        how = (
            f"{difference.middle:+.{d}f} ± {difference.critical:.3f} · {difference.error:.{d + 1}f}: Dunnett's critical value for "
            f"{errors.comparisons} comparisons with {against} ({difference.degrees} degrees of freedom), times the standard error from the "
            f"{of}, or its own where that is larger; p = {difference.p:.3g}"
        )
        if errors.further and len(other.values) > errors.seeds:
            how += f"; {against} has {errors.further} more seeds, which its mean uses"
        shown = interval(difference.middle, difference.low, difference.high, f"+.{d}f")
        return Figure(name, shown, how, (*self.row.run_ids, *other.run_ids))

    def _gap(self) -> Figure | None:
        row, undistilled, metric = self.row, self.board.row(self.board.undistilled), self.board.teacher_metric
        if row.gap_recovered is None or row.mean is None or undistilled is None or undistilled.mean is None or metric is None:
            return None
        base, teacher = self._number(undistilled.mean), self._number(metric)
        teachers = [r.run_id for r in self.by_id.values() if r.role == "teacher" and r.teacher_sha == self.board.teacher_sha is not None]
        how = f"({self._number(row.mean)} - {base}) / ({teacher} - {base}); {teacher} is the teacher, {base} is {undistilled.label}"
        together = row.over_undistilled
        if row.gap_low is not None and together is not None:
            if self.board.errors is not None and self.board.errors.further and row.gap_recovered:
                lead = together.middle / row.gap_recovered
                how = (
                    f"gain_all / lead = {together.middle:.{self.decimals}f} / {lead:.{self.decimals}f}; the lead of the teacher, {teacher}"
                )
                how += f", over {undistilled.label}, with its further seeds"
            how += "; Fieller's interval, with the critical value and the errors of gain_all"
        shown = interval(row.gap_recovered, row.gap_low, row.gap_high, "z.1%")
        return Figure("gap_recovered", shown, how, (*self.counted, *undistilled.run_ids, *teachers))

    def _p(self) -> Figure | None:
        row, control = self.row, self.board.row(self.board.control)
        if row.vs_control_p is None or control is None:
            return None
        how = "paired t-test of this row alone, not corrected for the other comparisons: see vs_kd_all"
        return Figure("vs_kd_p", short(row.vs_control_p), how, (*row.run_ids, *control.run_ids))

    def _cost(self, name: str) -> Figure | None:
        records = self._records() if name != "latency_ms_p50" else self._of_one_network()
        known = [(r.run_id, getattr(r, name)) for r in records if getattr(r, name) is not None]
        if not known:
            return None
        how = "of the deployed student"
        if name == "latency_ms_p50":
            how = f"median of {', '.join(short(value) for _, value in known)}, over all runs of the board that deploy the same network"
        return Figure(name, short(getattr(self.row, name)), how, tuple(run_id for run_id, _ in known))

    def _of_one_network(self) -> list[RunRecord]:
        return [self.by_id[run_id] for row in self.board.rows if row.network == self.row.network for run_id in row.run_ids]

    def _device_hours(self) -> Figure | None:
        if self.row.device_hours is None:
            return None
        trainings = [r.device_hours for r in self._records() if r.device_hours is not None]
        spent = search_hours(self._records())
        of = "of the search" if len(spent) < 2 else f"of a search, the mean of {len(spent)}"
        search = fmean(spent.values()) if spent else 0.0
        how = f"mean of the finals' {', '.join(map(short, trainings))}, plus {short(search)} {of}"
        return Figure("device_hours", short(self.row.device_hours), how, self.row.run_ids)

    def _params(self) -> Figure:
        same = [record for record in self._records() if record.params == self.row.params] or self._records()
        newest = max(same, key=lambda r: (r.created_at, r.run_id))
        by = f"chosen by {self.row.trials} trials, study {newest.study_id}" if self.row.trials else "as configured"
        of = "the newest final" if self.board.searches is None else "the search whose finals are best on validation"
        shown = ", ".join(f"{name}={short(value)}" for name, value in self.row.params.items()) or "none"
        return Figure("params", shown, f"of {of}; {by}", (newest.run_id,))

    def _records(self) -> list[RunRecord]:
        return [self.by_id[run_id] for run_id in self.row.run_ids]

    def _number(self, value: float) -> str:
        return f"{value:.{self.decimals}f}"

    def _t(self, values: Sequence[float]) -> str:
        """How the interval follows from the values."""
        if len(values) < 2:
            return "; one seed has no interval"
        from scipy.special import stdtrit

        quantile, sd = float(stdtrit(len(values) - 1, 0.975)), stdev(values)
        return f"; {fmean(values):.{self.decimals}f} ± {quantile:.3f} · {sd:.{self.decimals + 1}f} / √{len(values)}"
