"""Parquet that somebody else may have written: what a file declares is looked at before any of it is read.

Parquet packs billions of rows into a few kilobytes, and a file that was torn or edited may declare anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.errors import UnreadableFile
from kdbench.records.archive import LARGEST_RECORD

_MOST_COLUMNS = 500


@dataclass(frozen=True)
class Limits:
    """What a file may declare. nbytes: of the columns that are read at a time, unpacked. packed: whether columns may be compressed."""

    rows: int
    nbytes: int
    packed: bool = True


FULL_ROWS = 20_000  # a compacted file of so many is not made anew: what is written again at each compaction stays bounded
SINGLE = Limits(rows=1, nbytes=LARGEST_RECORD)
EXPORTED = Limits(rows=1, nbytes=LARGEST_RECORD, packed=False)
COMPACTED = Limits(rows=2 * FULL_ROWS, nbytes=4_000_000_000)  # a file that is not full, and one more
LARGEST_COMPACTED = 2_000_000_000  # bytes of the file


def read_parquet(
    content: bytes | pa.Buffer,
    path: str,
    limits: Limits,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
) -> pa.Table:
    """The content of a Parquet file.

    Args:
        content: the file.
        path: what it is called in errors.
        limits: what it may declare.
        columns: the names of those to read; all for None. Names that the file does not have are left out.
        groups: the numbers of the groups of rows to read; all for None.

    Raises:
        UnreadableFile: it is no Parquet file, is damaged, or declares more than the limits.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        if problem := _implausible(file.metadata, len(content), limits, columns, groups):
            raise UnreadableFile(f"{path} {problem}")
        if groups is None:
            return file.read(columns=columns, use_threads=False)
        return file.read_row_groups(groups, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UnreadableFile(f"{path} is not a readable Parquet file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _implausible(
    declared: pq.FileMetaData, size: int, limits: Limits, columns: Sequence[str] | None, groups: Sequence[int] | None
) -> str | None:
    """What is wrong with what a file declares; None where it may be read."""
    if limits.rows == 1 and declared.num_rows != 1:
        return f"has {declared.num_rows} rows, expected one"
    if declared.num_rows > limits.rows:
        return f"has {declared.num_rows} rows, expected at most {limits.rows}"
    if declared.num_row_groups > max(limits.rows, 1) or declared.num_columns > _MOST_COLUMNS:
        return f"has {declared.num_row_groups} row groups and {declared.num_columns} columns; no file of records has so many"
    unpacked = 0
    for number in range(declared.num_row_groups):
        group = declared.row_group(number)
        chunks = [group.column(column) for column in range(declared.num_columns)]
        if any(chunk.num_values != group.num_rows for chunk in chunks):
            return "holds nested columns, which no record has"
        if not limits.packed and any(chunk.compression != "UNCOMPRESSED" for chunk in chunks):
            return "holds compressed columns, which no exported record has"
        if groups is None or number in groups:
            unpacked += sum(chunk.total_uncompressed_size for chunk in chunks if columns is None or chunk.path_in_schema in columns)
    if sum(declared.row_group(number).num_rows for number in range(declared.num_row_groups)) != declared.num_rows:
        return f"declares {declared.num_rows} rows, and other numbers of them in its groups"
    most = limits.nbytes if limits.packed else min(limits.nbytes, size)
    return f"declares {unpacked} bytes of content, expected at most {most}" if unpacked > most else None
