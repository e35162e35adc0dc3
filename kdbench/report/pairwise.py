"""Every row of a board against every other: by how much its mean is ahead, and whether the two are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from kdbench.boards.board import Board, Row
from kdbench.boards.formatting import UNKNOWN

TITLE = "row ahead of column, over the seeds that both have; ▲ surely better, ▼ surely worse, all pairs at once with 95%"


def pairwise(board: Board) -> tuple[list[str], list[list[str]]]:
    """The titles of the columns, and the lines; ranked rows alone, each with its place by which columns name it."""
    rows = [row for row in board.rows if row.rank is not None]
    sign = 1.0 if board.higher_is_better else -1.0
    titles = [board.rows_by, *(str(place) for place in range(1, len(rows) + 1))]
    # What ranks are of: where rows are decided early, the seeds of the first look.
    compared = range(board.plan.looks[0]) if board.plan is not None and board.plan.looks else None
    lines = [
        [f"{place} {row.label}", *(_cell(row, other, sign, board.decimals, compared) for other in rows)]
        for place, row in enumerate(rows, start=1)
    ]
    return titles, lines


def _cell(row: Row, other: Row, sign: float, decimals: int, compared: range | None) -> str:
    if row is other:
        return ""
    common: Sequence[int] = [seed for seed in sorted(row.values.keys() & other.values.keys()) if compared is None or seed in compared]
    if not common:
        return UNKNOWN
    ahead = sign * fmean(row.values[seed] - other.values[seed] for seed in common)
    mark = " ▲" if other.label in row.better_than else " ▼" if row.label in other.better_than else ""
    return f"{ahead:+.{decimals}f}{mark}"
