"""The results folder: a small Parquet file a finished training, written once, never edited, on a local disk or any fsspec file system."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from kdbench.catalogue import nearest
from kdbench.errors import UserError, not_written
from kdbench.results.record import RunRecord, from_table, to_table

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
NOT_WRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}
)
NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
READERS = 8  # threads: an object store answers a small read in tens of milliseconds
LONGEST_NAME = 100  # of a path's part; two of them and a run id stay under the 255 bytes of common file systems


class ResultStore:
    """Append-only records and the bytes that belong to them, below one location.

    Records are files that never change, so a store remembers those that it has read; `scan` reads only what is new.
    """

    def __init__(self, location: str | Path) -> None:
        """`location`: a folder, or an address that fsspec knows (`s3://bucket/folder`, `memory://x`). Nothing is created yet.

        Raises UserError where the address has an unknown scheme or its driver is not installed.
        """
        self.location = str(location)
        try:
            self._files, root = url_to_fs(self.location)
        except (ValueError, ImportError) as error:
            raise UserError(f"results location {self.location!r}: {error}") from error
        self._local = isinstance(self._files, LocalFileSystem)
        self._root = root.rstrip("/")
        self._read: dict[str, RunRecord] = {}

    def append(self, record: RunRecord) -> str:
        """Write the record for good and return its path relative to the location.

        Raises UserError where the run is already there or the location can't be written, DiskFull where there is no space.
        """
        relative = record_path(record)
        self._write(relative, _parquet_bytes(record), replace=False)
        return relative

    def scan(self, **equals: Any) -> list[RunRecord]:
        """The records whose fields have the given values, oldest first; of several with the same `unit_key` only the latest.

        Raises UserError for a field that can't be filtered by, and for a file that can't be read.
        """
        for name in equals.keys() - FILTERS:
            raise UserError(f"results can't be filtered by {name!r}{nearest(name, FILTERS)}")
        latest: dict[str, RunRecord] = {}
        for record in sorted(self._records(), key=lambda r: (r.created_at, r.run_id)):
            latest[record.unit_key] = record
        kept = [r for r in latest.values() if all(getattr(r, name) == value for name, value in equals.items())]
        return sorted(kept, key=lambda r: (r.created_at, r.run_id))

    def keys(self, **equals: Any) -> set[str]:
        """The `unit_key` of every record that `scan` gives: the work that need not be done again."""
        return {record.unit_key for record in self.scan(**equals)}

    def by_unit_key(self, key: str) -> RunRecord | None:
        """The latest record of that unit, None where there is none."""
        found = self.scan(unit_key=key)
        return found[0] if found else None

    def record_paths(self) -> list[str]:
        """Every file of records, relative to the location, in the order of their names."""
        return sorted(path.removeprefix(f"{self._root}/") for path in self._paths())

    def check_writable(self) -> None:
        """Raise UserError or RunFailed now rather than after hours of training, where `append` would fail."""
        probe = f".writable-{secrets.token_hex(8)}.tmp"
        try:
            self._write(probe, b"kdbench", replace=True)
        finally:
            if self._exists(self._absolute(probe)):
                self._files.rm_file(self._absolute(probe))

    def write_bytes(self, relative: str, data: bytes) -> str:
        """Write a file in one step, replacing one of that name, and return the SHA-256 of its content in hex."""
        self._write(relative, data, replace=True)
        return hashlib.sha256(data).hexdigest()

    def has(self, relative: str) -> bool:
        """Whether there is a file of that name below the location."""
        return self._exists(self._absolute(relative))

    def read_bytes(self, relative: str) -> bytes:
        """The content of a file below the location. Raises UserError where there is none."""
        try:
            return self._files.cat_file(self._absolute(relative))
        except FileNotFoundError as error:
            raise UserError(f"there is no {relative!r} in the results folder {self.location}") from error

    def _absolute(self, relative: str) -> str:
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(f"{relative!r} is not a path inside the results folder {self.location}")
        return f"{self._root}/{path}"

    def _paths(self) -> list[str]:
        folder = f"{self._root}/{LAYOUT}"
        if self._local and os.path.exists(self._root) and not os.path.isdir(self._root):
            raise UserError(f"{self.location} is a file, expected a results folder")
        self._files.invalidate_cache()
        return [path for path in self._files.find(folder) if _is_record(path)] if self._files.exists(folder) else []

    def _records(self) -> list[RunRecord]:
        paths = self._paths()
        new = [path for path in paths if path not in self._read]
        with ThreadPoolExecutor(READERS) as readers:
            self._read.update(zip(new, readers.map(self._record, new), strict=True))
        return [self._read[path] for path in paths]

    def _record(self, path: str) -> RunRecord:
        return _parse(self._files.cat_file(path), path)

    def _write(self, relative: str, data: bytes, replace: bool) -> None:
        """All of the file or nothing of it: a temporary name in the same folder, synced, then renamed."""
        path = self._absolute(relative)
        if not replace and self._exists(path):
            raise UserError(f"{path} exists: results are never overwritten; a correction is a new record with the same unit_key")
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(4)}.tmp"
        try:
            _write_local(temporary, path, data) if self._local else _write_remote(self._files, temporary, path, data)
        except OSError as error:
            raise self._explained(error, path) from error

    def _exists(self, path: str) -> bool:
        self._files.invalidate_cache()
        return self._files.exists(path)

    def _explained(self, error: OSError, path: str) -> Exception:
        if error.errno in NOT_WRITABLE or isinstance(error, PermissionError):
            return UserError(
                f"the results folder {self.location} can't be written ({error.strerror or error}): "
                "choose another with --results DIR or the variable KDBENCH_RESULTS"
            )
        return not_written(error, path)


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


def _is_record(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.endswith(".parquet") and not name.startswith(".")


def _parquet_bytes(record: RunRecord) -> bytes:
    buffer = BytesIO()
    # one row: codecs, dictionaries and statistics a column would cost more time to read back than they save in bytes
    pq.write_table(to_table(record), buffer, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    return buffer.getvalue()


def _parse(content: bytes, path: str) -> RunRecord:
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a readable Parquet file ({_first_line(error)}): "
            "restore it from a copy, or delete it to have that training run again"
        ) from error
    return from_table(table, path)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _write_local(temporary: str, path: str, data: bytes) -> None:
    """Survives a power cut: the content and every folder entry that leads to it are on disk before this returns."""
    folder = Path(path).parent
    new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _removed_on_failure(lambda: Path(temporary).unlink(missing_ok=True)):
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    for changed in dict.fromkeys([folder, *(new.parent for new in new_folders)]):
        _sync_folder(changed)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:  # some network file systems have no such call; their rename is durable or nothing can be done
            raise
    finally:
        os.close(descriptor)


def _write_remote(files: Any, temporary: str, path: str, data: bytes) -> None:
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    with _removed_on_failure(lambda: files.rm_file(temporary) if files.exists(temporary) else None):
        files.pipe_file(temporary, data)
        files.mv(temporary, path)


@contextmanager
def _removed_on_failure(remove: Callable[[], None]) -> Iterator[None]:
    """Calls `remove` when the body is left by an exception, an interrupt from the keyboard included."""
    try:
        yield
    except BaseException:
        remove()
        raise
