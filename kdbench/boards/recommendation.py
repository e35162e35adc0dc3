"""Which network to ship: every row of the boards, `none` included, that keeps to the limits, the best metric first."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdbench.boards.board import Board, Row
from kdbench.boards.formatting import finite, together_data
from kdbench.errors import UserError
from kdbench.records.record import RunRecord

LARGEST = 1e15  # of a limit; no network has more parameters, and none takes as many milliseconds
COST_UNITS: Mapping[str, str] = {"latency_ms_p50": "ms", "params_count": "parameters", "device_hours": "device-hours"}
_MILLISECONDS = {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}


@dataclass(frozen=True)
class Budget:
    """What is asked for.

    min_gain: points over the undistilled student of the same board, at least; None: any row qualifies. The others are upper limits;
    None: no limit.
    """

    min_gain: float | None = None
    latency_ms_p50: float | None = None
    params_count: float | None = None
    device_hours: float | None = None


@dataclass(frozen=True)
class Option:
    """One row of a board, judged.

    confidence: how sure its seeds make that the true gain is at least min_gain, 0 where none was asked for (one-sided, of this row alone,
    with the error of the board); None for the undistilled student, for a single seed, and on a board without an undistilled student.
    sure: it keeps to the limits, and the gain asked for lies below the interval of its gain, which holds for all rows of the board at once.
    missed: for every limit that it breaks, by how much, in words. alike: labels of its board that also keep to the limits and whose
    metric is not told apart from its own.
    """

    board: Board
    row: Row
    confidence: float | None
    missed: tuple[str, ...]
    sure: bool
    shortfall: float  # sum of what it misses, each as a share of its limit
    alike: tuple[str, ...]
    latency_device: str | None

    @property
    def undistilled(self) -> bool:
        """It is the row that gains are over."""
        return self.row.label == self.board.undistilled


@dataclass(frozen=True)
class Answer:
    """Of one task, content of a data set, and teacher: the options within the budget, the best mean metric first.

    verdict: `sure` where the first option is sure of its gain, `unsure` where it is not, `none` where nothing qualifies; then `nearest`
    is the row that misses least.
    """

    task: str
    data: str
    data_hash: str
    teacher: str | None
    primary: str
    verdict: Literal["sure", "unsure", "none"]
    options: tuple[Option, ...]
    nearest: Option | None
    notes: tuple[str, ...]


def recommend(boards: Sequence[Board], records: Iterable[RunRecord], budget: Budget) -> list[Answer]:
    """Rank the rows of all students by their metric, within the budget.

    Args:
        boards: Only their ranked rows are judged. Boards of one answer share task, data content, teacher and metric, so their test
            metrics were measured on the same samples.
        records: What the boards were made from.
        budget: The limits.

    Returns:
        One answer for each task, data content, teacher and metric. Options are ordered by the mean of the metric, as boards are, and
        not by the lower end of its interval: with few seeds the width of an interval says more about chance than about the method.
    """
    devices = {record.run_id: record.latency_device for record in records}
    groups: dict[tuple[str, ...], list[Board]] = defaultdict(list)
    for board in boards:
        groups[(board.task, board.data, board.data_hash, board.teacher or "", board.primary)].append(board)
    return [_answer(members, budget, devices) for _, members in sorted(groups.items())]


def _answer(boards: Sequence[Board], budget: Budget, devices: Mapping[str, str | None]) -> Answer:
    judged = [_option(board, row, budget, devices) for board in boards for row in board.rows if row.rank is not None]
    fitting = sorted((option for option in judged if not option.missed), key=_order)
    nearest = None if fitting else min(judged, key=lambda option: (option.shortfall, *_order(option)), default=None)
    first = boards[0]
    return Answer(
        task=first.task,
        data=first.data,
        data_hash=first.data_hash,
        teacher=first.teacher,
        primary=first.primary,
        verdict="none" if not fitting else "sure" if fitting[0].sure else "unsure",
        options=tuple(fitting),
        nearest=nearest,
        notes=_notes(boards, judged, fitting),
    )


def _option(board: Board, row: Row, budget: Budget, devices: Mapping[str, str | None]) -> Option:
    misses = dict(_misses(board, row, budget))
    alike = [
        other.label
        for other in board.rows
        if other is not row and other.rank is not None and not dict(_misses(board, other, budget)) and not row.apart_from(other)
    ]
    return Option(
        board=board,
        row=row,
        confidence=_confidence(row, budget.min_gain or 0.0),
        missed=tuple(misses),
        sure=not misses and row.over_undistilled is not None and row.over_undistilled.low > (budget.min_gain or 0.0),
        shortfall=sum(misses.values()),
        alike=tuple(alike) if not misses else (),
        latency_device=next((devices.get(run_id) for run_id in row.run_ids if devices.get(run_id)), None),
    )


def _order(option: Option) -> tuple[Any, ...]:
    row, sign = option.row, 1.0 if option.board.higher_is_better else -1.0
    return -sign * (row.mean if row.mean is not None else -sign * math.inf), row.device_hours or 0.0, option.board.student, row.label


def _misses(board: Board, row: Row, budget: Budget) -> Iterable[tuple[str, float]]:
    """Each limit that the row breaks, in words, and by which share of it."""
    if budget.min_gain is not None:
        gain = 0.0 if row.label == board.undistilled else row.shown_gain[0]
        if gain is None:
            yield "its gain is not known", math.inf
        elif gain < budget.min_gain:
            short = budget.min_gain - gain
            yield f"its gain of {gain:+.2f} is {short:.2f} short", short / (budget.min_gain or 1.0)
    for name, unit in COST_UNITS.items():
        limit, cost = getattr(budget, name), getattr(row, name)
        if limit is None:
            continue
        if cost is None:
            yield f"its {unit} are not known", math.inf
        elif cost > limit:
            yield f"{cost:.3g} {unit} are over the limit of {limit:.3g}", cost / limit - 1 if limit else math.inf


def _confidence(row: Row, min_gain: float) -> float | None:
    """From the error that the board's own interval of the gain rests on."""
    gain = row.over_undistilled
    if gain is None:
        return None
    from scipy.special import stdtr

    return float(stdtr(gain.degrees, (gain.middle - min_gain) / gain.error))


def _notes(boards: Sequence[Board], judged: Sequence[Option], fitting: Sequence[Option]) -> tuple[str, ...]:
    notes = []
    if not judged:
        notes.append("no row of these boards is ranked: every row lacks seeds that others have")
    if fitting and fitting[0].undistilled:
        notes.append("the first option is an undistilled student: no distilled one within the limits has a better mean")
    if len(fitting) > 1:
        notes.append(f"the first option is the best of {len(fitting)}, so its {boards[0].primary} is slightly optimistic")
    if len({board.protocol_hash for board in boards}) > 1:
        notes.append(
            "the boards have different protocols: students were trained, searched or split differently; the test data are the same"
        )
    return tuple(notes)


# --- limits as people write them -------------------------------------------------------------------------------------


def milliseconds(text: str) -> float:
    """`5ms`, `0.005s`, `800us` or `5` in milliseconds. Raises UserError for anything else."""
    return _measure(text, _MILLISECONDS, "--latency", "a time such as 5ms, 800us or 0.005s", "ms")


def parameter_count(text: str) -> float:
    """`250k`, `1M`, `1.5G` or a plain number. Raises UserError for anything else."""
    return _measure(text, _COUNTS, "--params", "a count such as 250k, 1M or 24100", "parameters")


def _measure(text: str, units: Mapping[str, float], option: str, expected: str, unit: str) -> float:
    parts = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if parts is None or parts[2].lower() not in units or float(parts[1]) == 0:
        raise UserError(f"{option} {text:.80}: expected {expected}")
    value = float(parts[1]) * units[parts[2].lower()]
    if value > LARGEST:
        raise UserError(f"{option} {text:.80}: expected {expected}, and no more than {LARGEST:g} {unit}")
    return value


# --- as data ---------------------------------------------------------------------------------------------------------


def answer_data(answer: Answer) -> dict[str, Any]:
    """One answer as plain data for JSON."""
    return {
        "task": answer.task,
        "data": answer.data,
        "data_hash": answer.data_hash,
        "teacher": answer.teacher,
        "primary": answer.primary,
        "verdict": answer.verdict,
        "options": [_option_data(option) for option in answer.options],
        "nearest": None if answer.nearest is None else _option_data(answer.nearest),
        "notes": list(answer.notes),
    }


def _option_data(option: Option) -> dict[str, Any]:
    row = option.row
    figures = ("mean", "low", "high", "gain", "gain_low", "gain_high", "latency_ms_p50", "params_count", "device_hours")
    return {
        "protocol_hash": option.board.protocol_hash,
        "student": option.board.student,
        "method": row.label,
        "params": finite(dict(row.params)),
        "sure": option.sure,
        "confidence": option.confidence,
        "missed": list(option.missed),
        **{name: getattr(row, name) for name in figures},
        **together_data("gain", row.over_undistilled),
        "latency_device": option.latency_device,
        "alike": list(option.alike),
        "seeds": row.seeds,
        "run_ids": list(row.run_ids),
    }
