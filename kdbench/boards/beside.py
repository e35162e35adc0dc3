"""Finals that stand below a board: of a method at its published default, beside the row of the same method as it was tuned."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from kdbench.boards.board import BesideRow
from kdbench.boards.finals import Finals, grouped, values_of
from kdbench.boards.stats import paired_difference
from kdbench.records.plan import AT_DEFAULT
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
        tuned = by_label.get(group.label.removesuffix(AT_DEFAULT))
        if tuned is None:
            continue
        group.values.update(values_of(group, None))
        ahead = paired_difference(tuned.signed, group.signed)
        mean = fmean(group.values.values()) if group.values else None
        found.append(BesideRow(tuned.label, mean, len(group.values), ahead or (None, None, None), group.newest.params))
    return tuple(found)
