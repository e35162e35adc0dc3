"""What a killed command leaves in the results beside what it had finished. The next command clears it away; `kdbench verify` names it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from kdbench.credentials import without_secrets
from kdbench.storage.layout import Layout
from kdbench.storage.lease import held_now
from kdbench.storage.locks import is_held
from kdbench.storage.working_copy import origin, store_at
from kdbench.tracking import open_runs, tracking_uri

SCRATCH = ".ray-"  # how the names of Ray's scratch folders begin; then the experiment and something random, with a hyphen before it


def left_behind(results: Path) -> list[str]:
    """A line for each thing that a killed command left. What belongs to a command that runs at this moment is not among them."""
    layout, uri = Layout(results), tracking_uri(results)
    shown_as = without_secrets(uri)
    scratch, shown = list(_scratch(layout)), open_runs(uri, layout.location)
    running = _running(layout) if scratch or shown else set()
    lines = [
        f"{layout.location}/{name}: scratch of Ray that a killed command left; the next command on this folder deletes it"
        for name in scratch
        if not _in_use(name, running)
    ]
    for experiment, count in sorted(shown.items()):
        if experiment not in running:
            runs = f"{count} run{'s' if count > 1 else ''} of experiment {experiment}"
            lines.append(
                f"MLflow at {shown_as} shows {runs} as running, which a killed command left; the next `kdbench run` of it closes them"
            )
    return lines


def clear_scratch(layout: Layout, experiment: str) -> None:
    """Delete the scratch folders of commands that are gone. The caller holds the experiment, so it is not one of those that run."""
    names = list(_scratch(layout))
    if not names:
        return
    running = _running(layout) - {experiment}
    address = origin(layout.root)
    for name in names:
        if _in_use(name, running):
            continue
        if address is None:
            shutil.rmtree(layout.root / name, ignore_errors=True)
        else:
            for path in store_at(address).find(name):
                store_at(address).remove(path, patient=False)


def _in_use(name: str, running: set[str]) -> bool:
    """Older versions did not name the experiment: such a folder may be that of any command that runs."""
    experiment = name.removeprefix(SCRATCH).rpartition("-")[0]
    return experiment in running if experiment else bool(running)


def _scratch(layout: Layout) -> Iterator[str]:
    address = origin(layout.root)
    if address is not None:
        yield from (name for name in store_at(address).folders() if name.startswith(SCRATCH))
    elif layout.root.is_dir():
        yield from sorted(path.name for path in layout.root.glob(f"{SCRATCH}*") if path.is_dir())


def _running(layout: Layout) -> set[str]:
    """The experiments that a command runs at this moment, on any machine."""
    address = origin(layout.root)
    if address is not None:
        return held_now(store_at(address))
    return {path.stem for path in layout.lock("any").parent.glob("*.lock") if is_held(path)}
