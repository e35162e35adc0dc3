"""Whether records are what was written: readable, whole, with the checksum that they were stored with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.errors import UserError, in_one_line
from kdbench.results.record import CHECKSUM, RunRecord, from_table, plain_rows, row_checksum
from kdbench.results.store import LISTINGS, ResultStore

_MOST_COLUMNS = 500


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
                content = store.files.read(path)
            except FileNotFoundError:  # a compaction has put its rows into another file, which is listed next
                gone = True
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
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0].rstrip('.')})") from error
    return [table.slice(number, 1) for number in range(table.num_rows)]


def single_row(content: bytes, path: str) -> pa.Table:
    """The one row of a record that somebody else wrote. Raises UserError where it is no such file.

    All that the file declares is looked at before any of it is read: Parquet packs billions of rows into a few kilobytes.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        declared = file.metadata
        if declared.num_rows != 1:
            raise UserError(f"{path} has {declared.num_rows} rows, expected one")
        if declared.num_row_groups != 1 or declared.num_columns > _MOST_COLUMNS:
            raise UserError(f"{path} has {declared.num_row_groups} row groups and {declared.num_columns} columns; no record has so many")
        chunks = [declared.row_group(0).column(number) for number in range(declared.num_columns)]
        if any(chunk.num_values != 1 or chunk.compression != "UNCOMPRESSED" for chunk in chunks):
            raise UserError(f"{path} holds compressed or nested columns, which no exported record has")
        if sum(chunk.total_uncompressed_size for chunk in chunks) > len(content):
            raise UserError(f"{path} declares more bytes than it has")
        return file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({in_one_line(error)})") from error


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
