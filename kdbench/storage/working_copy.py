"""The working copy of results at an address: a folder of this machine in which trainings work as in any other.

The folder says itself what it is a copy of, in a file `.origin`. What has to outlive the machine is uploaded when it is written, and
what is asked for is downloaded when it is missing. In a folder without that file none of these functions does anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kdbench.account import cache_home
from kdbench.bounded import read_file
from kdbench.errors import StorageFailed, UserError, not_written
from kdbench.storage.address import checked_address
from kdbench.storage.folder import NOT_WRITABLE, file_sha256, local_path
from kdbench.storage.object_store import ObjectStore

ORIGIN = ".origin"
_LARGEST_ORIGIN = 10_000  # bytes: an address and a name
HOME = "KDBENCH_WORKING_COPIES"
# Folders whose files are uploaded when they are written. Studies go up as `journals`, the cache's entries when they are whole; records are
# never written here.
UPLOADED = frozenset({"teachers", "students", "predictions", "choices", "logs", "checkpoints"})
# What can be made again: a training doesn't wait for a storage that refuses it.
DISPENSABLE = frozenset({"logs", "checkpoints"})
_SPARED = 10.0  # a checkpoint that took a second to upload is not uploaded again for so many: a tenth of the time at most
_SILENT_SECONDS = 60.0  # how long a storage that refused something dispensable is left alone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredAt:
    """A file of a working copy: where the store is, and the file's path in it."""

    store: ObjectStore
    path: str

    @property
    def kind(self) -> str:
        return self.path.partition("/")[0]


def working_copy(address: str) -> Path:
    """The folder of this machine for results at an address, made where it is missing.

    Below KDBENCH_WORKING_COPIES, or ~/.cache/kdbench/results. Raises UserError for an address that can't be used, and where the folder
    can't be made.
    """
    address = checked_address(address)
    above = Path(os.environ.get(HOME) or cache_home() / "kdbench" / "results")
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", address.partition("://")[2])[:60]
    place = local_path(above, HOME if os.environ.get(HOME) else "XDG_CACHE_HOME")
    folder = (place / f"{readable}-{hashlib.sha256(address.encode()).hexdigest()[:16]}").resolve()
    marker = folder / ORIGIN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            temporary = folder / f"{ORIGIN}.{os.getpid()}.tmp"
            temporary.write_text(f"{address}\n{secrets.token_hex(8)}\n")
            temporary.replace(marker)
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            raise UserError(
                f"results {address}: the working copy on this machine can't be made in {folder} ({error.strerror}); "
                f"let the variable {HOME} name a folder that you can write"
            ) from error
        raise not_written(error, folder) from error
    return folder


def origin(root: Path) -> str | None:
    """The address that this folder is the working copy of, None for any other folder."""
    lines = _marker(root)
    return lines[0] if lines else None


def holder(root: Path) -> str:
    """A name for this working copy, by which its processes know each other's leases: file locks in it keep them apart anyway."""
    return _marker(root)[1]


def _marker(root: Path) -> list[str]:
    try:
        return read_file(root / ORIGIN, _LARGEST_ORIGIN).decode(errors="replace").splitlines()
    except OSError as error:
        if error.errno in NOT_WRITABLE:  # there is no such place, or nobody may look: who writes to it will be told
            return []
        raise


def stored_at(path: Path) -> StoredAt | None:
    """Where the store has this file of a working copy; None for a file of any other folder."""
    for parent in path.parents:
        address = origin(parent)
        if address is not None:
            return StoredAt(store_at(address), str(path.relative_to(parent)))
    return None


@cache
def store_at(address: str) -> ObjectStore:
    return ObjectStore(address)


def upload(path: Path) -> None:
    """Have the store hold a file that was just written, where it is of a kind that must outlive this machine.

    What is DISPENSABLE is tried once, and not too often. Anything else is in the store when this returns, or StorageFailed is raised.
    """
    place = stored_at(path)
    if place is None or place.kind not in UPLOADED:
        return
    if place.kind not in DISPENSABLE:
        place.store.upload(path, place.path)
        return
    if time.monotonic() < _next_upload.get(place, 0.0) or time.monotonic() < _silent_until.get(place.store.name, 0.0):
        return
    begun = time.monotonic()
    try:
        place.store.upload(path, place.path, patient=False)
    except StorageFailed as error:
        _silent_until[place.store.name] = time.monotonic() + _SILENT_SECONDS
        log.warning("%s was kept on this machine only, training goes on: %s", place.path, error)
    _next_upload[place] = time.monotonic() + _SPARED * (time.monotonic() - begun)


_next_upload: dict[StoredAt, float] = {}
_silent_until: dict[str, float] = {}


def fetch(path: Path, sha256: str | None = None, newest: bool = False) -> Path:
    """Have a file of a working copy on this machine, where the store has it; returns `path` either way.

    What is here already is not asked for again, unless it is not the one with this `sha256`, or `newest` is wanted.
    """
    place = stored_at(path)
    if place is None or (path.exists() and not newest and (sha256 is None or file_sha256(path) == sha256)):
        return path
    with suppress(FileNotFoundError):
        place.store.download(place.path, path)
    return path


def fetch_later(path: Path) -> Path:
    """Have the store's file here if it was written after the one that is here, or if none is; returns `path`.

    For files of which either will do, and the later one saves time: machines' clocks are compared.
    """
    place = stored_at(path)
    if place is None:
        return path
    with suppress(FileNotFoundError):
        if not path.exists() or place.store.modified(place.path).timestamp() > path.stat().st_mtime:
            place.store.download(place.path, path)
    return path


def forget(path: Path) -> None:
    """Delete a file here and in the store; no error where there is none."""
    path.unlink(missing_ok=True)
    place = stored_at(path)
    if place is None:
        return
    _next_upload.pop(place, None)
    try:
        place.store.remove(place.path, patient=place.kind not in DISPENSABLE)
    except StorageFailed:
        if place.kind not in DISPENSABLE:
            raise


def forget_folder(folder: Path) -> None:
    """Delete a folder here and in the store."""
    shutil.rmtree(folder, ignore_errors=True)
    place = stored_at(folder)
    if place is not None:
        for path in place.store.find(place.path):
            place.store.remove(path)
