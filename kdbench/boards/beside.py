"""Finals that stand below a board: of a method at its published default, or of `none` for as long as the best method took in all."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from kdbench.boards.board import BesideRow
from kdbench.boards.finals import Finals, chosen, grouped, values_of
from kdbench.boards.stats import paired_difference
from kdbench.records.plan import MOST_TIMES, UNDISTILLED
from kdbench.records.record import RunRecord


def rows_beside(below: Sequence[RunRecord], rows: Sequence[Finals]) -> tuple[BesideRow, ...]:
    """Each with the difference to its own row of the board.

    below: the finals that are no rows. rows: of the board, with their values.
    """
    if not below:
        return ()
    by_label = {row.label: row for row in rows}
    found = []
    for group in grouped(below, "method"):
        tuned = by_label.get(group.newest.beside_of or "")
        if tuned is None:
            continue
        group.values.update(values_of(group, None))
        ahead = paired_difference(tuned.signed, group.signed)
        mean = fmean(group.values.values()) if group.values else None
        kind, cut = group.newest.beside or "default", _cut(group, rows)
        shown = ahead or (None, None, None)
        found.append(BesideRow(kind, tuned.label, mean, len(group.values), shown, group.newest.params, cut))
    return tuple(found)


def _cut(group: Finals, rows: Sequence[Finals]) -> bool:
    """Whether a training that is matched by compute has the most epochs that one may have."""
    ordinary = chosen(rows, UNDISTILLED)
    if group.newest.beside != "cost" or ordinary is None:
        return False
    return bool(group.newest.recipe["epochs"] >= MOST_TIMES * ordinary.newest.recipe["epochs"])
