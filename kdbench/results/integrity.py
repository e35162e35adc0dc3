"""Whether records are what was written: readable, whole, with the checksum that they were stored with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.errors import UserError
from kdbench.results.record import CHECKSUM, RunRecord, from_table, row_checksum
from kdbench.results.store import ResultStore


def checked_records(store: ResultStore) -> Iterator[tuple[str, RunRecord | None, str | None]]:
    """Of every row of every file of records: the file, the record, and what is wrong with it. A row that can't be read has no record.

    Superseded records are among them. Whatever `scan` would read is looked at, whether or not a board shows it.
    """
    for path in store.record_paths():
        try:
            rows = stored_rows(store.read_bytes(path), path)
        except UserError as error:
            yield path, None, str(error)
            continue
        for row in rows:
            try:
                record = from_table(row, path)
            except UserError as error:
                yield path, None, str(error)
            else:
                yield path, record, altered(row, path)


def stored_rows(content: bytes, path: str) -> list[pa.Table]:
    """The rows of a file of records as they are stored, each a table. Raises UserError where it is no Parquet file."""
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0].rstrip('.')})") from error
    return [table.slice(number, 1) for number in range(table.num_rows)]


def altered(row: pa.Table, path: str) -> str | None:
    """What is wrong with a row of a file of records: its checksum is missing, or is that of another content. None where it fits."""
    [stored] = row.to_pylist()
    checksum = stored.get(CHECKSUM)
    if checksum is None:
        return f"{path}: run {_run(stored)} has no checksum, so that nobody can tell whether it was changed"
    if checksum != row_checksum(stored):
        return f"{path}: run {_run(stored)} was changed after it was written (its checksum differs)"
    return None


def _run(stored: Mapping[str, Any]) -> str:
    return str(stored.get("run_id", "?"))
