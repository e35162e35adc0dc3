"""The control that is matched by compute: for how long the undistilled student may be trained instead of all that a method takes.

Written down before the first of these trainings, so that a killed run, and one on a faster machine, goes on to the same number of epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean

from kdbench.benchmark.cache import cache_seconds
from kdbench.benchmark.kept import keep, read_kept
from kdbench.benchmark.ledger import Ledger
from kdbench.boards.board import WITHOUT_DISTILLATION
from kdbench.boards.finals import search_hours
from kdbench.experiment import TeacherRef
from kdbench.records.plan import MOST_TIMES
from kdbench.records.record import RunRecord


@dataclass(frozen=True)
class Matched:
    """epochs: of each training. method: the label of the best method, whose compute they match."""

    epochs: int
    method: str


def matched(
    ledger: Ledger, key: str, finals: Mapping[str, Sequence[RunRecord]], undistilled: str, teacher: TeacherRef | None, epochs: int
) -> Matched | None:
    """What was written down under `key`, or is now; None where no distilled method, or no undistilled student, has a final.

    Args:
        ledger: Of the run.
        key: Names the pair and its board.
        finals: All finals of the pair, by label.
        undistilled: The label that is trained for longer.
        teacher: Of the pair.
        epochs: Of an ordinary training.
    """
    path = ledger.layout.choice(f"cost-{key}")
    with suppress(ValueError, TypeError, KeyError):
        kept = read_kept(path)
        return Matched(int(kept["epochs"]), str(kept["method"]))
    best = _best(finals)
    ordinary = [record for record in finals.get(undistilled, ()) if record.device_hours and record.curve]
    if best is None or not ordinary:
        return None
    an_epoch = fmean((record.device_hours or 0.0) / len(record.curve) for record in ordinary)
    affordable = int(_hours(ledger, finals[best], teacher) / an_epoch)
    found = Matched(min(max(affordable, epochs), MOST_TIMES * epochs), best)
    keep(path, asdict(found))
    ledger.watch.note(f"none@cost: {found.epochs} epochs for each seed, for what teacher, cache, search and finals of {best} took")
    return found


def _best(finals: Mapping[str, Sequence[RunRecord]]) -> str | None:
    """The distilled method with the best mean validation metric."""
    quality: dict[str, float] = {}
    for label, records in sorted(finals.items()):
        values = [record.val_metric for record in records if record.val_metric is not None and record.method not in WITHOUT_DISTILLATION]
        if values:
            quality[label] = fmean(values) * (1.0 if records[0].higher_is_better else -1.0)
    return max(quality, key=quality.__getitem__, default=None)


def _hours(ledger: Ledger, finals: Sequence[RunRecord], teacher: TeacherRef | None) -> float:
    """Device-hours of the teacher, its cache, the searches and the finals."""
    spent = sum(search_hours(finals).values()) + sum(record.device_hours or 0.0 for record in finals)
    if teacher is None:
        return spent
    if teacher.cache is not None:
        spent += cache_seconds(ledger.layout, teacher.cache.name) / 3600
    own = [record.device_hours or 0.0 for record in ledger.store.scan(role="teacher") if record.teacher_sha == teacher.sha]
    return spent + max(own, default=0.0)
