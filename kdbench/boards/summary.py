"""What several pairs say together: the boards of one protocol family, each method over all of their pairs of teacher and student."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeVar

from kdbench.boards.across_pairs import (
    SMALLEST_NUMBER_OF_PAIRS,
    AverageRanks,
    average_ranks,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from kdbench.boards.board import Board, Row

THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the teacher's lead


@dataclass(frozen=True)
class PairOfFamily:
    """Which board a summary took in."""

    protocol_hash: str
    data: str
    teacher: str | None
    student: str


@dataclass(frozen=True)
class SummaryRow:
    """One method over all pairs of a summary.

    gap_recovered: interquartile mean over pairs and seeds, with its interval, of the pairs whose teacher has a lead to recover.
    profile: for each of THRESHOLDS, the share of trainings that recovered more. Both are None for the undistilled student.
    """

    label: str
    method: str
    gap_recovered: float | None
    gap_low: float | None
    gap_high: float | None
    probability_of_improvement: float | None  # over kd; None for kd itself
    profile: tuple[float, ...] | None
    average_rank: float | None  # 1 is best; None for fewer than six pairs or three methods


@dataclass(frozen=True)
class Summary:
    """The methods that all boards of a family rank, best first. p_value and critical_difference are of the average ranks."""

    family: str
    task: str
    primary: str
    pairs: tuple[PairOfFamily, ...]
    rows: tuple[SummaryRow, ...]
    p_value: float | None
    critical_difference: float | None
    notes: tuple[str, ...]


T = TypeVar("T", Board, Summary)


def summaries(boards: Iterable[Board]) -> list[Summary]:
    """One summary for each protocol family that has two pairs or more.

    Of boards that show the same trainings, measured on several test parts, the one with the newest run counts: its seeds are one set.
    """
    families: dict[str, list[Board]] = defaultdict(list)
    for board in boards:
        families[board.family].append(board)
    pairs = {family: _counted_once(members) for family, members in families.items()}
    return [_summary(members) for members in pairs.values() if len(members) > 1]


def _counted_once(boards: Sequence[Board]) -> list[Board]:
    return [
        board
        for board in boards
        if not any(board.trainings & other.trainings and _newest(board) < _newest(other) for other in boards if other is not board)
    ]


def _newest(board: Board) -> str:
    """The id of its newest run; ids sort by time."""
    return max((run_id for row in board.rows for run_id in row.run_ids), default="")


def of_methods(found: Sequence[T], methods: Collection[str]) -> list[T]:
    """The boards or summaries that have one of the methods, with their rows alone; figures and ranks stay those of the whole."""
    return _of_rows(found, lambda row: row.label in methods or row.method in methods)


def of_student(found: Sequence[Board], student: str) -> list[Board]:
    """The same for the rows of one student on boards of students."""
    return _of_rows(found, lambda row: row.label == student)


def _of_rows(found: Sequence[T], wanted: Callable[[Row | SummaryRow], bool]) -> list[T]:
    kept = [(each, tuple(row for row in each.rows if wanted(row))) for each in found]
    return [replace(each, rows=rows) for each, rows in kept if rows]


def _summary(boards: Sequence[Board]) -> Summary:
    ranked = [{row.label: row for row in board.rows if row.rank is not None} for board in boards]
    everywhere = [label for label in ranked[0] if all(label in rows for rows in ranked)]
    recoverable = [(board, rows) for board, rows in zip(boards, ranked, strict=True) if board.lead is not None]
    ranks = _average_ranks(boards, ranked, everywhere)
    rows = [
        _row(
            [rows[label] for rows in ranked],
            boards,
            [_gaps(rows[label], board) for board, rows in recoverable],
            None if ranks is None else ranks.ranks[position],
        )
        for position, label in enumerate(everywhere)
    ]
    first = boards[0]
    return Summary(
        family=first.family,
        task=first.task,
        primary=first.primary,
        pairs=tuple(PairOfFamily(board.protocol_hash, board.data, board.teacher, board.student) for board in boards),
        rows=tuple(sorted(rows, key=lambda row: (row.gap_recovered is None, -(row.gap_recovered or 0.0), row.average_rank or 0.0))),
        p_value=ranks.p_value if ranks else None,
        critical_difference=ranks.critical_difference if ranks else None,
        notes=_notes(boards, ranked, everywhere, len(recoverable), ranks),
    )


def _row(rows: Sequence[Row], boards: Sequence[Board], gaps: Sequence[Sequence[float]], average_rank: float | None) -> SummaryRow:
    """One method; `rows` are its own on each of `boards`, `gaps` its recovered shares by pair and seed where there is a lead."""
    complete = [values for values in gaps if values]
    known = bool(complete) and len(complete) == len(gaps) and rows[0].label != boards[0].undistilled
    middle, low, high = stratified_bootstrap(complete) if known else (None, None, None)
    return SummaryRow(
        label=rows[0].label,
        method=rows[0].method,
        gap_recovered=middle,
        gap_low=low,
        gap_high=high,
        probability_of_improvement=_probability(rows, boards),
        profile=tuple(performance_profile(complete, THRESHOLDS)) if known else None,
        average_rank=average_rank,
    )


def _gaps(row: Row, board: Board) -> list[float]:
    """The share of the lead that each seed recovered, its gain over the undistilled student of the same seed divided by the lead."""
    lead, undistilled = board.lead, board.row(board.undistilled)
    if lead is None or undistilled is None:
        return []
    sign = 1.0 if board.higher_is_better else -1.0
    common = sorted(row.values.keys() & undistilled.values.keys())
    return [sign * (row.values[seed] - undistilled.values[seed]) / lead for seed in common]


def _probability(rows: Sequence[Row], boards: Sequence[Board]) -> float | None:
    """Of improvement over kd; None where a board has no kd, or where this is it."""
    controls = [board.row(board.control) for board in boards]
    against = [control for control in controls if control is not None and control.values]
    if len(against) < len(boards) or any(row.label == control.label for row, control in zip(rows, against, strict=True)):
        return None
    ours, theirs = ([_signed(row, board) for row, board in zip(of, boards, strict=True)] for of in (rows, against))
    return probability_of_improvement(ours, theirs)


def _average_ranks(boards: Sequence[Board], ranked: Sequence[dict[str, Row]], labels: Sequence[str]) -> AverageRanks | None:
    if len(boards) < SMALLEST_NUMBER_OF_PAIRS or len(labels) < 3:
        return None
    return average_ranks([[fmean(_signed(rows[label], board)) for label in labels] for board, rows in zip(boards, ranked, strict=True)])


def _signed(row: Row, board: Board) -> list[float]:
    return [value if board.higher_is_better else -value for value in row.values.values()]


def _notes(
    boards: Sequence[Board], ranked: Sequence[dict[str, Row]], everywhere: Sequence[str], recoverable: int, ranks: AverageRanks | None
) -> tuple[str, ...]:
    notes = [f"{len(boards)} pairs; the interval is for new seeds on these pairs, not for new pairs"]
    counts = Counter(label for rows in ranked for label in rows)
    if partly := [f"{label} ({count})" for label, count in counts.items() if label not in everywhere]:
        notes.append("left out, not ranked on all pairs: " + ", ".join(partly))
    if recoverable < len(boards):
        notes.append(f"gap: of the {recoverable} pairs whose teacher has a lead to recover")
    if ranks is None:
        notes.append(f"no average ranks: they need {SMALLEST_NUMBER_OF_PAIRS} pairs and 3 methods")
    elif ranks.p_value >= 0.05:
        notes.append(f"Friedman's test tells no method apart (p = {ranks.p_value:.2g})")
    else:
        notes.append(
            f"average ranks differ (Friedman, p = {ranks.p_value:.2g}); two of them by Nemenyi's test "
            f"where they are {ranks.critical_difference:.2f} or more apart"
        )
    return tuple(notes)
