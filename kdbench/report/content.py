"""What a report says of each board: the board itself, and of each method its runs, its curve, its search, from records and studies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kdbench.boards.board import Board, Estimate, Row, verdict
from kdbench.boards.leaderboard import boards
from kdbench.boards.published import PublishedFigure
from kdbench.boards.simultaneous import Difference as Together
from kdbench.errors import UserError
from kdbench.records.record import RunRecord
from kdbench.records.store import path_name
from kdbench.report.budgets import Budget, budget
from kdbench.report.charts import VERDICTS, Curve, Difference, Point
from kdbench.storage.journals import read_journal
from kdbench.storage.layout import Layout
from kdbench.tracking import Interface

if TYPE_CHECKING:
    from kdbench.report.searches import Search


@dataclass(frozen=True)
class Run:
    """One final training. value: its test metric, None where it failed. mlflow: the address of its page, None where it has none."""

    run_id: str
    seed: int
    value: float | None
    val: float | None
    failure: str | None
    mlflow: str | None


@dataclass(frozen=True)
class BoardEntry:
    """A row of the board with what stands behind it. number: its place on the board, by which charts name it.

    anchor: a name that no other row of the board has, the same when more rows come.
    search: None where the parameters were not searched; a sentence where the search can't be shown; of several the newest.
    """

    number: int
    anchor: str
    row: Row
    runs: tuple[Run, ...]
    curve: Curve | None
    search: Search | str | None
    studies: tuple[Search, ...] = ()  # all searches of the method that can be shown
    sampler: str | None = None


@dataclass(frozen=True)
class Environment:
    """What a part of the runs was made with."""

    runs: int
    versions: Mapping[str, str]
    commit: str | None
    dirty: bool | None
    devices: tuple[str, ...]
    host: str | None


@dataclass(frozen=True)
class RecordedExperiment:
    """An experiment that runs of a board belong to, as the newest of them recorded it. earlier: how many other versions there were."""

    name: str
    config: str | None
    earlier: int


@dataclass(frozen=True)
class Page:
    """One board of a report. anchor: a name that no other board has, for links and file names."""

    anchor: str
    board: Board
    entries: tuple[BoardEntry, ...]
    experiments: tuple[RecordedExperiment, ...]
    environments: tuple[Environment, ...]
    newest: datetime  # when the last of its runs ended

    @property
    def gains(self) -> list[Difference]:
        """Over the undistilled student, best first."""
        return _differences((e, e.row.shown_gain, e.row.over_undistilled) for e in self.entries)

    @property
    def over_control(self) -> list[Difference]:
        """Over the control, best first."""
        return _differences((e, e.row.shown_difference, e.row.over_control) for e in self.entries)

    @property
    def curves(self) -> list[Curve]:
        return [entry.curve for entry in self.entries if entry.curve is not None]

    @property
    def budgets(self) -> list[Budget]:
        """The best validation value by the trials of a search, of each method that was searched with more than one."""
        higher = self.board.higher_is_better
        found = [budget(entry.number, entry.row.label, entry.studies, entry.sampler, higher) for entry in self.entries]
        return [each for each in found if each is not None and len(each.curve.values) > 1]

    @property
    def tiles(self) -> list[tuple[str, float | None]]:
        """The figures above the table: what each is of, and its value."""
        undistilled, best = self.board.row(self.board.undistilled), self.board.best_distilled
        return [
            ("teacher", self.board.teacher_metric),
            ("undistilled student", undistilled.mean if undistilled else None),
            (f"best distilled: {best.label}" if best else "best distilled", best.mean if best else None),
        ]


def _differences(found: Iterable[tuple[BoardEntry, Estimate, Together | None]]) -> list[Difference]:
    shown = [
        Difference(
            entry.row.label,
            entry.number,
            middle,
            low,
            high,
            VERDICTS[verdict(together)],
            "" if together is None else f"p = {together.p:.3g} among all comparisons of this column",
        )
        for entry, (middle, low, high), together in found
        if middle is not None
    ]
    return sorted(shown, key=lambda difference: -difference.middle)


def pages(
    records: Sequence[RunRecord],
    published: Sequence[PublishedFigure],
    folders: Sequence[Path],
    interface: Interface,
    methods: Collection[str] = (),
    control: str | None = None,
) -> list[Page]:
    """One page a board of `records`. Studies are looked for in the results `folders`, MLflow's pages at `interface`.

    methods: leave out all other rows; what is left keeps its gains and its rank. control: what methods are compared with; None for kd.
    """
    by_id = {record.run_id: record for record in records}
    names: Counter[str] = Counter()
    made = []
    for board in boards(records, published, control=control):
        pair = (board.data, board.teacher or "no-teacher", board.student, board.protocol_hash[:8])
        anchor = _unused("-".join(map(path_name, pair)), names)  # used already: the same names with other weights of the teacher
        labels: Counter[str] = Counter()
        entries = tuple(
            _entry(number, _unused(path_name(row.label), labels), row, [by_id[run] for run in row.run_ids], board, folders, interface)
            for number, row in enumerate(board.rows, start=1)
            if not methods or row.label in methods or row.method in methods
        )
        runs = [by_id[run.run_id] for entry in entries for run in entry.runs]
        if entries:
            newest = max(run.created_at for run in runs)
            made.append(Page(anchor, board, entries, tuple(_experiments(runs)), tuple(_environments(runs)), newest))
    return made


def _unused(name: str, used: Counter[str]) -> str:
    used[name] += 1
    return f"{name}-{used[name]}" if used[name] > 1 else name


def trade_offs(pages: Sequence[Page], cost: str) -> list[Point]:
    """The ranked methods of boards of one protocol, with what a field of `Row` says that they cost; a student's place is its group."""
    return [
        Point(
            method=entry.row.label,
            name=entry.row.label if len(pages) == 1 else f"{entry.row.label} · {page.board.student}",
            number=entry.number,
            cost=value,
            quality=entry.row.mean,
            low=entry.row.low,
            high=entry.row.high,
            group=group,
        )
        for group, page in enumerate(pages)
        for entry in page.entries
        if entry.row.rank is not None and entry.row.mean is not None and (value := getattr(entry.row, cost)) is not None
    ]


def by_protocol(pages: Iterable[Page]) -> list[list[Page]]:
    """Pages of one protocol and one teacher, that differ in the student: what may be compared with each other."""
    groups: dict[tuple[str | None, ...], list[Page]] = defaultdict(list)
    for page in pages:
        board = page.board
        groups[board.protocol_hash, board.task, board.data, board.teacher, board.teacher_sha].append(page)
    return list(groups.values())


def _entry(
    number: int, anchor: str, row: Row, records: Sequence[RunRecord], board: Board, folders: Sequence[Path], interface: Interface
) -> BoardEntry:
    runs = tuple(
        Run(
            run_id=record.run_id,
            seed=record.seed,
            value=record.test_metric,
            val=record.val_metric,
            failure=record.failure if record.status == "failed" else None,
            mlflow=interface.page(record.mlflow_run_id),
        )
        for record in records
    )
    curve, studies = _curve(number, row.label, records, f"val_{board.primary}"), _searches(records, folders)
    shown = tuple(study for study in studies if not isinstance(study, str))
    sampler = next((record.sampler for record in records if record.sampler is not None), None)
    return BoardEntry(number, anchor, row, runs, curve, next(iter(studies), None), shown, sampler)


def _curve(number: int, label: str, records: Sequence[RunRecord], name: str) -> Curve | None:
    """The mean over the seeds that reached an epoch."""
    by_epoch: dict[float, list[float]] = defaultdict(list)
    for record in records:
        for point in record.curve:
            value = point.get(name)
            if value is not None and abs(value) < float("inf"):
                by_epoch[point["epoch"]].append(value)
    if not by_epoch:
        return None
    epochs = tuple(sorted(by_epoch))
    return Curve(label, number, epochs, tuple(fmean(by_epoch[epoch]) for epoch in epochs))


def _searches(records: Sequence[RunRecord], folders: Sequence[Path]) -> list[Search | str]:
    """The studies of the runs, the newest run's first."""
    searched = [record for record in records if record.study_id is not None]
    newest_first = sorted(searched, key=lambda record: (record.created_at, record.run_id), reverse=True)
    trials = {record.study_id: record.trials for record in reversed(newest_first) if record.study_id is not None}
    return [_search(study_id, trials[study_id], folders) for study_id in dict.fromkeys(r.study_id for r in newest_first if r.study_id)]


def _search(study_id: str, trials: int | None, folders: Sequence[Path]) -> Search | str:
    """A study, of which a run is on record after so many trials; a sentence where it can't be shown."""
    for folder in folders:
        try:
            journal = read_journal(Layout(folder).study(path_name(study_id)))
        except (OSError, UserError) as error:
            return f"The journal of the search can't be read: {getattr(error, 'strerror', None) or error}."
        if journal:
            from kdbench.report.searches import read_search  # imports Optuna, which a board without a search can do without

            return read_search(journal, study_id, trials)
    return "The study of its search is not in this results folder, so its trials can't be shown."


def _experiments(records: Sequence[RunRecord]) -> list[RecordedExperiment]:
    newest_first = sorted(records, key=lambda record: (record.created_at, record.run_id), reverse=True)
    configs: dict[str, dict[str | None, None]] = defaultdict(dict)  # ordered sets
    for record in newest_first:
        configs[record.experiment][record.config] = None
    return [RecordedExperiment(name, next(iter(found)), len(found) - 1) for name, found in sorted(configs.items())]


def _environments(records: Sequence[RunRecord]) -> list[Environment]:
    counts: Counter[tuple[Any, ...]] = Counter(
        (tuple(sorted(r.versions.items())), r.git_commit, r.git_dirty, tuple(r.devices), r.host_hash) for r in records
    )
    return [
        Environment(count, dict(versions), commit, dirty, devices, host)
        for (versions, commit, dirty, devices, host), count in counts.most_common()
    ]
