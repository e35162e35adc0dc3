"""What a killed command leaves in the results beside what it had finished. The next command clears it away; `kdbench verify` names it."""

from __future__ import annotations

from pathlib import Path

from kdbench.credentials import without_secrets
from kdbench.storage.layout import Layout
from kdbench.storage.scratch import in_use, running, scratch_folders
from kdbench.tracking import open_runs, tracking_uri


def left_behind(results: Path) -> list[str]:
    """A line for each thing that a killed command left. What belongs to a command that runs at this moment is not among them."""
    layout, uri = Layout(results), tracking_uri(results)
    shown_as = without_secrets(uri)
    scratch, shown = list(scratch_folders(layout)), open_runs(uri, layout.location)
    at_work = running(layout) if scratch or shown else set()
    lines = [
        f"{layout.location}/{name}: scratch of Ray that a killed command left; the next command on this folder deletes it"
        for name in scratch
        if not in_use(name, at_work)
    ]
    for experiment, count in sorted(shown.items()):
        if experiment not in at_work:
            runs = f"{count} run{'s' if count > 1 else ''} of experiment {experiment}"
            lines.append(
                f"MLflow at {shown_as} shows {runs} as running, which a killed command left; the next `kdbench run` of it closes them"
            )
    return lines
