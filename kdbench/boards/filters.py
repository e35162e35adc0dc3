"""What a command's filters leave of a results folder: a value that nothing has is a mistake, and is named as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from kdbench.boards.board import Board
from kdbench.errors import UserError, nearest
from kdbench.records.record import RunRecord
from kdbench.records.store import LONG_FIELDS


class Records(Protocol):
    """A store, or several folders that are read as one."""

    def scan(self, *, without: Collection[str] = (), **equals: Any) -> list[RunRecord]:
        """The records whose fields have the given values."""
        ...


def filtered(source: Records, filters: Mapping[str, str], without: Collection[str] = ()) -> list[RunRecord]:
    """Read the records that the filters leave; all of them without filters, none where the source is empty.

    Args:
        source: Where the records are.
        filters: By field, the value that a record must have. The fields are named as the command's options are.
        without: Fields that the caller does not look at.

    Raises:
        UserError: The source has records and none fits: a value is unknown, or no record has all of the values.
    """
    records = source.scan(without=without, **filters)
    everything = [] if records or not filters else source.scan(without=LONG_FIELDS)
    if not everything:
        return records
    for name, value in filters.items():
        there = {str(found) for record in everything if (found := getattr(record, name)) is not None}
        if value not in there:
            raise UserError(f"--{name} {value}: no result has this {name}{nearest(value, there) if there else ''}")
    raise UserError(f"no result has {' and '.join(f'--{name} {value}' for name, value in filters.items())} together")


def check_row(boards: Sequence[Board], name: str, option: str = "--method") -> None:
    """Raise UserError where there are boards and none has a row of that name."""
    rows = [(board, row) for board in boards for row in board.rows]
    if rows and not any(name in board.names(row) for board, row in rows):
        raise UserError(f"{option} {name}: no board has this {boards[0].rows_by}{nearest(name, {row.label for _, row in rows})}")


def students_by(boards: Sequence[Board], method: str) -> list[Board]:
    """The boards of students of that method, by its label or name. Raises UserError where there are boards and none is."""
    found = [board for board in boards if board.trained_by(method)]
    if boards and not found:
        raise UserError(f"--method {method}: no two students have it{nearest(method, {str(board.method) for board in boards})}")
    return found
