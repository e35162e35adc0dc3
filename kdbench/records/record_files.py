"""A file of the store, of one record or of many, and what of it is read when: who is asked for first, the whole record last."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdbench.errors import UnreadableFile, in_one_line
from kdbench.records.archive import LARGEST_RECORD
from kdbench.records.parquet import COMPACTED as MANY
from kdbench.records.parquet import LARGEST_COMPACTED, SINGLE, read_parquet
from kdbench.records.record import SCHEMA_VERSION, RunRecord, all_from_table, from_table, partly_from_table, record_schema

_LATER = ("test_hash", "supersedes")
COMPACTED = "compacted-"  # how the names of files of many records begin


_KEEP = "restore it from a copy: it holds many records"
_AGAIN = "restore it from a copy, or delete it to have that training run again"


class Identity(NamedTuple):
    """Which record it is, and which of two of a unit is the later. created_at: microseconds since 1970. lease: 0 for none.

    test_hash: the part that a finished network was measured on. supersedes: the run that it stands for. Both are empty where there is none.
    """

    created_at: int
    run_id: str
    unit_key: str
    lease: int = 0
    test_hash: str = ""
    supersedes: str = ""

    @property
    def measurement(self) -> tuple[str, str]:
        """What only one record counts of: a training, measured on one test part."""
        return self.unit_key, self.test_hash


class RecordFile(Protocol):
    """Rows of records, numbered from 0."""

    @property
    def identities(self) -> Sequence[Identity]:
        """Of each row, in order."""
        ...

    def matching(self, equals: Mapping[str, Any]) -> Collection[int]:
        """The numbers of the rows whose fields have these values."""
        ...

    def records(self, rows: Sequence[int], without: Collection[str]) -> list[RunRecord]:
        """These rows; fields of `without` may be missing from them."""
        ...


class OneRecord:
    """What a finished training wrote. It is small, and kept as a whole."""

    def __init__(self, content: bytes, path: str) -> None:
        """Raises UserError where it is no readable record."""
        record = self.record = from_table(read_table(content, path), path)
        try:
            moment = record.created_at.timestamp()
        except (ValueError, OverflowError) as error:
            raise UnreadableFile(f"{path} is not a kdbench record: created_at: {in_one_line(error)}; move it away") from error
        self.identities = [
            Identity(
                round(moment * 1e6),
                record.run_id,
                record.unit_key,
                record.lease or 0,
                record.test_hash or "",
                record.supersedes or "",
            )
        ]

    def matching(self, equals: Mapping[str, Any]) -> Collection[int]:
        return {0} if all(getattr(self.record, name) == value for name, value in equals.items()) else set()

    def records(self, rows: Sequence[int], without: Collection[str]) -> list[RunRecord]:
        return [self.record for _ in rows]


class ManyRecords:
    """What `compact` wrote. StoredAt as it was read, compressed; columns are taken out of it as they are needed."""

    def __init__(self, content: bytes, path: str) -> None:
        """Raises UserError where it is no readable file of records."""
        self._content, self._path = pa.py_buffer(content), path
        self._check_columns()
        table = self._columns(["created_at", "run_id", "unit_key", "lease", *_LATER])  # without those that the file is older than
        try:
            moments = table["created_at"].cast(pa.int64()).to_pylist()
            leases = table["lease"].fill_null(0).to_pylist() if "lease" in table.column_names else [0] * len(moments)
            texts = [table[name].fill_null("").to_pylist() if name in table.column_names else [""] * len(moments) for name in _LATER]
            self.identities = list(map(Identity, moments, table["run_id"].to_pylist(), table["unit_key"].to_pylist(), leases, *texts))
        except (ValueError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def matching(self, equals: Mapping[str, Any]) -> Collection[int]:
        if not equals:
            return range(len(self.identities))
        table = self._columns(list(equals))
        kept: Any = None
        for name, value in equals.items():
            if name not in table.column_names:  # the file is older than the field, which is null in all of its rows
                if value is None:
                    continue
                return set()
            fits = pc.is_null(table[name]) if value is None else pc.fill_null(pc.equal(table[name], value), False)
            kept = fits if kept is None else pc.and_(kept, fits)
        return range(len(self.identities)) if kept is None else set(pc.indices_nonzero(kept).to_pylist())

    def records(self, rows: Sequence[int], without: Collection[str]) -> list[RunRecord]:
        """Raises UserError where the rows can't be read."""
        if not rows:
            return []
        whole = not without or pc.min(self._columns(["schema_version"])["schema_version"]).as_py() != SCHEMA_VERSION
        names = [name for name in self._layout.names if whole or name not in without]
        groups = self._layout.groups_of(rows)
        table = self._columns(names, groups).take(pa.array(self._layout.inside(groups, rows)))
        try:
            return all_from_table(table, self._path) if whole else partly_from_table(table)
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    @cached_property
    def _layout(self) -> _Layout:
        file = pq.ParquetFile(pa.BufferReader(self._content))
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        return _Layout(tuple(file.schema_arrow.names), tuple(accumulate(sizes, initial=0)))

    def _columns(self, names: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
        """Columns, checked in all of their rows: a file with a damaged row is left out whichever of its rows are asked for."""
        table = read_table(self._content, self._path, names, groups)
        try:
            table.validate(full=True)  # text that is not UTF-8 above all
        except pa.ArrowException as error:
            raise self._unreadable(error) from error
        for name in table.column_names:
            if table[name].null_count and name in RunRecord.model_fields and RunRecord.model_fields[name].is_required():
                raise UnreadableFile(f"{self._path} holds rows without {name}: {_KEEP}")
        return table

    def _check_columns(self) -> None:
        """Of a file that `compact` wrote, each column that a record has is of the type that a record's has."""
        try:
            schema = pq.read_schema(pa.BufferReader(self._content))
            types = dict(zip(schema.names, schema.types, strict=True))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        for name in ("schema_version", "created_at", "run_id", "unit_key"):
            if name not in types:
                raise UnreadableFile(f"{self._path} holds no kdbench records: expected a column {name!r}; {_KEEP}")
        if odd := odd_column(schema):
            raise UnreadableFile(f"{self._path} holds no kdbench records: {odd}; {_KEEP}")

    def _unreadable(self, error: Exception) -> UnreadableFile:
        return UnreadableFile(f"{self._path} is not a readable file of records ({in_one_line(error)}): {_KEEP}")


class _Layout(NamedTuple):
    """The columns of a file, and the numbers of the rows at which its groups begin, with that of its end."""

    names: tuple[str, ...]
    begins: tuple[int, ...]

    def groups_of(self, rows: Sequence[int]) -> list[int]:
        """The groups that these rows are in: of one record not the whole file is unpacked."""
        return sorted({bisect_right(self.begins, row) - 1 for row in rows})

    def inside(self, groups: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Where the rows are in a table of these groups."""
        sizes = [self.begins[group + 1] - self.begins[group] for group in groups]
        moved = {group: first - self.begins[group] for group, first in zip(groups, accumulate(sizes, initial=0), strict=False)}
        return [row + moved[bisect_right(self.begins, row) - 1] for row in rows]


def is_record_file(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.endswith(".parquet") and not name.startswith(".")


def is_compacted(path: str) -> bool:
    return path.rpartition("/")[2].startswith(COMPACTED)


def largest(path: str) -> int:
    """The bytes that a file of records may have."""
    return LARGEST_COMPACTED if is_compacted(path) else LARGEST_RECORD


def opened(content: bytes, path: str) -> RecordFile:
    """Raises NewerRecord for a record of a newer kdbench, another UserError, naming the path, where it can't be read."""
    return ManyRecords(content, path) if is_compacted(path) else OneRecord(content, path)


def odd_column(schema: pa.Schema) -> str | None:
    """The first column that has the name of a record's and another type, in words. Files of records are only merged where there is none."""
    wanted = record_schema()
    for name, kind in zip(schema.names, schema.types, strict=True):
        expected = wanted.field(name).type if name in wanted.names else None
        if expected is not None and kind != expected:
            return f"its column {name!r} is of the type {kind}, expected {expected}"
    return None


def read_table(
    content: bytes | pa.Buffer, path: str, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> pa.Table:
    """The content of a file of records, or of some of its columns and groups of rows.

    Raises UnreadableFile, with the path, what is wrong and the way out, where it is no Parquet file or declares more than is plausible.
    """
    try:
        return read_parquet(content, path, MANY if is_compacted(path) else SINGLE, columns, groups)
    except UnreadableFile as error:
        raise UnreadableFile(f"{error}: {_KEEP if is_compacted(path) else _AGAIN}") from error
