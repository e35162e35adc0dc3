"""The teacher's cache of results at an address: uploaded once when it is whole, downloaded once by each machine that reads it.

In the store an entry has the same files as on disk. A stream's manifest goes up last, so that a stream that can be seen there is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from kdbench.storage.layout import Layout
from kdbench.storage.locks import locked
from kdbench.storage.working_copy import StoredAt, stored_at
from kdbench.training.cache.streams import ENTRY, Manifest, StreamFiles, streams_in

INDEX = "index.npy"


def bring(folder: Path, names: Iterable[str]) -> list[str]:
    """Have these streams of an entry on this machine, those of them that the store has. Nothing is asked for what is here already.

    One process of a machine downloads. What came is checked against its checksums: streams that are damaged in the store are taken out
    of it, and returned.
    """
    place = stored_at(folder)
    if place is None or not (lacking := _lacking(folder, names)):
        return []
    layout = Layout(folder.parents[1])
    with locked(layout.cache_lock(folder.name, "copy"), wait=True):
        there = place.store.sizes(place.path)
        wanted = [name for name in _lacking(folder, lacking) if f"{place.path}/{_manifest(name)}" in there]
        if not wanted:
            return []
        for file in (INDEX, ENTRY):
            if not (folder / file).exists():
                place.store.download(f"{place.path}/{file}", folder / file)
        return [name for name in wanted if not _downloaded(place, folder, name)]


def send(folder: Path) -> None:
    """Have the store hold all whole streams of an entry. Raises StorageFailed where it does not take them."""
    place = stored_at(folder)
    if place is None or not (folder / ENTRY).exists():
        return
    there = place.store.sizes(place.path)
    for name in streams_in(folder):
        files = StreamFiles(folder, name)
        manifest = files.read()
        if manifest is None or not manifest.finished or f"{place.path}/{files.manifest.name}" in there:
            continue
        for path in (folder / INDEX, files.data, files.manifest):
            place.store.upload(path, f"{place.path}/{path.name}")
    place.store.upload(folder / ENTRY, f"{place.path}/{ENTRY}")  # each time: that is when it was last used


def stored_entries(layout: Layout) -> Iterator[tuple[Path, dict[str, int]]]:
    """The entries that the store has: the folder that each has on this machine, and its files with their bytes."""
    place = stored_at(layout.cache("any"))
    if place is None:
        return
    entries: dict[str, dict[str, int]] = {}
    for path, size in place.store.sizes("cache").items():
        _, key, file = path.split("/", 2)
        entries.setdefault(key, {})[file] = size
    yield from ((layout.cache(key), files) for key, files in entries.items())


def _lacking(folder: Path, names: Iterable[str]) -> list[str]:
    """The streams that are not whole here."""
    manifests = {name: StreamFiles(folder, name).read() for name in names}
    return [name for name, manifest in manifests.items() if manifest is None or not manifest.finished]


def _downloaded(place: StoredAt, folder: Path, name: str) -> bool:
    """Whether the stream is here now; one that is damaged is taken out of the store."""
    files = StreamFiles(folder, name)
    manifest = Manifest.model_validate_json(place.store.read(f"{place.path}/{files.manifest.name}"))
    files.remove()
    place.store.download(f"{place.path}/{files.data.name}", files.data)
    if files.broken_shards(manifest):
        files.remove()
        for path in (files.manifest, files.data):  # the manifest first: without it the rest is not looked at
            place.store.remove(f"{place.path}/{path.name}")
        return False
    files.keep(manifest)
    return True


def _manifest(name: str) -> str:
    return f"{quote(name, safe='')}.json"
