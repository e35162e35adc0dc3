"""A queue of units to train, and the simplest thing that empties it: this process, one unit after the other.

`distributed.tune` empties the same queue with Ray; whoever fills it (`benchmark`) can't tell the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from kdbench.errors import Diverged
from kdbench.experiment import Unit
from kdbench.results.layout import Layout
from kdbench.results.record import RunRecord
from kdbench.training.loop import fit
from kdbench.training.outcome import failed_record
from kdbench.training.session import LocalSession, Session


class Work(Protocol):
    """Units in an order that may depend on how earlier ones ended: a search's next trial, then its winners, then the finals."""

    def next(self) -> Unit | None:
        """The next unit to start; None while it depends on units that still run, or when all is done."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing is left to start and nothing runs."""
        ...

    def report(self, unit: Unit, metrics: Mapping[str, float]) -> bool:
        """Take note of an epoch; True asks that the unit be stopped early."""
        ...

    def finish(self, unit: Unit, record: RunRecord) -> None:
        """Take note of a unit's end: `ok`, `failed` with a reason, or `stopped` early."""
        ...


class StoppedEarly(Exception):  # noqa: N818 - not an error: the scheduler's decision on its way out of the loop
    """The search has seen enough of this trial."""


def attempt(unit: Unit, session: Session, layout: Layout) -> RunRecord:
    """Train a unit; a training that diverges is a result too: a failed record with the reason."""
    try:
        return fit(unit, session, layout)
    except Diverged as failure:
        return failed_record(unit, str(failure))


def run_here(work: Work, layout: Layout, threads: int | None = None) -> None:
    """Empty the queue in this process, without Ray. Threads: of CPU kernels, all that torch would use by default."""
    while not work.done:
        unit = work.next()
        assert unit is not None, "with nothing running, a queue that is not done has a next unit"

        def on_report(metrics: Mapping[str, float], unit: Unit = unit) -> None:
            if metrics and work.report(unit, metrics):
                raise StoppedEarly

        session = LocalSession(layout.checkpoint(unit.key), on_report, threads=threads or torch.get_num_threads())
        try:
            record = attempt(unit, session, layout)
        except StoppedEarly:
            record = failed_record(unit, "stopped early").model_copy(update={"status": "stopped", "failure": None})
        work.finish(unit, record)
        discard_checkpoint(layout.checkpoint(unit.key))


def discard_checkpoint(checkpoint: Path) -> None:
    """Once a unit's end is on record its checkpoint is of no more use."""
    checkpoint.unlink(missing_ok=True)
