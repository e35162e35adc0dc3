"""Whether a results folder's figures are those of its files.

Checksums are made anew, metrics derived again from predictions, keys from the record's own fields, parameters counted in the weights, and
rows compared with their seals. Predictions and a record that somebody forged together, seal included, agree: only training again tells.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from torch import nn

from kdbench.bounded import check_safetensors
from kdbench.data.columns import widened
from kdbench.data.download import without_downloads
from kdbench.data.facts import NotHere
from kdbench.deploy.leftovers import left_behind
from kdbench.errors import CodeRefused, KDBenchError, TooMuch, UserError
from kdbench.experiment import Experiment
from kdbench.models.bounds import at_most
from kdbench.models.build import ModelSpec, without_weights
from kdbench.own_code import names_from_records
from kdbench.records.integrity import checked_rows
from kdbench.records.record import RunRecord
from kdbench.records.seals import compared_with_seals, read_seals
from kdbench.records.store import ResultStore, is_inside
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.by_class import is_of_class
from kdbench.tasks.networks import outlined
from kdbench.training.checkpoint import file_sha256, unpack_predictions
from kdbench.training.earlier_keys import EarlierData
from kdbench.training.evaluate import targets_of
from kdbench.training.keys import NotDerivable, derived
from kdbench.training.outcome import rederive, samples_right
from kdbench.training.recorded import experiment_of, model_spec

# A record's metrics are those of the predictions as they are kept. So both numbers contain the same rounding, and only the order of sums in
# double precision differs.
TOLERANCE = 1e-9
_MOST_PARAMETERS = 25_000_000  # of a network that is built with memory only to see what it holds


@dataclass(frozen=True)
class Verification:
    """What was checked, and what does not fit.

    Attributes:
        records: looked at.
        derived: records whose metrics were computed again.
        compared: records whose agreement with the teacher was computed again.
        problems: a line each.
        left_out: what could not be checked, a line each, since it needs code that a record names and nobody vouched for.
        notes: a line for each thing that makes no figure wrong: what killed commands left behind, records of drivers that were taken
            over, and rows without a seal.
        keyed: records whose unit key was made again.
        unkeyed: records that don't hold all that their key was made of, or in a form that this kdbench can't read.
        counted: records whose parameters were counted in their weights file.
        uncounted: records with a number of parameters whose weights are not on this machine, or need code that nobody vouched for.
        sealed: records that a seal has, with this content.
    """

    records: int
    derived: int
    compared: int
    problems: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    keyed: int = 0
    unkeyed: int = 0
    counted: int = 0
    uncounted: int = 0
    sealed: int = 0


def verify(results: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Check every record below `results`. `progress` is told how many are done, of how many."""
    store = ResultStore(results)
    seals = read_seals(store)  # first: a row that is sealed from now on may come too late for the list of rows
    checked = list(checked_rows(store))
    problems = [row.problem for row in checked if row.problem is not None]
    records = [row.record for row in checked if row.record is not None]
    problems += _twins(records)
    against = compared_with_seals(seals, checked, store.location)
    problems += against.problems
    teachers: Teachers = {}
    for record in records:
        if record.role == "teacher" and record.teacher_sha:
            for name in (record.teacher_id, record.teacher_sha):
                teachers.setdefault((name, record.test_hash), []).append(record)
    done_of: Counter[str] = Counter()
    left_out: list[str] = []
    for done, record in enumerate(records, start=1):
        found = _Check(store, results, record, teachers)
        with names_from_records(), without_downloads("verify downloads nothing"):
            problems += found.problems()
        left_out += found.left_out
        done_of.update(found.done)
        progress(done, len(records))
    return Verification(
        len(checked),
        problems=tuple(problems),
        left_out=tuple(left_out),
        notes=(*_outdone(records), *against.notes, *left_behind(results)),
        sealed=against.sealed,
        **{name: done_of[name] for name in ("derived", "compared", "keyed", "unkeyed", "counted", "uncounted")},
    )


def _twins(records: Sequence[RunRecord]) -> Iterator[str]:
    """Two records of one run that say different things."""
    by_id: dict[str, RunRecord] = {}
    for record in records:
        known = by_id.setdefault(record.run_id, record)
        if known.model_dump_json() != record.model_dump_json():  # as text, where a nan is equal to itself
            yield f"run {record.run_id} stands in two records that differ"


def _outdone(records: Sequence[RunRecord]) -> Iterator[str]:
    """Records that no reader takes, as another one of their unit was written under a higher lease."""
    highest: dict[tuple[str, str | None], RunRecord] = {}
    for record in records:
        measurement = record.unit_key, record.test_hash
        if record.lease is not None and record.lease > (highest.setdefault(measurement, record).lease or 0):
            highest[measurement] = record
    for record in records:
        measurement = record.unit_key, record.test_hash
        if record.lease is not None and record.lease < (highest[measurement].lease or 0):
            other = highest[measurement]
            yield (
                f"run {record.run_id} ({record.label}, seed {record.seed}) was written under lease {record.lease}, and run {other.run_id} "
                f"of the same training under lease {other.lease}: readers take the latter"
            )


# By what students name a teacher with, and the test part: more than one record where a name of the earlier rule of keys is not enough.
Teachers = dict[tuple[str | None, str | None], list[RunRecord]]


class _Check:
    """One record against what it says that it was made from."""

    def __init__(self, store: ResultStore, results: Path, record: RunRecord, teachers: Teachers) -> None:
        self.store, self.results, self.record, self.teachers = store, results, record, teachers
        self.done: set[str] = set()  # names of the counters of Verification
        self.left_out: list[str] = []

    def problems(self) -> list[str]:
        who = f"run {self.record.run_id} ({self.record.label}, seed {self.record.seed})"
        found: list[str] = []
        try:
            found.extend(f"{who}: {line}" for line in self._problems())
        except (CodeRefused, NotHere, TooMuch) as error:
            self.left_out.append(f"{who}: its metrics were not derived again: {error}")
        except KDBenchError as error:
            found.append(f"{who}: {error}")
        try:
            found.extend(f"{who}: {line}" for line in (*self._keys(), *self._parameters()))
        except UserError as error:
            found.append(f"{who}: {error}")
        return found

    @cached_property
    def _experiment(self) -> Experiment:
        return experiment_of(self.record)

    @property
    def _task(self) -> TaskSpec:
        """What the record's network was trained for."""
        return self._experiment.task_of(self.record.role)

    def _keys(self) -> Iterator[str]:
        """The unit key, and the board's, are those of the record's own fields."""
        record = self.record
        if record.source != "kdbench":
            return
        try:
            experiment = self._experiment
        except UserError:
            self.done.add("unkeyed")
            return
        try:
            again = derived(record, experiment)
        except NotDerivable:
            self.done.add("unkeyed")
            return
        self.done.add("keyed")
        if record.unit_key not in again.unit_keys:
            yield f"its unit_key is {record.unit_key!r}, its own fields and its experiment give {again.unit_keys[0]!r}"
        elif again.protocol_hash not in (None, record.protocol_hash):
            yield f"its protocol_hash is {record.protocol_hash!r}, its own fields and its experiment give {again.protocol_hash!r}"

    def _parameters(self) -> Iterator[str]:
        """The number of parameters is that of the weights file, where this machine has it."""
        record = self.record
        if record.params_count is None:
            return
        path = self._weights_file()
        try:
            count = None if path is None else counted_parameters(path, self._states())
        except KDBenchError:
            count = None
        if count is None:
            self.done.add("uncounted")
            return
        self.done.add("counted")
        if count != record.params_count:
            yield f"params_count is {record.params_count}, {record.artifacts_uri} has {count} parameters"

    def _weights_file(self) -> Path | None:
        """The file of weights that the record names, if it lies in this folder on this machine."""
        uri = self.record.artifacts_uri
        if uri is None or not is_inside(uri):
            return None
        path = self.results / uri
        return path if os.path.isfile(path) else None  # which is False, too, for a path that no file can have

    def _states(self) -> Mapping[str, bool]:
        spec = model_spec(self.record, self._experiment)
        return _states_of_described(spec.model_dump_json(exclude={"label", "weights"}), self._task.model_dump_json())

    def _problems(self) -> Iterator[str]:
        record = self.record
        names = [(name, record.test_hash) for name in (record.teacher_id, record.teacher_sha) if name is not None]
        named = next((self.teachers[name] for name in names if name in self.teachers), [])
        teacher = next((own for own in named if _equal(record.teacher_metric, own.test_metric)), named[-1] if named else None)
        if record.role == "teacher":
            yield from self._weights()
        elif teacher is not None and record.teacher_metric is not None and not _equal(record.teacher_metric, teacher.test_metric):
            yield f"teacher_metric is {record.teacher_metric!r}, the teacher's own record has {teacher.test_metric!r}"
        if record.predictions_uri is not None:
            yield from self._metrics(record.predictions_uri, teacher)
        elif record.status == "ok" and record.source == "kdbench" and record.test_metric is not None:
            yield "it has a test metric and no predictions that it was measured on"

    def _weights(self) -> Iterator[str]:
        """A teacher's weights are named by their hash, where they lie in this folder."""
        uri = self.record.artifacts_uri
        if uri is None or not is_inside(uri):
            return
        path = self.results / uri
        try:
            check_safetensors(path)
            if file_sha256(path) != self.record.teacher_sha:
                yield f"{uri} is not the weights file that its students learned from (its SHA-256 differs)"
        except FileNotFoundError:
            if path.is_symlink():
                yield f"{uri} is a link to nothing, expected the weights file that its students learned from"
        except OSError as error:
            yield f"{uri} is not the weights file that its students learned from: {error.strerror or error}"

    def _metrics(self, uri: str, teacher: RunRecord | None) -> Iterator[str]:
        record = self.record
        content = self.store.read_bytes(uri)
        task = build_task(self._task)
        metrics = rederive(record, task, content)
        self.done.add("derived")
        splits = task.splits()
        earlier = EarlierData(splits)
        here = (splits.data_hash, splits.hash) if record.learned_hash is not None else (earlier.data_hash, earlier.split_hash)
        if here != (record.data_hash, record.split_hash):
            yield f"the data set {record.data} here is not the one that it was measured on (its hash differs)"
        told = {f"metrics.{name}": value for name, value in record.metrics.items()}
        told |= {"test_metric": record.test_metric} | {name: getattr(record, name) for name in ("nll", "ece") if name in metrics}
        # A record from before a metric was measured by class says nothing of classes.
        again = {f"metrics.{name}": value for name, value in metrics.items() if name in record.metrics or not is_of_class(name)}
        again |= {"test_metric": metrics[task.primary]} | {name: metrics[name] for name in ("nll", "ece") if name in metrics}
        for name in sorted(told.keys() | again.keys()):
            if not _equal(told.get(name), again.get(name)):
                yield f"{name} is {told.get(name)!r}, its predictions give {again.get(name)!r}"
        if record.samples_right not in (None, samples_right(unpack_predictions(content)[0], targets_of(splits.test), task)):
            yield "samples_right names other samples than its predictions do"
        if record.agreement is not None and teacher is not None and teacher.predictions_uri is not None:
            yield from self._agreement(content, teacher, teacher.predictions_uri)

    def _agreement(self, content: bytes, teacher: RunRecord, uri: str) -> Iterator[str]:
        record, task = self.record, build_task(self._task)
        ours, samples = unpack_predictions(content)
        try:
            theirs, index = unpack_predictions(self.store.read_bytes(uri))
        except UserError as error:
            yield f"the teacher's predictions {uri} can't be compared: {error}"
            return
        if len(index) != len(samples):
            yield f"the teacher's predictions are of {len(index)} samples, expected {len(samples)}"
            return
        theirs = widened(theirs)
        found = task.agreement(widened(ours), theirs)
        self.done.add("compared")
        tolerance = task.agreement_tolerance(found, theirs)
        for name in {"agreement", "teacher_kl"} & found.keys():  # what a record keeps of it
            stored, allowed = getattr(record, name), tolerance.get(name, 0.0)
            if stored is not None and not (_equal(stored, found[name]) or abs(found[name] - stored) <= allowed + TOLERANCE):
                yield f"{name} is {stored!r}, the predictions give {found[name]!r} (allowed are {allowed:.2g} for rounding)"


@lru_cache(maxsize=64)
def _states_of_described(spec: str, task: str) -> Mapping[str, bool]:
    """What the network of a model's description holds, by name: whether it is a buffer. No weights are read or fetched.

    Raises UserError where it can't be built, CodeRefused where that needs code that nobody vouched for.
    """
    described, model = build_task(TaskSpec.model_validate_json(task)), ModelSpec.model_validate_json(spec)
    with without_weights(), at_most(_MOST_PARAMETERS):
        return states_of(outlined(described, model, lambda: described.build_model(model)))


def states_of(network: nn.Module) -> dict[str, bool]:
    """The names of all that a network's weights file may hold, each with whether it is a buffer."""
    buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
    return {name: name in buffers for name in network.state_dict()}


def counted_parameters(path: Path, states: Mapping[str, bool]) -> int | None:
    """The parameters in a safetensors file, tied ones once, by its header alone.

    Args:
        path: the file.
        states: `states_of` the network that it belongs to.

    Returns:
        Their number; None where the file is none, or has other names than the network, so that nobody knows which are buffers.
    """
    try:
        sizes = {name: math.prod(shape) for name, shape in check_safetensors(path).items()}
    except OSError:
        return None
    if not sizes.keys() <= states.keys():
        return None
    return sum(size for name, size in sizes.items() if not states[name])


def _equal(stored: float | None, derived: float | None) -> bool:
    if stored is None or derived is None:
        return stored is derived
    if math.isnan(stored) or math.isnan(derived):
        return math.isnan(stored) and math.isnan(derived)
    return math.isclose(stored, derived, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
