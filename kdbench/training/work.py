"""A queue of units to train, and the simplest thing that empties it: this process, one unit after the other.

`distributed.tune` empties the same queue with Ray; whoever fills it (`benchmark`) can't tell the two apart.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from kdbench.credentials import without_secrets
from kdbench.errors import Diverged, KDBenchError, StorageFailed, in_one_line
from kdbench.experiment import Unit
from kdbench.records.record import RunRecord
from kdbench.storage.layout import Layout
from kdbench.storage.working_copy import forget
from kdbench.training.checkpoint import write_atomically
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

    def resumed(self, unit: Unit, place: str) -> None:
        """Take note of where a unit that was interrupted goes on: all that came after is done again."""
        ...

    def finish(self, unit: Unit, record: RunRecord) -> None:
        """Take note of a unit's end: `ok`, `failed` because it diverged, or `stopped` early."""
        ...

    def crash(self, unit: Unit, reason: str, died: bool = False) -> None:
        """Take note of a unit that could not be trained: its code failed or, where `died`, its processes kept dying."""
        ...


class StoppedEarly(BaseException):
    """The search has seen enough of this trial."""


@dataclass(frozen=True)
class Ending:
    """How a training ended: a record, or the one-line reason why there is none. Where the storage failed, no other could end better.

    died: its processes kept dying, which says nothing of the training itself.
    """

    record: RunRecord | None = None
    crash: str | None = None
    storage_failed: bool = False
    died: bool = False


# So many deaths of processes that train a unit, without an epoch in between, or that start for it, and it is given up in this run.
DEATHS = 3
# What a report carries, by its key: an Ending, an epoch's row of the curve, the place from which a training goes on, or that a worker died.
ENDING, EPOCH, RESUMED, DEATH = "ending", "row", "resumed", "death"


def given_up(title: str, what: str, when: str = "without an epoch in between") -> Ending:
    """The ending of a unit that DEATHS processes died over. what, when: the subject and the end of the sentence that says so."""
    reason = f"{title}: {what} died {DEATHS} times {when}; is there enough memory?"
    return Ending(crash=f"{reason} The same command tries again", died=True)


def pack_ending(ending: Ending) -> dict[str, str]:
    """As a metric that Ray carries from the process that trained to the driver."""
    record = ending.record.model_dump_json() if ending.record else None
    return {ENDING: json.dumps([record, ending.crash, ending.storage_failed, ending.died])}


def unpack_ending(metrics: Mapping[str, Any]) -> Ending:
    record, *others = json.loads(metrics[ENDING])
    return Ending(RunRecord.model_validate_json(record) if record else None, *others)


def pack_epoch(metrics: Mapping[str, float]) -> dict[str, str]:
    """As a metric of its own, so that what Ray adds to a report is not taken for a part of the curve."""
    return {EPOCH: json.dumps(dict(metrics))}


def unpack_epoch(metrics: Mapping[str, Any]) -> dict[str, float]:
    row: dict[str, float] = json.loads(metrics[EPOCH])
    return row


def pack_resumed(place: str) -> dict[str, str]:
    return {RESUMED: place}


def pack_death() -> dict[str, bool]:
    return {DEATH: True}


def attempt(unit: Unit, session: Session, layout: Layout) -> Ending:
    """Train a unit. One that diverges is a result: a failed record. One whose code fails is not: the traceback goes to a log file.

    Raises what an exchange with another worker raised that is gone: that is nothing that this worker can answer for.
    """
    try:
        return Ending(fit(unit, session, layout))
    except Diverged as failure:
        return Ending(failed_record(unit, str(failure)))
    except StorageFailed as error:
        return Ending(crash=str(error), storage_failed=True)
    except KDBenchError as error:
        return Ending(crash=f"{unit.title}: {error}")
    except Exception as error:
        if session.lost_peer(error):
            raise
        return Ending(crash=f"{unit.title}: {in_one_line(error)}; {_kept_traceback(layout.log(unit.key))}")


def _kept_traceback(path: Path) -> str:
    """Write the traceback of the exception that is being handled; says where it is, or why it could not be kept."""
    text = without_secrets(traceback.format_exc())
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))
    except KDBenchError as error:
        return f"and its traceback could not be kept: {error}"
    return f"traceback in {path}"


def settle(work: Work, unit: Unit, ending: Ending, layout: Layout) -> None:
    """Hand a unit's end to its queue; once it is on record the unit's checkpoint is of no more use.

    Raises StorageFailed where that was its end.
    """
    if ending.storage_failed:
        raise StorageFailed(ending.crash)
    if ending.record is None:
        work.crash(unit, ending.crash or f"{unit.title}: unknown", ending.died)
        return
    work.finish(unit, ending.record)
    forget(layout.checkpoint(unit.experiment, unit.key))


def stopped_record(unit: Unit) -> RunRecord:
    """The record of a trial that the search stopped early."""
    return failed_record(unit, "").model_copy(update={"status": "stopped", "failure": None})


def run_here(work: Work, layout: Layout, device: torch.device | None = None) -> None:
    """Empty the queue in this process, without Ray, on the device (default: the CPU), with all the threads that torch would use."""
    while not work.done:
        unit = work.next()
        assert unit is not None, "with nothing running, a queue that is not done has a next unit"

        def on_report(metrics: Mapping[str, float], unit: Unit = unit) -> None:
            if work.report(unit, metrics):
                raise StoppedEarly

        on_resume = partial(work.resumed, unit)
        try:
            ending = attempt(unit, LocalSession(layout.checkpoint(unit.experiment, unit.key), on_report, on_resume, device), layout)
        except StoppedEarly:
            ending = Ending(stopped_record(unit))
        settle(work, unit, ending, layout)
