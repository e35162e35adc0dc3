"""From records to boards: who is best on one protocol, of a pair's methods or a method's students, by how much, and how sure that is."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import fmean, median, variance
from typing import Any, Literal

from kdbench.boards.cautions import board_cautions
from kdbench.boards.published import PublishedFigure
from kdbench.boards.simultaneous import Spreads, differences, partial_difference, rank_intervals, smallest_found, spreads
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
RowsBy = Literal["method", "student"]
SPEED_ONLY = frozenset({"memory_format", "compile"})  # keys of a recipe that change how fast it is, not what is trained


@dataclass(frozen=True)
class Row:
    """One method of a board, or one student of a board of students.

    Differences are signed so that positive is better; an end of an interval is None where one seed gives none.
    """

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
    vs_control: float | None  # over tuned kd, or the student that is named as control, paired by seed; None for the control itself
    vs_control_low: float | None
    vs_control_high: float | None
    vs_control_p: float | None  # of methods: the paired t-test's, by Holm, None for controls; of students: Dunnett's
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
    rank_high: int | None = None  # of a student: the worst rank that it may have, `rank` being the best; None for a method

    @property
    def verdict(self) -> int:
        """Against the control: 1 surely better, -1 surely worse, 0 can't be told.

        Of a method, after Holm; of kd, none and label_smoothing, by the own interval; of a student, by the interval that holds with all.
        """
        if self.vs_control is None:
            return 0
        told = _apart_from_zero(self) if self.vs_control_p is None else self.vs_control_p < 1 - LEVEL
        return (1 if self.vs_control > 0 else -1) if told else 0


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
    detectable: float | None  # the smallest true difference to the control that this many seeds find four times in five
    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    published: tuple[PublishedFigure, ...] = ()
    data_hash: str = ""  # of the content of the data set; metrics on other content do not compare
    trainings: frozenset[str] = frozenset()  # the unit keys of all finals
    method: str | None = None  # on a board of students, the label of the method that all of them were trained with; None on one of methods

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

    @property
    def leaders(self) -> tuple[Row, ...]:
        """The rows of rank 1, best mean first."""
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


@dataclass(frozen=True)
class _Finals:
    """The final runs of one label with one setting, a record a seed. label: of the method, or of the student on a board of students."""

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


@dataclass(frozen=True)
class _Standing:
    """Where a row stands: its rank, and how much better than the control it is, with the ends of the interval and the p-value."""

    rank: int | None = None
    rank_high: int | None = None
    versus: tuple[float | None, float | None, float | None] = (None, None, None)
    p_value: float | None = None


def boards(
    records: Iterable[RunRecord],
    published: Sequence[PublishedFigure] = (),
    *,
    rows_by: RowsBy = "method",
    control: str | None = None,
) -> list[Board]:
    """One board a protocol, task, data set, teacher (name and identity) and student, from the final runs that kdbench made.

    A protocol holds the test part: one set of trainings that was measured on two of them has two boards.

    Args:
        records: All that is known; what is no final run is looked at for the teacher's metric alone.
        published: Figures that go to the boards of methods that have their method, to be shown apart; they are never ranked.
        rows_by: What a row is. By "student", a board has all students of one method (by its label), and there are only boards of two
            students or more.
        control: The student that the others of its board are compared with; without it, students are ranked and no more.
    """
    records = list(records)
    pairs: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)
    of_all: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)  # whatever the student and the method
    for record in records:
        if record.role == "final" and record.source == "kdbench" and record.status != "stopped":
            shared = record.student if rows_by == "method" else record.label
            pairs[(record.task, record.data, record.teacher or "", shared, record.protocol_hash)].append(record)
            of_all[(record.task, record.data, record.teacher or "", record.protocol_hash)].append(record)
    found = []
    for (task, data, name, _, protocol), finals in sorted(pairs.items()):
        teachers: list[str | None] = [*sorted({own for r in finals if (own := _teacher_of(r)) is not None and r.method != UNDISTILLED})]
        for teacher in teachers or [None]:
            members = _with_teacher(finals, teacher)
            shas = [r.teacher_sha for r in sorted(members, key=_age) if _teacher_of(r) == teacher]
            sha = shas[-1] if shas else None  # one teacher may have come in several kinds of file
            metric = _teacher_metric(members, teacher, records)
            if rows_by == "method":
                found.append(_board_of_methods(members, sha, metric, published))
            elif len({record.student for record in members}) > 1:
                together = _with_teacher(of_all[(task, data, name, protocol)], teacher)
                found.append(_board_of_students(members, together, sha, metric, control))
    return found


def _with_teacher(finals: Sequence[RunRecord], teacher: str | None) -> list[RunRecord]:
    """An undistilled student, or a record that names no weights, is the same whatever the teacher's weights are."""
    return [record for record in finals if _teacher_of(record) in (teacher, None) or record.method == UNDISTILLED]


def _teacher_of(record: RunRecord) -> str | None:
    """What tells a record's teacher from another; of older records the hash of its file."""
    return record.teacher_id or record.teacher_sha


def _board_of_methods(
    members: Sequence[RunRecord], teacher_sha: str | None, teacher_metric: float | None, published: Sequence[PublishedFigure]
) -> Board:
    groups = _groups(members, "method")
    control, undistilled = _chosen(groups, CONTROL), _chosen(groups, UNDISTILLED)
    for group in groups:
        group.values.update(_values(group, undistilled))
    groups = _sorted(groups)
    wanted = max(len(group.values) for group in groups)
    complete = [group for group in groups if len(group.values) == wanted > 0]
    ranks, judged = _ranks(complete), _p_values(groups, control)
    standings = {
        group.label: _Standing(ranks.get(group.label), None, _difference(group, control), judged.get(group.label)) for group in groups
    }
    detectable = _detectable([group for group in complete if group.label in judged], control, wanted)
    board = _ranked(members, groups, standings, teacher_sha, teacher_metric, undistilled, control, detectable, _latencies(groups))
    methods = {row.method for row in board.rows}
    board = replace(board, published=tuple(figure for figure in published if figure.method in methods))
    return replace(board, findings=_findings(board), notes=(*_notes(board, groups, wanted), *board.notes))


def _board_of_students(
    members: Sequence[RunRecord], together: Sequence[RunRecord], teacher_sha: str | None, teacher_metric: float | None, named: str | None
) -> Board:
    """No student stands for another's failed seed, so one that misses a seed of the others is not ranked.

    together: the finals of all methods with these students. A student's latency is that of its board of methods.
    """
    groups = _groups(members, "student")
    for group in groups:
        group.values.update(_values(group, None))
    groups = _sorted(groups)
    seeds = _block(groups)
    complete = [group for group in groups if seeds and group.values.keys() >= set(seeds)]
    control = next((group for group in complete if group.label == named), None)
    block = [[group.signed[seed] for seed in seeds] for group in complete]
    known = spreads(block) if len(complete) > 1 and len(seeds) > 1 else None
    standings, detectable = {group.label: _Standing(1, len(complete)) for group in complete}, None
    if known is not None:
        ranks = rank_intervals(block, known)
        against = differences(block, complete.index(control), known) if control else {}
        for place, (group, rank) in enumerate(zip(complete, ranks, strict=True)):
            found = against.get(place)
            standings[group.label] = _Standing(*rank) if found is None else _Standing(*rank, (found.middle, found.low, found.high), found.p)
        detectable = smallest_found(len(complete), len(seeds), known) if control else None
    for group in groups:
        if control is not None and group is not control and (known is None or group not in complete):
            standings[group.label] = _incomplete(group, control, standings.get(group.label, _Standing()), len(complete), known)
    latencies = {}
    for group in groups:
        by_method = _groups([record for record in together if record.student == group.label], "method")
        latencies[group.network] = _latencies(by_method).get(group.network)
    board = _ranked(members, groups, standings, teacher_sha, teacher_metric, None, control, detectable, latencies)
    board = replace(board, student="", method=members[0].label)
    notes = _notes_of_students(board, groups, len(seeds), known, named)
    return replace(board, findings=_findings_of_students(board), notes=(*notes, *board.notes))


def _block(groups: Sequence[_Finals]) -> list[int]:
    """The seeds that rows are compared on: as many as a row has at most, those that most rows have, of these the lowest."""
    counts = Counter(seed for group in groups for seed in group.values)
    return sorted(sorted(counts, key=lambda seed: (-counts[seed], seed))[: max(len(group.values) for group in groups)])


def _incomplete(group: _Finals, control: _Finals, before: _Standing, rows: int, known: Spreads | None) -> _Standing:
    """A student that is not in the block, or whose block gives no error: the difference over the seeds that both have."""
    middle, _, _ = _difference(group, control)
    common = sorted(group.values.keys() & control.values.keys())
    ours, theirs = ([each.signed[seed] for seed in common] for each in (group, control))
    found = partial_difference(ours, theirs, rows, known) if known is not None else None
    low, high, p_value = (None, None, None) if found is None else (found.low, found.high, found.p)
    return replace(before, versus=(middle, low, high), p_value=p_value)


def _sorted(groups: Sequence[_Finals]) -> list[_Finals]:
    """The best mean first; who has none, last."""
    return sorted(groups, key=lambda group: (-group.better * fmean(group.values.values()) if group.values else math.inf, group.label))


def _ranked(
    members: Sequence[RunRecord],
    groups: Sequence[_Finals],
    standings: Mapping[str, _Standing],
    teacher_sha: str | None,
    teacher_metric: float | None,
    undistilled: _Finals | None,
    control: _Finals | None,
    detectable: float | None,
    latencies: Mapping[tuple[object, ...], float | None],
) -> Board:
    """The board without its sentences, but for what its records say against trusting it; who has no rank comes last."""
    first = members[0]
    ordered = sorted(groups, key=lambda group: standings.get(group.label, _Standing()).rank is None)
    rows = [
        _row(group, standings.get(group.label, _Standing()), undistilled, teacher_metric, latencies.get(group.network)) for group in ordered
    ]
    finals = [record for group in ordered for record in group.records.values()]
    return Board(
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
        rows=_with_fronts(rows, first.higher_is_better),
        findings=(),
        notes=tuple(board_cautions(finals, first.teacher, teacher_metric)),
        data_hash=first.data_hash,
        trainings=frozenset(record.unit_key for record in members),
    )


def _groups(members: Sequence[RunRecord], rows_by: RowsBy) -> list[_Finals]:
    """One group a label: the setting that was run last, never a mixture of two settings."""
    better = 1.0 if members[0].higher_is_better else -1.0
    by_label: dict[str, dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(members, key=_age):
        by_label[record.label if rows_by == "method" else record.student][_setting(record)].append(record)
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


def _row(group: _Finals, standing: _Standing, undistilled: _Finals | None, teacher_metric: float | None, latency: float | None) -> Row:
    values = list(group.values.values())
    mean, low, high = t_interval(values) if values else (None, None, None)
    gain, gain_low, gain_high = _difference(group, undistilled)
    vs_control, vs_control_low, vs_control_high = standing.versus
    gap = None
    if mean is not None and undistilled is not None and undistilled is not group and undistilled.values and teacher_metric is not None:
        baseline = list(undistilled.values.values())
        gap = gap_recovered(mean, fmean(baseline), teacher_metric, standard_error(baseline), group.better > 0)
    records = [group.records[seed] for seed in sorted(group.records)]
    training, search = _known(records, "device_hours"), _known(records, "search_device_hours")
    return Row(
        label=group.label,
        method=group.newest.method,
        rank=standing.rank,
        rank_high=standing.rank_high,
        mean=mean,
        low=low,
        high=high,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        gap_recovered=gap,
        vs_control=vs_control,
        vs_control_low=vs_control_low,
        vs_control_high=vs_control_high,
        vs_control_p=standing.p_value,
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
    return [row for row in board.rows if row.method not in CONTROLS and row.vs_control is not None]


def _lead(board: Board, undistilled: float) -> float:
    """How much better the teacher is than the undistilled student; nan where it has no metric."""
    metric = math.nan if board.teacher_metric is None else board.teacher_metric
    return (metric - undistilled) * (1.0 if board.higher_is_better else -1.0)


def _notes(board: Board, groups: Sequence[_Finals], wanted: int) -> tuple[str, ...]:
    """What a reader must know to trust the board: seeds, the search's budget, what stays open, and whatever is not as it should be."""
    rows, control, undistilled = board.rows, board.row(board.control), board.row(board.undistilled)
    notes = [f"{wanted} seed{'' if wanted == 1 else 's'} a method; {_search_budget(groups, 'method')}"]
    if wanted == 1:
        notes.append("one seed tells nothing apart: all complete methods share rank 1; set seeds to 3 or more")
    if board.detectable:
        notes.append(_power(wanted, CONTROL, board.detectable))
    undecided = [row.label for row in _rivals(board) if row.verdict == 0]
    if control is not None and wanted > 1 and undecided:
        notes.append(f"no difference from {_name(control)} was found, which does not show that there is none: " + ", ".join(undecided))
    if corrected := [row.label for row in rows if row.vs_control_p is not None and row.verdict == 0 and _apart_from_zero(row)]:
        family = sum(row.vs_control_p is not None for row in rows)
        notes.append(f"the interval to kd leaves out 0, but not after Holm's correction for {family} methods: " + ", ".join(corrected))
    if undistilled is not None and undistilled.mean is not None and _lead(board, undistilled.mean) > 0 and _no_gap(board, undistilled):
        notes.append(
            f"the teacher's lead over the undistilled student is below {SMALLEST_GAP:g} or below two standard errors: the gap is left out"
        )
    notes += _not_ranked(rows, f"fewer than {wanted} seeds")
    if failed := [f"{row.label} ({row.failed})" for row in rows if row.failed and row.mean is not None]:
        notes.append("failed seeds count as the undistilled student of the same seed: " + ", ".join(failed))
    return (*notes, *_older_runs(groups))


def _not_ranked(rows: Sequence[Row], why: str) -> list[str]:
    notes = []
    if lost := [f"{row.label} ({row.failed})" for row in rows if row.failed and row.mean is None]:
        notes.append("not ranked, every seed failed: " + ", ".join(lost))
    if incomplete := [f"{row.label} ({row.seeds})" for row in rows if row.rank is None and row.mean is not None]:
        notes.append(f"not ranked, {why}: " + ", ".join(incomplete))
    return notes


def _older_runs(groups: Sequence[_Finals]) -> list[str]:
    left_out = [f"{group.label} ({group.left_out})" for group in groups if group.left_out]
    return ["older final runs with another setting are left out: " + ", ".join(left_out)] if left_out else []


def _findings_of_students(board: Board) -> tuple[str, ...]:
    ranked = [row for row in board.rows if row.rank is not None]
    leaders = [row.label for row in board.leaders]
    found = ["may be the best: " + ", ".join(leaders)] if leaders and len(leaders) < len(ranked) else []
    for word, verdict in (("worse than", -1), ("better than", 1)):
        if named := [row.label for row in board.rows if row.vs_control is not None and row.verdict == verdict]:
            found.append(f"{word} {board.control}: " + ", ".join(named))
    return tuple(found)


def _notes_of_students(board: Board, groups: Sequence[_Finals], wanted: int, known: Spreads | None, named: str | None) -> tuple[str, ...]:
    """What holds for a board of students: seeds, search, what the ranks and differences rest on, and who is not ranked."""
    notes = [f"{wanted} seed{'' if wanted == 1 else 's'} a student; {_search_budget(groups, 'student')}"]
    ranked = [row for row in board.rows if row.rank is not None]
    if named is not None and board.control is None:
        held = "misses seeds that others have" if board.row(named) is not None else "is not on this board"
        notes.append(f"{named} {held}: no differences are given")
    if known is not None:
        what = "ranks" if board.control is None else f"ranks, and differences from {board.control},"
        notes.append(
            f"{what} hold all at once with {LEVEL:.0%}; the error is pooled over {len(ranked) - int(known.wide.sum())} students "
            f"({known.degrees} degrees of freedom), a student's own where that is larger"
        )
        notes.append("they speak of new seeds: of these parameters, this teacher, this split and these test samples")
        if wide := [row.label for row, scatters in zip(ranked, known.wide, strict=True) if scatters]:
            notes.append("judged by its own spread alone, as its seeds scatter far more than the others': " + ", ".join(wide))
        if known.uneven:
            notes.append(f"the students' spreads differ: intervals are taken wider, for {known.df} degrees of freedom")
    elif wanted == 1:
        notes.append("one seed tells nothing apart: set seeds to 3 or more")
    elif len(ranked) > 1:
        notes.append("all seeds agree exactly: nothing is told apart")
    if board.detectable:
        notes.append(_power(wanted, str(board.control), board.detectable))
    undecided = [row.label for row in board.rows if row.vs_control_p is not None and row.verdict == 0]
    if undecided:
        notes.append(f"no difference from {board.control} was found, which does not show that there is none: " + ", ".join(undecided))
    notes += _not_ranked(board.rows, "not all of the seeds that others have")
    if failed := [f"{row.label} ({row.failed})" for row in board.rows if row.failed and row.mean is not None]:
        notes.append("failed seeds are left out: " + ", ".join(failed))
    return (*notes, *_older_runs(groups))


def _power(seeds: int, control: str, detectable: float) -> str:
    found = f"less than {POWER:.0%} power to detect a difference from {control}"
    return f"with {seeds} seeds, this board has {found} smaller than {detectable:.2g}"


def _no_gap(board: Board, undistilled: Row) -> bool:
    """Whether the teacher's lead is too small to say which share of it a method has made up."""
    if undistilled.mean is None or board.teacher_metric is None:
        return True
    error = standard_error([*undistilled.values.values()])
    return gap_recovered(undistilled.mean, undistilled.mean, board.teacher_metric, error, board.higher_is_better) is None


def _apart_from_zero(row: Row) -> bool:
    return row.vs_control_low is not None and row.vs_control_high is not None and not row.vs_control_low <= 0 <= row.vs_control_high


def _search_budget(groups: Sequence[_Finals], rows_by: RowsBy) -> str:
    trials = {group.label: group.newest.trials or 0 for group in groups}
    if not any(trials.values()):
        return "no search, parameters as configured"
    how = ", ".join(sorted({name for group in groups for name in (group.newest.sampler, group.newest.scheduler) if name}))
    suffix = f" ({how})" if how else ""
    if len(set(trials.values())) == 1:
        return f"search: {next(iter(trials.values()))} trials a {rows_by}{suffix}"
    return f"search budgets DIFFER{suffix}: " + ", ".join(f"{label} {count}" for label, count in sorted(trials.items()))
