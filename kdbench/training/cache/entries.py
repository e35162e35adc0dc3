"""The entries of a results folder's teacher cache as a whole: what there is, whether its bytes are right, what can go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pydantic import ValidationError

from kdbench.catalogue import nearest
from kdbench.errors import RunFailed, UserError, not_written
from kdbench.experiment import content_hash
from kdbench.storage.layout import Layout
from kdbench.storage.locks import Held, locked
from kdbench.storage.working_copy import forget_folder, origin, stored_at
from kdbench.training.cache.build import mend
from kdbench.training.cache.copies import bring, stored_entries
from kdbench.training.cache.outputs import FORMAT_VERSION, EntryFacts, read_entry
from kdbench.training.cache.streams import ENTRY, StreamFiles, streams_in

DAY = 86400.0


@dataclass(frozen=True)
class Listed:
    """An entry as `kdbench cache ls` shows it. entry: None where it can't be read, as one of an older format. used: seconds since 1970."""

    key: str
    entry: EntryFacts | None
    streams: tuple[str, ...]  # finished ones
    unfinished: tuple[str, ...]
    nbytes: int
    used: float

    @property
    def facts(self) -> dict[str, object]:
        return self.entry.facts if self.entry is not None else {}


def entries(layout: Layout) -> list[Listed]:
    """All entries, the last used first. Of results at an address those of the store, whether they are on this machine or not."""
    folder = layout.cache("")
    if origin(layout.root) is not None:
        found = [_stored(path, files) for path, files in stored_entries(layout)]
    else:
        found = [_listed(path) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda listed: -listed.used)


def _stored(folder: Path, files: Mapping[str, int]) -> Listed:
    """Only whole streams are sent to a store."""
    place = stored_at(folder)
    assert place is not None, "only asked of a working copy"
    names = sorted(unquote(file.removesuffix(".json")) for file in files if file.endswith(".json") and file != ENTRY)
    entry, used = None, 0.0
    if ENTRY in files:
        stamp = f"{place.path}/{ENTRY}"
        used = place.store.modified(stamp).timestamp()
        with suppress(ValidationError):
            entry = EntryFacts.model_validate_json(place.store.read(stamp))
    return Listed(folder.name, entry, tuple(names), (), sum(files.values()), used)


def _listed(folder: Path) -> Listed:
    finished: list[str] = []
    unfinished: list[str] = []
    for name in streams_in(folder):
        try:
            manifest = StreamFiles(folder, name).read()
        except RunFailed:
            manifest = None
        (finished if manifest is not None and manifest.finished else unfinished).append(name)
    try:
        entry = read_entry(folder)
    except RunFailed:
        entry = None
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    stamp = folder / ENTRY
    return Listed(folder.name, entry, tuple(finished), tuple(unfinished), nbytes, (stamp if stamp.exists() else folder).stat().st_mtime)


def chosen(layout: Layout, beginning: str | None) -> list[Listed]:
    """The entry whose key begins so, or all of them. Raises UserError where there is not exactly one."""
    found = entries(layout)
    if beginning is None:
        return found
    matching = [listed for listed in found if listed.key.startswith(beginning)]
    if len(matching) == 1:
        return matching
    if matching:
        raise UserError(f"cache entry {beginning!r}: {len(matching)} keys begin so; give more of it")
    hint = nearest(beginning, [listed.key for listed in found]) if found else "; the cache is empty"
    raise UserError(f"cache entry {beginning!r}: there is none in {layout.location}{hint}")


def verify(layout: Layout, listed: Listed) -> Iterator[str]:
    """What is wrong with an entry, one line each: every shard is read and its checksum made anew.

    What is damaged is taken out, so that the next run writes it again, and it alone. An entry that is being written is waited for.
    """
    folder = layout.cache(listed.key)
    yield from (f"{name}: damaged in the store" for name in bring(folder, listed.streams))
    with locked(layout.cache_lock(listed.key, "build"), wait=True):
        yield from (f"{name}: can't be read" for name in mend(folder))
        entry = read_entry(folder)
        if entry is not None and content_hash(entry.facts) != listed.key:
            (folder / ENTRY).unlink()
            yield f"{ENTRY}: of another entry than {listed.key}"
        for name in streams_in(folder):
            files = StreamFiles(folder, name)
            broken = files.broken_shards()
            if broken:
                files.discard(broken)
            yield from (f"{name}: shard {s.number} (view {s.view}, images {s.start} to {s.stop - 1}) has other bytes" for s in broken)


def disposable(
    found: Sequence[Listed], teachers: Collection[str], older_than: float | None, keep_gb: float | None
) -> list[tuple[Listed, str]]:
    """Which entries to prune, and why, the least recently used first.

    Those that no run can read, those of teachers not in `teachers` (SHA-256 of file or of tensors), those not used for `older_than` days,
    and of the rest as many as it takes to get down to `keep_gb`.
    """
    reasons: dict[str, str] = {}
    now, kept = time.time(), 0
    for listed in found:  # the last used first
        days = (now - listed.used) / DAY
        if listed.facts.get("format") != FORMAT_VERSION:
            reasons[listed.key] = "can't be read by this version"
        elif listed.facts["teacher"] not in teachers:
            reasons[listed.key] = "its teacher is in no record"
        elif older_than is not None and days > older_than:
            reasons[listed.key] = f"not used for {days:.0f} days"
        elif keep_gb is not None and kept + listed.nbytes > keep_gb * 1e9:
            reasons[listed.key] = f"more than {keep_gb:g} GB"
        else:
            kept += listed.nbytes
    return [(listed, reasons[listed.key]) for listed in reversed(found) if listed.key in reasons]


def remove(layout: Layout, listed: Listed) -> bool:
    """Delete an entry; False where a run uses it. Raises RunFailed where it can't be deleted."""
    try:
        with locked(layout.cache_lock(listed.key, "use")):
            folder = layout.cache(listed.key)
            if folder.exists():
                shutil.rmtree(folder)
            forget_folder(folder)
    except Held:
        return False
    except OSError as error:
        raise not_written(error, layout.cache(listed.key)) from error
    return True
