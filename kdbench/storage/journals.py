"""Append-only files of a working copy in the store: what was added goes up as an object of its own, so that its price doesn't grow.

A journal is the object `PATH`, its beginning, and objects `PATH.parts/OFFSET`, each going on where the one before ends. Whoever opens it
next puts them together. All are made by conditional PUTs, and none is written again or deleted: a driver that goes on though another one
took over changes nothing that is there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdbench.bounded import ImplausibleFile, open_regular, read_file
from kdbench.errors import RunFailed
from kdbench.storage.object_store import Files
from kdbench.storage.working_copy import stored_at

LONGEST_LINE = 1_000_000  # bytes; Optuna writes some hundred
_LARGEST = 500_000_000  # bytes: of 100,000 trials of 100 epochs
_READERS = 16

_sent: dict[Path, int] = {}  # how much of a journal the store has, for those that this process opened


def fetch_journal(path: Path) -> Path:
    """Have the store's state of a journal here; returns `path`. Its writer calls this once, before it opens it.

    What is here stays where it goes on from what the store has: then its end could not be uploaded. Else another machine went on.
    """
    place = stored_at(path)
    if place is None:
        return path
    theirs = whole_lines(whole_journal(place.store, place.path))
    if theirs and not (path.exists() and read_journal_file(path).startswith(theirs)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(theirs)
    _sent[path] = len(theirs)
    return path


def upload_journal(path: Path) -> None:
    """Have the store hold all whole lines of a fetched journal.

    Raises StorageFailed where the store does not take them, RunFailed where another driver writes to this journal.
    """
    place = stored_at(path)
    if place is None:
        return
    sent = _sent[path]
    with open_regular(path) as file:
        file.seek(sent)
        added = whole_lines(file.read())
    if not added:
        return
    try:
        place.store.create(f"{place.path}.parts/{sent:012d}" if sent else place.path, added)
    except FileExistsError:
        raise RunFailed(f"{place.store.name}/{place.path}: another driver writes to this search; let one of them go on") from None
    _sent[path] = sent + len(added)


def read_journal(path: Path) -> bytes:
    """All of a journal for whoever only looks at it, of a working copy's as its store has it; empty where there is none."""
    place = stored_at(path)
    if place is not None:
        return whole_journal(place.store, place.path)
    return read_journal_file(path) if path.exists() else b""


def read_journal_file(path: Path) -> bytes:
    """All of a journal on this machine.

    Raises:
        ImplausibleFile: it is no regular file, or its length or that of one of its lines is beyond what a search writes.
        OSError: there is none, or it can't be read.
    """
    content = read_file(path, _LARGEST)
    start = 0
    while 0 <= start < len(content):
        end = content.find(b"\n", start, start + LONGEST_LINE + 1)
        if end < 0 and len(content) - start > LONGEST_LINE:
            raise ImplausibleFile(path, f"it has a line of more than {LONGEST_LINE / 1e6:g} MB")
        start = end + 1 if end >= 0 else len(content)
    return content


def whole_journal(files: Files, path: str) -> bytes:
    """The beginning and the parts, put together; empty where there is none."""
    try:
        content = files.read(path)
    except FileNotFoundError:
        return b""
    parts = sorted(files.find(f"{path}.parts"))
    with ThreadPoolExecutor(_READERS) as readers:
        for part, added in zip(parts, readers.map(files.read, parts), strict=True):
            offset = int(part.rpartition("/")[2])
            if offset == len(whole_lines(content)):  # a line that a killed writer did not end is nobody's
                content = content[:offset] + added
    return content


def whole_lines(content: bytes) -> bytes:
    """A journal without a last line that was cut off, or that whoever writes at this moment is in the middle of."""
    return content[: content.rfind(b"\n") + 1]
