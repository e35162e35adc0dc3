"""The results: a small Parquet file a finished training, written once, never edited, in a folder or at an address."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from kdbench.catalogue import nearest
from kdbench.errors import KDBenchError, UnreadableFile, UserError, not_written, shown
from kdbench.records.record import NewerRecord, RunRecord, to_table
from kdbench.records.record_files import Identity, RecordFile, is_compacted, is_record_file, largest, opened
from kdbench.storage.address import folder_at, is_address
from kdbench.storage.folder import Folder
from kdbench.storage.object_store import LARGEST_FILE, Files
from kdbench.storage.working_copy import origin, store_at

LAYOUT = "v1"
FILTERS = frozenset(
    {
        "task",
        "data",
        "teacher",
        "student",
        "label",
        "method",
        "role",
        "experiment",
        "protocol_hash",
        "unit_key",
        "status",
        "study_id",
        "search_hash",
        "seed",
    }
)
# The longest fields, which no board looks at: a scan of very many records is asked to leave them out.
LONG_FIELDS = frozenset({"curve", "config", "versions", "devices"})
READERS = 8  # threads: an object store answers a small read in tens of milliseconds
LISTINGS = 5  # files may be compacted between being listed and being read: then the list is made anew
LONGEST_NAME = 100  # of a path's part; two of them and a run id stay under the 255 bytes of common file systems

log = logging.getLogger(__name__)


class _UnreadableRows(Exception):
    """A file of records was opened, and some of its rows can't be read. It counts as a file that can't be read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _Row(NamedTuple):
    """Where a record is."""

    identity: Identity
    path: str
    number: int


class ResultStore:
    """Append-only records and the bytes that belong to them, below one location.

    Records are never changed, so a store remembers the files that it has read; `scan` reads only what is new. A file that is not one of
    records, a pipe say, or a record that a crash tore, is left out with a warning that names it, and looked at again the next time.
    """

    def __init__(self, location: str | Path) -> None:
        """`location`: a folder, or an address (`s3://bucket/folder`); a working copy stands for its address. Nothing is created yet.

        Raises UserError where the address can't be used or its driver is not installed.
        """
        address = str(location) if is_address(str(location)) else origin(Path(location))
        self.files: Files = store_at(address) if address is not None else Folder(folder_at(str(location)))
        self.location = self.files.name
        self._read: dict[str, RecordFile] = {}

    def append(self, record: RunRecord) -> str:
        """Write the record for good and return its path relative to the location.

        Raises UserError where the run is there already or the location can't be written, StorageFailed where there is no space or answer.
        """
        relative = record_path(record)
        try:
            self.files.create(relative, _parquet_bytes(record))
        except FileExistsError:
            raise UserError(
                f"{self.location}/{relative} exists: results are never overwritten; a correction is a new record with the same unit_key"
            ) from None
        return relative

    def scan(self, *, without: Collection[str] = (), **equals: Any) -> list[RunRecord]:
        """The records whose fields have the given values, oldest first; of several of one training on one test part only the latest.

        A record that was written under a lower lease than another one of its unit is none of them: its driver had been taken over.

        without: fields that the caller does not look at; those of compacted records are not read then.

        Raises UserError for a field that can't be filtered by, NewerRecord for a record that only a newer kdbench can read.
        """
        unreadable: set[str] = set()
        while True:
            try:
                return self._scanned(unreadable, without, equals)
            except _UnreadableRows as error:
                unreadable.add(error.path)

    def _scanned(self, unreadable: Collection[str], without: Collection[str], equals: dict[str, Any]) -> list[RunRecord]:
        rows, files = self._matching(equals, unreadable)
        found: list[tuple[Identity, RunRecord]] = []
        for path, group in groupby(sorted(rows, key=lambda row: row.path), key=lambda row: row.path):
            here = sorted(group, key=lambda row: row.number)
            records = self._records(files[path], path, [row.number for row in here], without)
            found += zip((row.identity for row in here), records, strict=True)
        return [record for _, record in sorted(found, key=lambda pair: pair[0])]

    def _records(self, file: RecordFile, path: str, numbers: Sequence[int], without: Collection[str] = ()) -> list[RunRecord]:
        """Raises _UnreadableRows, once a warning names the file. It is read anew the next time."""
        with self._left_out(path):
            return file.records(numbers, without)

    @contextmanager
    def _left_out(self, path: str) -> Iterator[None]:
        try:
            yield
        except NewerRecord:
            raise
        except UserError as error:
            leave_out(error)
            self._read.pop(path, None)
            raise _UnreadableRows(path) from error

    def keys(self, **equals: Any) -> set[str]:
        """The `unit_key` of every record that `scan` gives: the work that need not be done again."""
        unreadable: set[str] = set()
        while True:
            try:
                return {row.identity.unit_key for row in self._matching(equals, unreadable)[0]}
            except _UnreadableRows as error:
                unreadable.add(error.path)

    def by_unit(self) -> Callable[[str], list[RunRecord]]:
        """A function from a `unit_key` to its records as they are now, one for each test part, oldest first."""
        files = self.record_files()
        rows = _by_unit(files)

        def records(key: str) -> list[RunRecord]:
            nonlocal rows
            while True:
                try:
                    return [self._records(files[row.path], row.path, [row.number])[0] for row in sorted(rows.get(key, ()))]
                except _UnreadableRows as error:
                    del files[error.path]
                    rows = _by_unit(files)

        return records

    def record_paths(self) -> list[str]:
        """Every file of records, relative to the location, in the order of their names."""
        return sorted(path for path in self.files.find(LAYOUT) if is_record_file(path))

    def check_writable(self) -> None:
        """Raise UserError or RunFailed now rather than after hours of training, where `append` would fail."""
        probe = f".writable-{secrets.token_hex(8)}.tmp"
        try:
            self.files.replace(probe, b"kdbench")
        except BaseException:
            with suppress(KDBenchError, OSError):
                self.files.remove(probe, patient=False)
            raise
        self.files.remove(probe)

    def write_bytes(self, relative: str, data: bytes) -> str:
        """Write a file in one step, replacing one of that name, and return the SHA-256 of its content in hex."""
        self.files.replace(self._inside(relative), data)
        return hashlib.sha256(data).hexdigest()

    def write_pieces(self, relative: str, pieces: Iterable[bytes]) -> None:
        """Write a file of any size in one step, from pieces of it. Where they end in an error, no file is left."""
        with tempfile.TemporaryDirectory(prefix="kdbench-") as scratch:
            local = Path(scratch) / "file"
            try:
                with local.open("wb") as file:
                    file.writelines(pieces)
            except OSError as error:
                raise not_written(error, local) from error
            self.files.take(self._inside(relative), local)

    def has(self, relative: str) -> bool:
        """Whether there is a file of that name below the location."""
        return self.files.exists(self._inside(relative))

    def read_bytes(self, relative: str, most: int = LARGEST_FILE) -> bytes:
        """The content of a file below the location.

        Raises UserError where there is none, UnreadableFile where it is no regular file or has more than `most` bytes.
        """
        try:
            return self.files.read(self._inside(relative), most)
        except FileNotFoundError as error:
            raise UserError(f"there is no {relative!r} in the results folder {self.location}") from error

    @property
    def single_files(self) -> int:
        """How many files of one record were read so far."""
        return sum(not is_compacted(path) for path in self._read)

    def record_files(self) -> dict[str, RecordFile]:
        """Every file of records that can be read, by path. Raises NewerRecord for one that only a newer kdbench can read."""
        for _ in range(LISTINGS - 1):
            try:
                return self._listed()
            except FileNotFoundError:
                continue
        return self._listed()

    def _listed(self) -> dict[str, RecordFile]:
        paths = self.record_paths()
        new = [path for path in paths if path not in self._read]
        with ThreadPoolExecutor(READERS) as readers:
            read = zip(new, readers.map(self._opened, new), strict=True)
            self._read.update((path, file) for path, file in read if file is not None)
        return {path: self._read[path] for path in paths if path in self._read}

    def _opened(self, path: str) -> RecordFile | None:
        """None, after a warning, where it can't be read. Raises FileNotFoundError, and what the storage itself raises."""
        try:
            content = self.files.read(path, largest(path))
        except UnreadableFile as error:
            leave_out(error)
            return None
        with suppress(_UnreadableRows), self._left_out(path):
            return opened(content, f"{self.location}/{path}")
        return None

    def _matching(self, equals: dict[str, Any], unreadable: Collection[str]) -> tuple[list[_Row], dict[str, RecordFile]]:
        """Of each unit the record that counts, where it has these values, and the files. One that is in two files counts once."""
        for name in equals.keys() - FILTERS:
            raise UserError(f"results can't be filtered by {name!r}{nearest(name, FILTERS)}")
        files = {path: file for path, file in self.record_files().items() if path not in unreadable}
        matching: dict[str, Collection[int]] = {}
        for path, file in files.items():
            with self._left_out(path):
                matching[path] = file.matching(equals)
        return [row for row in _latest(files).values() if row.number in matching[row.path]], files

    def _inside(self, relative: str) -> str:
        if not is_inside(relative):
            raise UserError(f"{shown(relative)} is not a path inside the results folder {self.location}")
        return str(PurePosixPath(relative))


def is_inside(relative: str) -> bool:
    """Whether what a record names lies in its own results folder."""
    path = PurePosixPath(relative)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in relative


def leave_out(error: UserError) -> None:
    """Warn that a file of records is left out. Boards are read again and again, by a server say: each line is said once."""
    _warn(f"left out: {error}")


@cache
def _warn(line: str) -> None:
    log.warning("%s", line)


def _by_unit(files: dict[str, RecordFile]) -> dict[str, list[_Row]]:
    rows: dict[str, list[_Row]] = {}
    for row in _latest(files).values():
        rows.setdefault(row.identity.unit_key, []).append(row)
    return rows


def _latest(files: dict[str, RecordFile]) -> dict[tuple[str, str], _Row]:
    """The record that counts of each training and test part; none that another one stands for."""
    highest: dict[tuple[str, str], int] = {}  # of the leases under which a unit was written
    superseded: set[str] = set()
    for file in files.values():
        for identity in file.identities:
            if identity.lease > highest.get(identity.measurement, 0):
                highest[identity.measurement] = identity.lease
            if identity.supersedes:
                superseded.add(identity.supersedes)
    latest: dict[tuple[str, str], _Row] = {}
    for path, file in files.items():
        for number, identity in enumerate(file.identities):
            if 0 < identity.lease < highest[identity.measurement]:
                continue
            known = latest.get(identity.measurement)
            if known is None or identity > known.identity:
                latest[identity.measurement] = _Row(identity, path, number)
    return {measurement: row for measurement, row in latest.items() if row.identity.run_id not in superseded}


def record_path(record: RunRecord) -> str:
    """Where a record lives below the location: `v1/<task>/<data>/<teacher>~<student>/<label>/<run_id>.parquet`."""
    pair = f"{path_name(record.teacher or 'none')}~{path_name(record.student)}"
    return "/".join(
        [LAYOUT, path_name(record.task), path_name(record.data), pair, path_name(record.label), f"{path_name(record.run_id)}.parquet"]
    )


def path_name(name: str) -> str:
    """A name as one part of a path: letters, digits and `._-`, never hidden, never empty. Different names may meet in one folder."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:LONGEST_NAME]
    return cleaned or "_"


def _parquet_bytes(record: RunRecord) -> bytes:
    buffer = BytesIO()
    # one row: codecs, dictionaries and statistics a column would cost more time to read back than they save in bytes
    pq.write_table(to_table(record), buffer, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    return buffer.getvalue()
