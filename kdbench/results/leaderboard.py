"""From records to boards: who is best on one protocol and one pair, by how much, and how sure that is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from kdbench.results.published import PublishedFigure
from kdbench.results.record import RunRecord
from kdbench.results.stats import gap_recovered, paired_difference, standard_error, t_interval

UNDISTILLED = "none"
CONTROL = "kd"
CONTROLS = frozenset({UNDISTILLED, CONTROL, "label_smoothing"})  # methods that are there to be beaten


@dataclass(frozen=True)
class Row:
    """One method of a board. Differences are signed so that positive is better; an end of an interval is None where one seed gives none."""

    label: str
    method: str
    rank: int | None  # None: fewer seeds than others, so not comparable
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
    seeds: int  # that count in the mean, failed ones included
    failed: int  # seeds that diverged or died; each counts as the undistilled student of its seed
    params: Mapping[str, Any]  # of the method, and `recipe.x` where the search varied it
    searched: frozenset[str]  # which of `params` the search chose
    trials: int | None  # of the search that chose them
    params_count: int | None  # of the deployed student
    flops: int | None
    latency_ms_p50: float | None
    device_hours: float | None  # what one tuned student costs: the mean of the final trainings plus the whole search
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Board:
    """Everything measured under one protocol for one teacher and one student, ranked, the incomplete last."""

    protocol_hash: str
    task: str
    data: str
    teacher: str | None
    teacher_metric: float | None
    teacher_sha: str | None
    student: str
    primary: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    published: tuple[PublishedFigure, ...] = ()


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
    def failed(self) -> int:
        return sum(_failed(record) for record in self.records.values())


def boards(records: Iterable[RunRecord], published: Sequence[PublishedFigure] = ()) -> list[Board]:
    """One board a protocol, task, data set, teacher (name and weights) and student, from the final runs that kdbench made.

    `published` figures go to the boards that have their method, to be shown apart; they are never ranked.
    """
    records = list(records)
    pairs: dict[tuple, list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.role == "final" and record.source == "kdbench" and record.status != "stopped":
            pairs[(record.task, record.data, record.teacher or "", record.student, record.protocol_hash)].append(record)
    found = []
    for _, finals in sorted(pairs.items()):
        shas: list[str | None] = [*sorted({r.teacher_sha for r in finals if r.teacher_sha is not None and r.method != UNDISTILLED})]
        for sha in shas or [None]:
            # an undistilled student, or a record that names no weights, is the same whatever the teacher's weights are
            members = [r for r in finals if r.teacher_sha in (sha, None) or r.method == UNDISTILLED]
            found.append(_board(members, sha, _teacher_metric(members, sha, records), published))
    return found


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
    rows = tuple(_row(group, ranks.get(group.label), undistilled, control, teacher_metric) for group in [*complete, *incomplete])
    methods = {row.method for row in rows}
    return Board(
        protocol_hash=first.protocol_hash,
        task=first.task,
        data=first.data,
        teacher=first.teacher,
        teacher_metric=teacher_metric,
        teacher_sha=teacher_sha,
        student=first.student,
        primary=first.primary,
        higher_is_better=first.higher_is_better,
        rows=rows,
        findings=_findings(rows, undistilled, control),
        notes=_notes(groups, wanted, [group.label for group in incomplete]),
        published=tuple(figure for figure in published if figure.method in methods),
    )


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


def _chosen(groups: Sequence[_Finals], method: str) -> _Finals | None:
    """The group with that label, else the only one with that method."""
    of_method = [group for group in groups if group.newest.method == method]
    labelled = [group for group in of_method if group.label == method]
    return next(iter(labelled or (of_method if len(of_method) == 1 else [])), None)


def _values(group: _Finals, undistilled: _Finals | None) -> dict[int, float]:
    """The test metric by seed; a failed seed has the undistilled student's of that seed, or none where that is missing too."""
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
    better_a, better_b = ({seed: group.better * value for seed, value in group.values.items()} for group in (a, b))
    return paired_difference(better_a, better_b) or (None, None, None)


def _row(group: _Finals, rank: int | None, undistilled: _Finals | None, control: _Finals | None, teacher_metric: float | None) -> Row:
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
        seeds=len(values),
        failed=group.failed,
        params=group.newest.params,
        searched=frozenset(group.newest.space or {}),
        trials=group.newest.trials,
        params_count=next(iter(_known(records, "params_count")), None),
        flops=next(iter(_known(records, "flops")), None),
        latency_ms_p50=median(latencies) if (latencies := _known(records, "latency_ms_p50")) else None,
        device_hours=fmean(training) + max(search, default=0.0) if training else None,
        run_ids=tuple(record.run_id for record in records),
    )


def _known(records: Sequence[RunRecord], name: str) -> list[Any]:
    return [value for record in records if (value := getattr(record, name)) is not None and math.isfinite(value)]


def _teacher_metric(members: Sequence[RunRecord], sha: str | None, records: Sequence[RunRecord]) -> float | None:
    """As the finals tell it, or else the test metric of the teacher's own record."""
    told = [r for r in members if r.teacher_metric is not None and r.teacher_sha == sha]
    if told:
        return max(told, key=_age).teacher_metric
    first = members[0]
    own = [r for r in records if r.role == "teacher" and (r.task, r.data, r.student) == (first.task, first.data, first.teacher)]
    own = [r for r in own if r.teacher_sha in (sha, None) or sha is None]
    return max(own, key=_age).test_metric if own else None


def _age(record: RunRecord) -> tuple:
    return record.created_at, record.run_id


def _findings(rows: Sequence[Row], undistilled: _Finals | None, control: _Finals | None) -> tuple[str, ...]:
    found = []
    if undistilled is None:
        found.append("no undistilled student (method none) on this board: gains can't be given; add none to the methods")
    if control is None:
        found.append("no kd on this board: whether a method beats it is not known; add kd to the methods")
        return tuple(found)
    name = "tuned kd" if control.newest.trials else "kd (not tuned)"
    rivals = [row for row in rows if row.method not in CONTROLS and row.vs_kd is not None]
    beaten = [row for row in rivals if row.vs_kd_low is None or row.vs_kd_low <= 0]
    if beaten:
        found.append(f"does not beat {name}: " + ", ".join(row.label for row in beaten))
    if winners := [row.label for row in rivals if row not in beaten]:
        found.append(f"beats {name}: " + ", ".join(winners))
    return tuple(found)


def _notes(groups: Sequence[_Finals], wanted: int, incomplete: Sequence[str]) -> tuple[str, ...]:
    """What a reader must know to trust the board: seeds, the search's budget, and whatever is not as it should be."""
    notes = [f"{wanted} seed{'' if wanted == 1 else 's'} a method; {_search_budget(groups)}"]
    if wanted == 1:
        notes.append("one seed tells nothing apart: all complete methods share rank 1; set seeds to 3 or more")
    if incomplete:
        counts = {group.label: len(group.values) for group in groups}
        notes.append(f"not ranked, fewer than {wanted} seeds: " + ", ".join(f"{label} ({counts[label]})" for label in incomplete))
    if failed := [f"{group.label} ({group.failed})" for group in groups if group.failed]:
        notes.append("failed seeds count as the undistilled student of the same seed: " + ", ".join(failed))
    if left_out := [f"{group.label} ({group.left_out})" for group in groups if group.left_out]:
        notes.append("older final runs with another setting are left out: " + ", ".join(left_out))
    return tuple(notes)


def _search_budget(groups: Sequence[_Finals]) -> str:
    trials = {group.label: group.newest.trials or 0 for group in groups}
    if not any(trials.values()):
        return "no search, parameters as configured"
    how = ", ".join(sorted({name for group in groups for name in (group.newest.sampler, group.newest.scheduler) if name}))
    suffix = f" ({how})" if how else ""
    if len(set(trials.values())) == 1:
        return f"search: {next(iter(trials.values()))} trials a method{suffix}"
    return f"search budgets DIFFER{suffix}: " + ", ".join(f"{label} {count}" for label, count in sorted(trials.items()))
