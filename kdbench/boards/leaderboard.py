"""From records to boards: who is best on one protocol and one pair, by how much, and how sure that is."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import fmean, median, variance
from typing import Any

from kdbench.boards.cautions import board_cautions
from kdbench.boards.published import PublishedFigure
from kdbench.boards.stats import (
    LEVEL,
    POWER,
    SMALLEST_GAP,
    detectable_effect,
    gap_recovered,
    holm,
    paired_difference,
    paired_p_value,
    pareto_front,
    standard_error,
    t_interval,
)
from kdbench.records.record import RunRecord

UNDISTILLED = "none"
CONTROL = "kd"
WITHOUT_DISTILLATION = frozenset({UNDISTILLED, "label_smoothing"})
CONTROLS = WITHOUT_DISTILLATION | {CONTROL}  # methods that are there to be beaten
COSTS = ("latency_ms_p50", "params_count", "device_hours")  # what a better metric is weighed against
SPEED_ONLY = frozenset({"memory_format", "compile"})  # keys of a recipe that change how fast it is, not what is trained


@dataclass(frozen=True)
class Row:
    """One method of a board. Differences are signed so that positive is better; an end of an interval is None where one seed gives none."""

    label: str
    method: str
    rank: int | None  # None: fewer seeds than others, or none that finished, so not comparable
    mean: float | None
    low: float | None
    high: float | None
    gain: float | None  # over the undistilled student, paired by seed; None for that student itself
    gain_low: float | None
    gain_high: float | None
    gap_recovered: float | None
    vs_kd: float | None  # over tuned kd, paired by seed; None for kd itself
    vs_kd_low: float | None
    vs_kd_high: float | None
    vs_kd_p: float | None  # of the paired t-test against kd, adjusted by Holm for all methods that are no controls; None for controls
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
    pareto: tuple[str, ...]  # the COSTS for which no other ranked row is at least as good and as cheap, and better in one
    run_ids: tuple[str, ...]

    @property
    def verdict(self) -> int:
        """Against kd: 1 surely better, -1 surely worse, 0 can't be told. Of a method, after Holm; of a control, by its own interval."""
        if self.vs_kd is None:
            return 0
        told = _apart_from_zero(self) if self.vs_kd_p is None else self.vs_kd_p < 1 - LEVEL
        return (1 if self.vs_kd > 0 else -1) if told else 0


@dataclass(frozen=True)
class Board:
    """Everything measured under one protocol for one teacher and one student, ranked, the incomplete last."""

    protocol_hash: str
    family: str  # the same for boards whose protocols differ in data, split and networks alone
    task: str
    data: str
    teacher: str | None
    teacher_metric: float | None
    teacher_sha: str | None
    student: str
    primary: str
    higher_is_better: bool
    undistilled: str | None  # label of the row that `gain` is over
    control: str | None  # label of the row that `vs_kd` is over
    detectable: float | None  # the smallest true difference to kd that this many seeds find four times in five
    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    published: tuple[PublishedFigure, ...] = ()
    data_hash: str = ""  # of the content of the data set; metrics on other content do not compare
    trainings: frozenset[str] = frozenset()  # the unit keys of all finals

    @property
    def title(self) -> str:
        """`classification on fashion_mnist: cifar_resnet56 -> cifar_resnet8`."""
        return f"{self.task} on {self.data}: {self.teacher or 'no teacher'} -> {self.student}"

    @property
    def decimals(self) -> int:
        """Of its metric: percent and points have two; one that lives below 2, such as an error or a loss, needs four."""
        return 2 if any(abs(row.mean) >= 2 for row in self.rows if row.mean is not None) else 4

    @property
    def best_distilled(self) -> Row | None:
        """The distilled row with the best mean among the ranked ones; None where there is none."""
        return next((row for row in self.rows if row.rank is not None and row.method not in WITHOUT_DISTILLATION), None)

    @property
    def leaders(self) -> tuple[Row, ...]:
        """The rows of rank 1, best mean first."""
        return tuple(row for row in self.rows if row.rank == 1)

    def row(self, label: str | None) -> Row | None:
        """The row of that label; None where there is none."""
        return next((row for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class _Finals:
    """The final runs of one label with one setting, a record a seed."""

    label: str
    records: Mapping[int, RunRecord]
    left_out: int  # older finals of this label with another setting
    better: float  # +1 or -1: multiplies a metric so that more is better
    values: dict[int, float] = field(default_factory=dict)

    @property
    def newest(self) -> RunRecord:
        return max(self.records.values(), key=_age)

    @property
    def signed(self) -> dict[int, float]:
        """The values by seed, turned so that more is better."""
        return {seed: self.better * value for seed, value in self.values.items()}

    @property
    def failed(self) -> int:
        return sum(_failed(record) for record in self.records.values())

    @property
    def network(self) -> tuple[object, ...]:
        """What it deploys, by parameters and FLOPs; where one of them is unknown, a network of its own."""
        known = tuple(next(iter(_known([*self.records.values()], name)), None) for name in ("params_count", "flops"))
        return (self.label,) if None in known else known


def boards(records: Iterable[RunRecord], published: Sequence[PublishedFigure] = ()) -> list[Board]:
    """One board a protocol, task, data set, teacher (name and identity) and student, from the final runs that kdbench made.

    A protocol holds the test part: one set of trainings that was measured on two of them has two boards.

    `published` figures go to the boards that have their method, to be shown apart; they are never ranked.
    """
    records = list(records)
    pairs: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.role == "final" and record.source == "kdbench" and record.status != "stopped":
            pairs[(record.task, record.data, record.teacher or "", record.student, record.protocol_hash)].append(record)
    found = []
    for _, finals in sorted(pairs.items()):
        teachers: list[str | None] = [*sorted({name for r in finals if (name := _teacher_of(r)) is not None and r.method != UNDISTILLED})]
        for teacher in teachers or [None]:
            # an undistilled student, or a record that names no weights, is the same whatever the teacher's weights are
            members = [r for r in finals if _teacher_of(r) in (teacher, None) or r.method == UNDISTILLED]
            shas = [r.teacher_sha for r in sorted(members, key=_age) if _teacher_of(r) == teacher]
            sha = shas[-1] if shas else None  # one teacher may have come in several kinds of file
            found.append(_board(members, sha, _teacher_metric(members, teacher, records), published))
    return found


def _teacher_of(record: RunRecord) -> str | None:
    """What tells a record's teacher from another; of older records the hash of its file."""
    return record.teacher_id or record.teacher_sha


def _board(
    members: Sequence[RunRecord], teacher_sha: str | None, teacher_metric: float | None, published: Sequence[PublishedFigure]
) -> Board:
    first = members[0]
    groups = _groups(members, 1.0 if first.higher_is_better else -1.0)
    control, undistilled = _chosen(groups, CONTROL), _chosen(groups, UNDISTILLED)
    for group in groups:
        group.values.update(_values(group, undistilled))
    groups.sort(key=lambda group: (-group.better * fmean(group.values.values()) if group.values else math.inf, group.label))
    wanted = max(len(group.values) for group in groups)
    complete = [group for group in groups if len(group.values) == wanted > 0]
    incomplete = [group for group in groups if group not in complete]
    ranks = _ranks(complete)
    ordered = [*complete, *incomplete]
    judged = _p_values(ordered, control)
    latencies = _latencies(groups)
    rows = _with_fronts(
        [
            _row(group, ranks.get(group.label), undistilled, control, teacher_metric, judged.get(group.label), latencies.get(group.network))
            for group in ordered
        ],
        first.higher_is_better,
    )
    detectable = _detectable([group for group in complete if group.label in judged], control, wanted)
    methods = {row.method for row in rows}
    board = Board(
        protocol_hash=first.protocol_hash,
        family=_family(groups),
        task=first.task,
        data=first.data,
        teacher=first.teacher,
        teacher_metric=teacher_metric,
        teacher_sha=teacher_sha,
        student=first.student,
        primary=first.primary,
        higher_is_better=first.higher_is_better,
        undistilled=undistilled.label if undistilled else None,
        control=control.label if control else None,
        detectable=detectable,
        rows=rows,
        findings=(),
        notes=(),
        published=tuple(figure for figure in published if figure.method in methods),
        data_hash=first.data_hash,
        trainings=frozenset(record.unit_key for record in members),
    )
    finals = [record for group in groups for record in group.records.values()]
    cautions = board_cautions(finals, board.teacher, board.teacher_metric)
    return replace(board, findings=_findings(board), notes=(*_notes(board, groups, wanted), *cautions))


def _groups(members: Sequence[RunRecord], better: float) -> list[_Finals]:
    """One group a label: the setting that was run last, never a mixture of two settings."""
    by_label: dict[str, dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(members, key=_age):
        by_label[record.label][_setting(record)].append(record)
    groups = []
    for label, settings in by_label.items():
        latest = max(settings.values(), key=lambda runs: _age(runs[-1]))
        left_out = sum(len(runs) for runs in settings.values()) - len(latest)
        groups.append(_Finals(label, {record.seed: record for record in latest}, left_out, better))
    return groups


def _setting(record: RunRecord) -> str:
    return json.dumps([record.method, record.method_version, record.params, record.recipe, record.search_hash], sort_keys=True)


def _family(groups: Sequence[_Finals]) -> str:
    """16 hex digits of how a board's students were trained and searched, whatever the data and the networks."""
    records = [group.newest for group in groups]
    varied = {name.removeprefix("recipe.") for record in records for name in record.space or {} if name.startswith("recipe.")}
    first = records[0]
    recipe = {name: value for name, value in first.recipe.items() if name not in varied | SPEED_ONLY}
    searches = sorted({(r.trials, r.sampler or "", r.scheduler or "") for r in records if r.trials})
    told = [first.task, first.task_version, first.primary, recipe, first.global_batch, first.precision, sorted(varied), searches]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(groups: Sequence[_Finals], method: str) -> _Finals | None:
    """The group with that label, else the only one with that method."""
    of_method = [group for group in groups if group.newest.method == method]
    labelled = [group for group in of_method if group.label == method]
    return next(iter(labelled or (of_method if len(of_method) == 1 else [])), None)


def _values(group: _Finals, undistilled: _Finals | None) -> dict[int, float]:
    """The test metric by seed; a failed seed has the undistilled student's of that seed, or none where that is missing too.

    Empty where every seed failed: nothing of the method was measured.
    """
    if group.failed == len(group.records):
        return {}
    values = {}
    for seed, record in sorted(group.records.items()):
        counted = record if not _failed(record) or undistilled is None else undistilled.records.get(seed)
        if counted is not None and counted.test_metric is not None and not _failed(counted):
            values[seed] = counted.test_metric
    return values


def _failed(record: RunRecord) -> bool:
    return record.status == "failed" or record.test_metric is None or not math.isfinite(record.test_metric)


def _ranks(complete: Sequence[_Finals]) -> dict[str, int]:
    """Down the sorted list: whoever can't be told from the leader of the rank shares it; the first who can leads the next rank."""
    ranks: dict[str, int] = {}
    leader, rank = None, 1
    for position, group in enumerate(complete, start=1):
        if leader is None or _apart(leader, group):
            leader, rank = group, position
        ranks[group.label] = rank
    return ranks


def _apart(a: _Finals, b: _Finals) -> bool:
    _, low, high = _difference(a, b)
    return low is not None and high is not None and not low <= 0 <= high


def _difference(a: _Finals, b: _Finals | None) -> tuple[float | None, float | None, float | None]:
    """How much better `a` is than `b`, paired by seed. All None where `b` is missing, is `a` itself, or shares no seed with it."""
    if b is None or a is b:
        return None, None, None
    return paired_difference(a.signed, b.signed) or (None, None, None)


def _p_values(groups: Sequence[_Finals], control: _Finals | None) -> dict[str, float]:
    """By label, Holm's adjusted p-value against the control of every method that is none itself and has two seeds or more with it."""
    rivals = [group for group in groups if control is not None and group.newest.method not in CONTROLS]
    plain = {group.label: paired_p_value(group.signed, control.signed) for group in rivals if control is not None}
    known = {label: p_value for label, p_value in plain.items() if p_value is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _detectable(rivals: Sequence[_Finals], control: _Finals | None, seeds: int) -> float | None:
    """From the spread of the paired differences to kd, pooled over the methods; None where nothing is compared."""
    if control is None:
        return None
    common = [(group, group.values.keys() & control.values.keys()) for group in rivals]
    variances = [variance([group.values[seed] - control.values[seed] for seed in both]) for group, both in common if len(both) > 1]
    return detectable_effect(seeds, math.sqrt(fmean(variances)), comparisons=len(rivals)) if variances else None


def _with_fronts(rows: Sequence[Row], higher_is_better: bool) -> tuple[Row, ...]:
    """The rows with the costs for which each is on the Pareto front of the ranked ones."""
    sign = 1.0 if higher_is_better else -1.0
    fronts: dict[str, list[str]] = {row.label: [] for row in rows}
    ranked = [row for row in rows if row.rank is not None]
    for cost in COSTS:
        known = [(row, sign * row.mean, price) for row in ranked if row.mean is not None and (price := getattr(row, cost)) is not None]
        for (row, *_), on_front in zip(known, pareto_front([(good, -price) for _, good, price in known]), strict=True):
            if on_front:
                fronts[row.label].append(cost)
    return tuple(replace(row, pareto=tuple(fronts[row.label])) for row in rows)


def _latencies(groups: Sequence[_Finals]) -> dict[tuple[object, ...], float]:
    """By network, the median over all finals that deploy it: their latencies differ by nothing but the noise of measuring."""
    measured: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for group in groups:
        measured[group.network] += _known([*group.records.values()], "latency_ms_p50")
    return {network: median(values) for network, values in measured.items() if values}


def _row(
    group: _Finals,
    rank: int | None,
    undistilled: _Finals | None,
    control: _Finals | None,
    teacher_metric: float | None,
    p_value: float | None,
    latency: float | None,
) -> Row:
    values = list(group.values.values())
    mean, low, high = t_interval(values) if values else (None, None, None)
    gain, gain_low, gain_high = _difference(group, undistilled)
    vs_kd, vs_kd_low, vs_kd_high = _difference(group, control)
    gap = None
    if mean is not None and undistilled is not None and undistilled is not group and undistilled.values and teacher_metric is not None:
        baseline = list(undistilled.values.values())
        gap = gap_recovered(mean, fmean(baseline), teacher_metric, standard_error(baseline), group.better > 0)
    records = [group.records[seed] for seed in sorted(group.records)]
    training, search = _known(records, "device_hours"), _known(records, "search_device_hours")
    return Row(
        label=group.label,
        method=group.newest.method,
        rank=rank,
        mean=mean,
        low=low,
        high=high,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        gap_recovered=gap,
        vs_kd=vs_kd,
        vs_kd_low=vs_kd_low,
        vs_kd_high=vs_kd_high,
        vs_kd_p=p_value,
        values=dict(group.values),
        seeds=len(values),
        failed=group.failed,
        params=group.newest.params,
        searched=frozenset(group.newest.space or {}),
        trials=group.newest.trials,
        params_count=next(iter(_known(records, "params_count")), None),
        flops=next(iter(_known(records, "flops")), None),
        latency_ms_p50=latency,
        device_hours=fmean(training) + max(search, default=0.0) if training else None,
        pareto=(),
        run_ids=tuple(record.run_id for record in records),
    )


def _known(records: Sequence[RunRecord], name: str) -> list[Any]:
    return [value for record in records if (value := getattr(record, name)) is not None and math.isfinite(value)]


def _teacher_metric(members: Sequence[RunRecord], teacher: str | None, records: Sequence[RunRecord]) -> float | None:
    """As the finals tell it, or else the test metric of the teacher's own record."""
    told = [r for r in members if r.teacher_metric is not None and _teacher_of(r) == teacher]
    if told:
        return max(told, key=_age).teacher_metric
    first = members[0]
    own = [r for r in records if r.role == "teacher" and (r.task, r.data, r.student) == (first.task, first.data, first.teacher)]
    own = [r for r in own if teacher is None or _teacher_of(r) in (teacher, None)]
    return max(own, key=_age).test_metric if own else None


def _age(record: RunRecord) -> tuple[datetime, str]:
    return record.created_at, record.run_id


def _findings(board: Board) -> tuple[str, ...]:
    """What the board shows, and what it lacks to show more. Every output of a board has these sentences, and no others of the kind."""
    found = []
    undistilled, control = board.row(board.undistilled), board.row(board.control)
    if undistilled is None:
        found.append("no undistilled student (method none) on this board: gains can't be given; add none to the methods")
    elif undistilled.mean is None:
        found.append(f"no seed of the undistilled student ({undistilled.label}) finished: gains can't be given")
    elif board.teacher_metric is not None and _lead(board, undistilled.mean) <= 0:
        teacher, student = (f"{value:.{board.decimals}f}" for value in (board.teacher_metric, undistilled.mean))
        found.append(f"the teacher ({teacher}) is no better than the undistilled student ({student})")
    if harm := _harm(board, control):
        found.append(harm)
    if control is None:
        found.append("no kd on this board: whether a method beats it is not known; add kd to the methods")
        return tuple(found)
    if control.mean is None:
        found.append(f"no seed of {control.label} finished: whether a method beats it is not known")
        return tuple(found)
    if worse := [row.label for row in _rivals(board) if row.verdict < 0]:
        found.append(f"worse than {_name(control)}: " + ", ".join(worse))
    if winners := [row.label for row in _rivals(board) if row.verdict > 0]:
        found.append(f"beats {_name(control)}: " + ", ".join(winners))
    return tuple(found)


def _harm(board: Board, control: Row | None) -> str | None:
    """That distilling makes this student worse, as far as the intervals of the gains say so."""
    distilled = [row for row in board.rows if row.method not in WITHOUT_DISTILLATION and row.mean is not None]
    surely = {row.label for row in distilled if row.gain_high is not None and row.gain_high < 0}
    if distilled and len(surely) == len(distilled):
        return "distilling hurts here: every distilled method is surely worse than the undistilled student"
    if control is not None and control.label in surely:
        return f"distilling with {_name(control)} hurts here: it is surely worse than the undistilled student"
    return None


def _name(control: Row) -> str:
    return "tuned kd" if control.trials else "kd (not tuned)"


def _rivals(board: Board) -> list[Row]:
    """The rows that are compared with kd and are no controls themselves."""
    return [row for row in board.rows if row.method not in CONTROLS and row.vs_kd is not None]


def _lead(board: Board, undistilled: float) -> float:
    """How much better the teacher is than the undistilled student; nan where it has no metric."""
    metric = math.nan if board.teacher_metric is None else board.teacher_metric
    return (metric - undistilled) * (1.0 if board.higher_is_better else -1.0)


def _notes(board: Board, groups: Sequence[_Finals], wanted: int) -> tuple[str, ...]:
    """What a reader must know to trust the board: seeds, the search's budget, what stays open, and whatever is not as it should be."""
    rows, control, undistilled = board.rows, board.row(board.control), board.row(board.undistilled)
    notes = [f"{wanted} seed{'' if wanted == 1 else 's'} a method; {_search_budget(groups)}"]
    if wanted == 1:
        notes.append("one seed tells nothing apart: all complete methods share rank 1; set seeds to 3 or more")
    if board.detectable:
        notes.append(
            f"with {wanted} seeds, this board has less than {POWER:.0%} power to detect a difference from kd "
            f"smaller than {board.detectable:.2g}"
        )
    undecided = [row.label for row in _rivals(board) if row.verdict == 0]
    if control is not None and wanted > 1 and undecided:
        notes.append(f"no difference from {_name(control)} was found, which does not show that there is none: " + ", ".join(undecided))
    if corrected := [row.label for row in rows if row.vs_kd_p is not None and row.verdict == 0 and _apart_from_zero(row)]:
        family = sum(row.vs_kd_p is not None for row in rows)
        notes.append(f"the interval to kd leaves out 0, but not after Holm's correction for {family} methods: " + ", ".join(corrected))
    if undistilled is not None and undistilled.mean is not None and _lead(board, undistilled.mean) > 0 and _no_gap(board, undistilled):
        notes.append(
            f"the teacher's lead over the undistilled student is below {SMALLEST_GAP:g} or below two standard errors: the gap is left out"
        )
    if lost := [f"{row.label} ({row.failed})" for row in rows if row.failed and row.mean is None]:
        notes.append("not ranked, every seed failed: " + ", ".join(lost))
    if incomplete := [f"{row.label} ({row.seeds})" for row in rows if row.rank is None and row.mean is not None]:
        notes.append(f"not ranked, fewer than {wanted} seeds: " + ", ".join(incomplete))
    if failed := [f"{row.label} ({row.failed})" for row in rows if row.failed and row.mean is not None]:
        notes.append("failed seeds count as the undistilled student of the same seed: " + ", ".join(failed))
    if left_out := [f"{group.label} ({group.left_out})" for group in groups if group.left_out]:
        notes.append("older final runs with another setting are left out: " + ", ".join(left_out))
    return tuple(notes)


def _no_gap(board: Board, undistilled: Row) -> bool:
    """Whether the teacher's lead is too small to say which share of it a method has made up."""
    if undistilled.mean is None or board.teacher_metric is None:
        return True
    error = standard_error([*undistilled.values.values()])
    return gap_recovered(undistilled.mean, undistilled.mean, board.teacher_metric, error, board.higher_is_better) is None


def _apart_from_zero(row: Row) -> bool:
    return row.vs_kd_low is not None and row.vs_kd_high is not None and not row.vs_kd_low <= 0 <= row.vs_kd_high


def _search_budget(groups: Sequence[_Finals]) -> str:
    trials = {group.label: group.newest.trials or 0 for group in groups}
    if not any(trials.values()):
        return "no search, parameters as configured"
    how = ", ".join(sorted({name for group in groups for name in (group.newest.sampler, group.newest.scheduler) if name}))
    suffix = f" ({how})" if how else ""
    if len(set(trials.values())) == 1:
        return f"search: {next(iter(trials.values()))} trials a method{suffix}"
    return f"search budgets DIFFER{suffix}: " + ", ".join(f"{label} {count}" for label, count in sorted(trials.items()))
