"""What files hold, as a hash of their bytes: each is read once, and known again by its path, size and time of modification.

What is known is kept for each user below `~/.cache/kdbench/content` (or `XDG_CACHE_HOME`), a file for each root folder. Where that can't be
written, every process reads the files itself. Files are taken together by the folder that they lie in: one changed picture has its class
read again, and a data set of a million files is kept in a few hundred kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from kdbench.account import cache_home
from kdbench.bounded import open_regular, parse_json, read_file
from kdbench.errors import UserError, printable
from kdbench.storage.folder import local_path

READERS = 8  # threads: reading many small files is waiting for the disk
BIG = 2_000_000_000  # bytes from which on a progress bar says what takes so long
# A file may be written twice within one tick of its file system's clock, and look the same. Ticks are two seconds at most (FAT). So what
# was modified less than two ticks before it was read is not kept: the next process that asks reads it again, as git does.
RACY_NS = 4_000_000_000
_SAVE_SECONDS = 30.0
_BLOCK = 1 << 20
_LARGEST_MEMORY = 100_000_000  # bytes of what is kept of a root folder: 500,000 folders in it

Known = dict[str, tuple[str, str, int]]  # group -> hash of names, sizes and times; then its Content


@dataclass(frozen=True)
class Content:
    """What is known of files. sha256: of their bytes. counted: how many pictures are shown turned."""

    sha256: str
    counted: int


class Advance(Protocol):
    """Told how many bytes were read."""

    def __call__(self, nbytes: int) -> None: ...


Reader = Callable[[Path, Advance], Content]


def read_plainly(path: Path, advance: Advance) -> Content:
    """A file of any size."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return Content(digest.hexdigest(), 0)


def files_content(root: Path, names: Sequence[str], title: str, read: Reader = read_plainly) -> Content:
    """What files hold. Their names below `root` count, and where `root` lies does not.

    Args:
        root: the folder that the names are relative to.
        names: paths with `/`, in the order of their rows.
        title: what the progress bar of a long reading is about.
        read: reads one file.

    Raises UserError for a file that can't be read.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    found = group_contents(root, groups, title, read)
    return Content(_hash([names, [group.sha256 for group in found.values()]]), sum(group.counted for group in found.values()))


def group_contents(root: Path, groups: Mapping[str, Sequence[str]], title: str, read: Reader = read_plainly) -> dict[str, Content]:
    """What each group of files holds, whatever the files are called. A group is read again as a whole where one of its files has changed.

    Args:
        root: the folder that the files' names are relative to.
        groups: names of files by the name of their group, under which it is known again.
        title: what the progress bar of a long reading is about.
        read: reads one file.

    Raises UserError for a file that can't be read.
    """
    memory = _memory(root)
    known = _remembered(memory)
    looks = {group: _look(root, names) for group, names in groups.items()}
    new = [group for group in groups if group not in known or known[group][0] != looks[group].hash]
    saved, fresh = time.monotonic(), Known()
    with _progress(sum(looks[group].nbytes for group in new), title) as advance, ThreadPoolExecutor(READERS) as readers:
        for group in new:
            started = time.time_ns()
            content = _read_all([root / name for name in groups[group]], read, readers, advance)
            known[group] = looks[group].hash, content.sha256, content.counted
            # What somebody writes to while it is read is read again next time.
            if looks[group].newest + RACY_NS < started and _look(root, groups[group]).hash == looks[group].hash:
                fresh[group] = known[group]
            if time.monotonic() - saved > _SAVE_SECONDS:
                _remember(memory, fresh)
                saved = time.monotonic()
    if fresh:
        _remember(memory, fresh)
    return {group: Content(*known[group][1:]) for group in groups}


def newest_change(paths: Sequence[Path]) -> float:
    """When the last of these files was modified, in seconds since 1970."""
    return max((path.stat().st_mtime for path in paths), default=0.0)


class _Look:
    """What a folder's files look like from outside. newest: when the last of them was modified, in nanoseconds since 1970."""

    def __init__(self, stats: Mapping[str, os.stat_result]) -> None:
        listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
        self.hash = _hash(listing)
        self.nbytes = sum(stat.st_size for stat in stats.values())
        self.newest = max((stat.st_mtime_ns for stat in stats.values()), default=0)


def _look(root: Path, names: Sequence[str]) -> _Look:
    try:
        return _Look({name: os.stat(root / name) for name in names})
    except OSError as error:
        raise _unreadable(error, root) from error


def _read_all(paths: Sequence[Path], read: Reader, readers: ThreadPoolExecutor, advance: Advance) -> Content:
    def one(path: Path) -> Content:
        try:
            return read(path, advance)
        except OSError as error:
            raise _unreadable(error, path) from error

    contents = list(readers.map(one, paths))
    return Content(_hash([content.sha256 for content in contents]), sum(content.counted for content in contents))


def _hash(value: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _unreadable(error: OSError, path: Path) -> UserError:
    return UserError(printable(f"{error.filename or path} can't be read: {error.strerror or error}"))


# --- what is remembered ----------------------------------------------------------------------------------------------


def _memory(root: Path) -> Path:
    caches = local_path(cache_home(), "XDG_CACHE_HOME")
    return caches / "kdbench" / "content" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json"


def _remembered(memory: Path) -> Known:
    """Empty where nothing is kept, or nothing that this module wrote."""
    try:
        kept = parse_json(read_file(memory, _LARGEST_MEMORY))
        return {str(group): (str(look), str(sha256), int(counted)) for group, (look, sha256, counted) in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(memory: Path, fresh: Known) -> None:
    """Add to what is kept. Of two processes that write at once one may lose what it added: that is then read again."""
    keep_for_user(memory, json.dumps(_remembered(memory) | fresh))


def keep_for_user(memory: Path, text: str) -> None:
    """Write a file below the user's caches in one step, or not at all: what it holds can be made again."""
    temporary = memory.with_name(f".{memory.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # no home, a full disk: it is then made again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text)
            temporary.replace(memory)
        finally:
            temporary.unlink(missing_ok=True)


# --- what is shown ---------------------------------------------------------------------------------------------------


@contextmanager
def _progress(nbytes: int, title: str) -> Iterator[Advance]:
    if nbytes < BIG:
        yield lambda nbytes: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{title}: reading {nbytes / 1e9:.1f} GB once, to know their content", total=nbytes)
        yield lambda nbytes: progress.advance(task, nbytes)
