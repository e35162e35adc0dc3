"""Scratch folders of Ray beside the results. A killed command leaves its own; the next command deletes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from kdbench.storage.layout import Layout
from kdbench.storage.lease import held_now
from kdbench.storage.locks import is_held
from kdbench.storage.working_copy import origin, store_at

SCRATCH = ".ray-"  # how the names of Ray's scratch folders begin; then the experiment and something random, with a hyphen before it


def clear_scratch(layout: Layout, experiment: str) -> None:
    """Delete the scratch folders of commands that are gone. The caller holds the experiment, so it is not one of those that run."""
    names = list(scratch_folders(layout))
    if not names:
        return
    at_work = running(layout) - {experiment}
    address = origin(layout.root)
    for name in names:
        if in_use(name, at_work):
            continue
        if address is None:
            shutil.rmtree(layout.root / name, ignore_errors=True)
        else:
            for path in store_at(address).find(name):
                store_at(address).remove(path, patient=False)


def in_use(name: str, at_work: set[str]) -> bool:
    """Older versions did not name the experiment: such a folder may be that of any command that runs."""
    experiment = name.removeprefix(SCRATCH).rpartition("-")[0]
    return experiment in at_work if experiment else bool(at_work)


def scratch_folders(layout: Layout) -> Iterator[str]:
    address = origin(layout.root)
    if address is not None:
        yield from (name for name in store_at(address).folders() if name.startswith(SCRATCH))
    elif layout.root.is_dir():
        yield from sorted(path.name for path in layout.root.glob(f"{SCRATCH}*") if path.is_dir())


def running(layout: Layout) -> set[str]:
    """The experiments that a command runs at this moment, on any machine."""
    address = origin(layout.root)
    if address is not None:
        return held_now(store_at(address))
    return {path.stem for path in layout.lock("any").parent.glob("*.lock") if is_held(path)}
