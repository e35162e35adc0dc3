"""Many files of one record made into a few of many, so that a board over 100,000 records takes seconds. No row is ever lost.

Each step leaves a store that reads the same: the new file is written and read back row for row before the first old one is deleted, and
a record that stands in two files counts once. Any number of compactions, runs and readers may be at work at the same time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.errors import RunFailed, UnreadableFile, UserError
from kdbench.records.parquet import FULL_ROWS as FULL_ROWS
from kdbench.records.record import NewerRecord, all_from_table, record_schema
from kdbench.records.record_files import COMPACTED, is_compacted, largest, odd_column, read_table
from kdbench.records.seals import seal
from kdbench.records.store import LAYOUT, ResultStore, leave_out

_GROUP_ROWS = 2_000  # rows that are compressed together
_JOINED = 256


@dataclass(frozen=True)
class Compacted:
    """What a compaction did: files that went, files that came, and the rows in these."""

    before: int
    after: int
    rows: int


def compact(store: ResultStore, progress: Callable[[int, int], None] = lambda done, total: None) -> Compacted:
    """Merge all files of one record, and compacted ones that are not full, into files of FULL_ROWS rows.

    `progress` is told how many files of how many are done. A file that can't be read stays as it is, and a line says so. Raises
    NewerRecord for a record of a newer kdbench.
    """
    done = _compacted(store, progress)
    seal(store, "results compact")
    return done


def _compacted(store: ResultStore, progress: Callable[[int, int], None]) -> Compacted:
    sources = _sources(store)
    total = len(sources)
    if total < 2:
        return Compacted(0, 0, 0)
    done = after = rows = 0
    for batch, read in _batches(store, sources):
        table = _in_order(read)
        target = _write(store, table)
        for path in batch:
            if path != target:
                store.files.remove(path)
        done, after, rows = done + len(batch), after + 1, rows + table.num_rows
        progress(done, total)
    return Compacted(done, after, rows)


def _sources(store: ResultStore) -> list[str]:
    """The files to merge: compacted ones first, then the others in the order in which their runs were begun, as far as their names say."""
    return sorted(store.record_paths(), key=lambda path: (not is_compacted(path), path.rpartition("/")[2]))


def _batches(store: ResultStore, paths: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    """Files and all their rows, as many at a time as make a full file. What another compaction took away meanwhile is left out."""
    batch: list[str] = []
    tables: list[pa.Table] = []
    rows = 0
    for path in paths:
        table = _table(store, path)
        if table is None or (is_compacted(path) and table.num_rows >= FULL_ROWS):
            continue
        batch.append(path)
        tables.append(table)
        rows += table.num_rows
        if len(tables) == _JOINED or rows >= FULL_ROWS:  # a table of one row takes ten times the room of its row
            tables = [_joined(tables)]
        if rows >= FULL_ROWS:
            yield batch, tables[0]
            batch, tables, rows = [], [], 0
    if len(batch) > 1:
        yield batch, _joined(tables)


def _table(store: ResultStore, path: str) -> pa.Table | None:
    """The whole of a file, which is read as records too: what is none must not be hidden among others. None where it is none, or gone."""
    where = f"{store.location}/{path}"
    try:
        table = read_table(store.files.read(path, largest(path)), where)
        if odd := odd_column(table.schema):
            raise UnreadableFile(f"{where} can't be compacted: {odd}")
        if not is_compacted(path):
            all_from_table(table, where)
    except FileNotFoundError:
        return None
    except NewerRecord:
        raise
    except UserError as error:
        leave_out(error)
        return None
    return table


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Columns that a file lacks are null, which readers take for the default; those that a later schema does not have are kept."""
    return pa.concat_tables([record_schema().empty_table(), *tables], promote_options="default").combine_chunks()


def _in_order(table: pa.Table) -> pa.Table:
    """By time; a row that stands there twice is taken once."""
    table = table.sort_by([("created_at", "ascending"), ("run_id", "ascending")]).combine_chunks()
    ids = table["run_id"].to_pylist()
    if len(set(ids)) == len(ids):
        return table
    kept: dict[str, list[int]] = {}
    for number, run_id in enumerate(ids):
        if not any(_same(table.slice(other, 1), table.slice(number, 1)) for other in kept.get(run_id, ())):
            kept.setdefault(run_id, []).append(number)
    return table.take(pa.array(sorted(number for numbers in kept.values() for number in numbers)))


def _same(one: pa.Table, other: pa.Table) -> bool:
    """Bit for bit: a nan is equal to itself."""
    equal: bool = _bits(one).equals(_bits(other))
    return equal


def _bits(table: pa.Table) -> pa.Table:
    arrays = [column.combine_chunks() for column in table.columns]
    arrays = [array.view(pa.int64()) if array.type == pa.float64() else array for array in arrays]
    return pa.table(arrays, names=table.column_names)


def _write(store: ResultStore, table: pa.Table) -> str:
    """Write a compacted file and read it back; its path. Raises RunFailed where what is read is not what was to be written."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=_GROUP_ROWS, store_schema=True)
    content = buffer.getvalue()
    path = f"{LAYOUT}/{COMPACTED}{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    with suppress(FileExistsError):  # named by its content: another compaction wrote the same, which is read back like one's own
        store.files.create(path, content)
    back = read_table(store.files.read(path, largest(path)), path)
    if not _same(back, table):
        raise RunFailed(f"{store.location}/{path} does not hold what was written to it; the files that it was made of are all there")
    return path
