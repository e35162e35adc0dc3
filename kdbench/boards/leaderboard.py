"""From records to boards: who is best on one protocol, of a pair's methods or a method's students, by how much, and how sure that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from kdbench.boards import sentences
from kdbench.boards.beside import rows_beside
from kdbench.boards.board import Board, Estimate, Row, RowsBy
from kdbench.boards.cautions import board_cautions
from kdbench.boards.finals import (
    Finals,
    age,
    best_first,
    chosen,
    family_of,
    grouped,
    known,
    latencies,
    ruleset_of,
    trained_alike,
    values_of,
)
from kdbench.boards.published import PublishedFigure
from kdbench.boards.rulesets import with_rulesets_compared
from kdbench.boards.samples import moved_by_samples
from kdbench.boards.standings import Scale, Standing, scale_of, seeds_wanted, standings, with_fronts
from kdbench.boards.stats import paired_difference, paired_p_value, t_interval
from kdbench.records.plan import CONTROL, UNDISTILLED, Plan
from kdbench.records.record import RunRecord

_AGREE = 1e-9  # of a mean: values that differ by less differ by how they were added up


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
        control: The row that the others of its board are compared with: a method's label, or a student's; without it, methods are
            compared with kd, and students are ranked and no more.
    """
    records = list(records)
    pairs: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)
    of_all: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)  # whatever the student and the method
    besides: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)  # finals that are no row
    for record in records:
        if record.role != "final" or record.source != "kdbench" or record.status == "stopped":
            continue
        if record.beside is not None:
            if rows_by == "method":
                besides[(record.task, record.data, record.teacher or "", record.student, record.protocol_hash)].append(record)
        else:
            shared = record.student if rows_by == "method" else record.label
            pairs[(record.task, record.data, record.teacher or "", shared, record.protocol_hash)].append(record)
            of_all[(record.task, record.data, record.teacher or "", record.protocol_hash)].append(record)
    found = []
    for (task, data, name, shared, protocol), finals in sorted(pairs.items()):
        teachers: list[str | None] = [*sorted({own for r in finals if (own := _teacher_of(r)) is not None and r.method != UNDISTILLED})]
        for teacher in teachers or [None]:
            members = _with_teacher(finals, teacher)
            shas = [r.teacher_sha for r in sorted(members, key=age) if _teacher_of(r) == teacher]
            sha = shas[-1] if shas else None  # one teacher may have come in several kinds of file
            metric = _teacher_metric(members, teacher, records)
            if rows_by == "method":
                groups = grouped(members, "method")
                below = _with_teacher(besides[(task, data, name, shared, protocol)], teacher)
                board = _board(members, groups, sha, metric, control, latencies(groups), below=below)
                methods = {row.method for row in board.rows}
                found.append(replace(board, published=tuple(figure for figure in published if figure.method in methods)))
            elif len({record.student for record in members}) > 1:
                together = _with_teacher(of_all[(task, data, name, protocol)], teacher)
                groups = grouped(members, "student")
                board = _board(members, groups, sha, metric, control, _latencies_of_students(groups, together), "student")
                found.append(board)
    return with_rulesets_compared(found)


def _with_teacher(finals: Sequence[RunRecord], teacher: str | None) -> list[RunRecord]:
    """An undistilled student, or a record that names no weights, is the same whatever the teacher's weights are."""
    return [record for record in finals if _teacher_of(record) in (teacher, None) or record.method == UNDISTILLED]


def _teacher_of(record: RunRecord) -> str | None:
    """What tells a record's teacher from another; of older records the hash of its file."""
    return record.teacher_id or record.teacher_sha


def _latencies_of_students(groups: Sequence[Finals], together: Sequence[RunRecord]) -> dict[tuple[object, ...], float]:
    """A student's latency is that of its board of methods. together: the finals of all methods with these students."""
    found = {}
    for group in groups:
        by_method = grouped([record for record in together if record.student == group.label], "method")
        measured = latencies(by_method).get(group.network)
        if measured is not None:
            found[group.network] = measured
    return found


def _board(
    members: Sequence[RunRecord],
    groups: Sequence[Finals],
    teacher_sha: str | None,
    teacher_metric: float | None,
    named: str | None,
    latency: Mapping[tuple[object, ...], float],
    rows_by: RowsBy = "method",
    below: Sequence[RunRecord] = (),
) -> Board:
    """No student stands for another's failed seed, as the undistilled student does for a method's: it misses that seed."""
    undistilled = chosen(groups, UNDISTILLED) if rows_by == "method" else None
    for group in groups:
        group.values.update(values_of(group, undistilled))
    groups, scale = best_first(groups), scale_of(groups)
    control = next((group for group in groups if group.label == named), None)
    if named is None and rows_by == "method":
        control = chosen(groups, CONTROL)
    plan = _plan(groups)
    find = partial(standings, groups, rows_by=rows_by, undistilled=undistilled, teacher=teacher_metric, scale=scale, plan=plan)
    found = find(control=control)
    if rows_by == "student" and control is not None and found.rows[control.label].rank is None:
        control = None  # nobody is compared with a student that misses seeds
        found = find(control=None)
    ordered = sorted(groups, key=lambda group: found.rows[group.label].rank is None)
    rows = [_row(group, found.rows[group.label], undistilled, control, scale, latency.get(group.network)) for group in ordered]
    first, finals = members[0], [record for group in ordered for record in group.records.values()]
    board = Board(
        protocol_hash=first.protocol_hash,
        family=family_of(groups),
        task=first.task,
        data=first.data,
        teacher=first.teacher,
        teacher_metric=teacher_metric,
        teacher_sha=teacher_sha,
        student=first.student if rows_by == "method" else "",
        primary=first.primary,
        higher_is_better=first.higher_is_better,
        undistilled=undistilled.label if undistilled else None,
        control=control.label if control else None,
        lead=found.lead,
        errors=found.errors,
        detectable=found.detectable,
        rows=with_fronts(rows, first.higher_is_better),
        findings=(),
        notes=(),
        data_hash=first.data_hash,
        trainings=frozenset(record.unit_key for record in members),
        method=None if rows_by == "method" else first.label,
        trained=trained_alike(groups),
        ruleset=ruleset_of(groups),
        plan=plan,
        searches=found.searches,
        beside=rows_beside(below, groups),
    )
    told = (*sentences.notes(board, groups, found, scale, named), *board_cautions(finals, first.teacher, teacher_metric))
    return replace(board, findings=sentences.findings(board), notes=told)


def seeds_still_wanted(finals: Sequence[RunRecord], plan: Plan, controls: Collection[str]) -> dict[str, int]:
    """How many finals each method of one pair should have, by label, where seeds are added until a method is decided.

    finals: all that the pair has. controls: labels of the rows that the others are compared with. Empty where all is decided.
    """
    groups = grouped(finals, "method")
    undistilled, control = chosen(groups, UNDISTILLED), chosen(groups, CONTROL)
    for group in groups:
        group.values.update(values_of(group, undistilled))
    scale = scale_of(groups)
    found = standings(groups, rows_by="method", undistilled=undistilled, control=control, teacher=None, scale=scale, plan=plan)
    return seeds_wanted(found, plan, controls)


def _plan(groups: Sequence[Finals]) -> Plan | None:
    """The plan of the row that is meant to have most seeds; None where nobody kept one."""
    plans = [plan for group in groups if (plan := group.plan) is not None]
    return max(plans, key=lambda plan: (plan.most, plan.seeds), default=None)


def _row(group: Finals, standing: Standing, undistilled: Finals | None, control: Finals | None, scale: Scale, latency: float | None) -> Row:
    mean, low, high = _mean(group, standing, scale)
    gain, gain_low, gain_high = _difference(group, undistilled)
    vs_control, vs_control_low, vs_control_high = _difference(group, control)
    gap, gap_low, gap_high = standing.gap
    records = [group.records[seed] for seed in sorted(group.records)]
    training, told = known(records, "device_hours"), group.told
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
        over_undistilled=standing.over_undistilled,
        gap_recovered=gap,
        gap_low=gap_low,
        gap_high=gap_high,
        vs_control=vs_control,
        vs_control_low=vs_control_low,
        vs_control_high=vs_control_high,
        vs_control_p=paired_p_value(group.replicates, control.replicates) if control is not None and control is not group else None,
        over_control=standing.over_control,
        values=dict(group.values),
        seeds=len(group.values),
        failed=group.failed,
        params=told.params,
        searched=frozenset(told.space or {}),
        trials=told.trials,
        params_count=next(iter(known(records, "params_count")), None),
        flops=next(iter(known(records, "flops")), None),
        latency_ms_p50=latency,
        device_hours=fmean(training) + group.search_device_hours if training else None,
        pareto=(),
        pareto_sure=(),
        pareto_off=(),
        run_ids=tuple(record.run_id for record in records),
        better_than=standing.better_than,
        looked=standing.looked,
        moved_by_samples=moved_by_samples(group, control) if control is not None and control is not group else None,
        undecided=standing.open,
    )


def _mean(group: Finals, standing: Standing, scale: Scale) -> Estimate:
    """With Student's interval, cut at the metric's bounds. Seeds that agree exactly have the error of the other rows, or no interval."""
    values = [group.sign * value for value in group.replicates.values()]
    if not values:
        return None, None, None
    mean, low, high = t_interval(values)
    if max(values) - min(values) <= _AGREE * abs(mean):
        low = high = None
        if standing.variance is not None and len(values) > 1:
            mean, low, high = t_interval(values, variance=standing.variance)
    if low is not None and scale.low is not None:
        low = max(low, scale.low)
    if high is not None and scale.high is not None:
        high = min(high, scale.high)
    return mean, low, high


def _difference(a: Finals, b: Finals | None) -> Estimate:
    """How much better `a` is than `b`, paired by seed. All None where `b` is missing, is `a` itself, or shares no seed with it."""
    if b is None or a is b:
        return None, None, None
    return paired_difference(a.replicates, b.replicates) or (None, None, None)


def _teacher_metric(members: Sequence[RunRecord], teacher: str | None, records: Sequence[RunRecord]) -> float | None:
    """As the finals tell it, or else the test metric of the teacher's own record."""
    told = [r for r in members if r.teacher_metric is not None and _teacher_of(r) == teacher]
    if told:
        return max(told, key=age).teacher_metric
    first = members[0]
    own = [r for r in records if r.role == "teacher" and (r.task, r.data, r.student) == (first.task, first.data, first.teacher)]
    own = [r for r in own if teacher is None or _teacher_of(r) in (teacher, None)]
    return max(own, key=age).test_metric if own else None
