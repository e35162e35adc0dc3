"""Whether records are what was written: readable, whole, with the checksum that they were stored with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from kdbench.errors import UnreadableFile, UserError
from kdbench.records.parquet import EXPORTED, read_parquet
from kdbench.records.record import CHECKSUM, RunRecord, from_table, plain_rows, row_checksum
from kdbench.records.record_files import largest, read_table
from kdbench.records.store import LISTINGS, ResultStore


class CheckedRow(NamedTuple):
    """A row of a file of records.

    record: None where it can't be read. sha256: of its content as it is now. problem: what is wrong with it.
    """

    path: str
    record: RunRecord | None = None
    sha256: str | None = None
    problem: str | None = None


def checked_rows(store: ResultStore) -> Iterator[CheckedRow]:
    """Every row of every file of records, superseded ones too: whatever `scan` would read, whether or not a board shows it."""
    done: set[str] = set()
    for _ in range(LISTINGS):
        paths = [path for path in store.record_paths() if path not in done]
        gone = False
        for path in paths:
            try:
                content = store.files.read(path, largest(path))
            except FileNotFoundError:  # a compaction has put its rows into another file, which is listed next
                gone = True
                continue
            except UnreadableFile as error:
                yield CheckedRow(path, problem=str(error))
                continue
            yield from _checked(content, path)
        done.update(paths)
        if not gone:
            return


def _checked(content: bytes, path: str) -> Iterator[CheckedRow]:
    try:
        rows = stored_rows(content, path)
    except UserError as error:
        yield CheckedRow(path, problem=str(error))
        return
    for row in rows:
        try:
            record = from_table(row, path)
        except UserError as error:
            yield CheckedRow(path, problem=str(error))
            continue
        yield CheckedRow(path, record, row_checksum(plain_rows(row, path)[0]), altered(row, path))


def checked_records(store: ResultStore) -> Iterator[tuple[str, RunRecord | None, str | None]]:
    """Of every row of every file of records: the file, the record, and what is wrong with it. A row that can't be read has no record."""
    for row in checked_rows(store):
        yield row.path, row.record, row.problem


def stored_rows(content: bytes, path: str) -> list[pa.Table]:
    """The rows of a file of records as they are stored, each a table. Raises UserError where it is no Parquet file."""
    table = read_table(content, path)
    return [table.slice(number, 1) for number in range(table.num_rows)]


def single_row(content: bytes, path: str) -> pa.Table:
    """The one row of a record that somebody else wrote. Raises UserError where it is no such file."""
    return read_parquet(content, path, EXPORTED)


def altered(row: pa.Table, path: str) -> str | None:
    """What is wrong with a row of a file of records: its checksum is missing, or is that of another content. None where it fits."""
    [stored] = plain_rows(row, path)
    checksum = stored.get(CHECKSUM)
    if checksum is None:
        return f"{path}: run {_run(stored)} has no checksum, so that nobody can tell whether it was changed"
    if checksum != row_checksum(stored):
        return f"{path}: run {_run(stored)} was changed after it was written (its checksum differs)"
    return None


def _run(stored: Mapping[str, Any]) -> str:
    return str(stored.get("run_id", "?"))
