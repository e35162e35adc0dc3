"""Seals: which rows a finished command left, and what was in them, so that a row that is gone or was edited later is named.

A seal is a small file of JSON below `seals/`, written once and in one step: two commands that end at one moment write one each. Its name
holds a checksum of its content, and it names the seals before it, so that one that was edited or taken out is found too. It holds a
checksum of each row's content, and none of files, which compaction rewrites.

Seals lie beside the records. Whoever edits both can make them fit: the last seal may be taken away, or all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pydantic import BaseModel, ConfigDict, ValidationError

from kdbench.errors import UserError
from kdbench.records.integrity import CheckedRow
from kdbench.records.record import CHECKSUM, new_run_id, plain_rows, row_checksum
from kdbench.records.record_files import largest, read_table
from kdbench.records.store import LISTINGS, READERS, ResultStore, path_name

SEALS = "seals"
LARGEST_SEAL = 8_000_000  # bytes
_FORMAT = 1
_ROWS = 10_000  # of one seal: some 3 MB
_NAMED = 20  # missing rows that get a line each


class SealedRow(BaseModel):
    """A row as it was sealed. sha256: of its content (`record.row_checksum`). The rest says to people and programs which one it was."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: str
    unit_key: str
    test_hash: str | None = None
    student: str
    label: str
    seed: int

    @property
    def title(self) -> str:
        return f"{self.label}, seed {self.seed}, student {self.student}"

    @property
    def measurement(self) -> tuple[str, str | None]:
        return self.unit_key, self.test_hash


class Seal(BaseModel):
    """What one command sealed.

    made_at: in UTC, ISO 8601. rows: by run id. replaced: runs that were sealed before and are gone, with the run of this command that the
    same training was done again as. after: names of the seals before it that no other one names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = _FORMAT
    made_at: str
    command: str
    rows: dict[str, SealedRow] = {}
    replaced: dict[str, str] = {}
    after: tuple[str, ...] = ()

    @property
    def content(self) -> bytes:
        """As the file holds it: one line."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")) + "\n").encode()

    def path(self, stamp: str) -> str:
        """Where it lies below the location. stamp: of the moment it was made, by which seals are sorted (a ULID)."""
        return f"{SEALS}/{stamp}-{_digest(self.content)}.json"

    def changed(self, run_id: str) -> str:
        """That a row which this seal has is another one now."""
        return f"run {run_id} ({self.rows[run_id].title}) was changed after kdbench {self.command} had sealed it, {self.made_at}"

    def of_rows(self, run_ids: Collection[str]) -> Seal:
        """What it says of these rows alone, for a folder that has no others."""
        rows = {run_id: row for run_id, row in self.rows.items() if run_id in run_ids}
        return self.model_copy(update={"rows": rows, "replaced": {}, "after": ()})


class Seals:
    """All seals of a results folder, oldest first. damaged: by path, what is wrong with those that can't be read or were edited."""

    def __init__(self, seals: Mapping[str, Seal], damaged: Mapping[str, str]) -> None:
        self.by_path = dict(sorted(seals.items()))
        self.damaged = damaged
        self.rows: dict[str, tuple[SealedRow, Seal]] = {}
        self.conflicting: dict[str, tuple[str, str]] = {}  # runs that two seals have with different contents, and these seals' paths
        first: dict[str, str] = {}
        claimed: dict[str, str] = {}
        for path, seal in self.by_path.items():
            for run_id, row in seal.rows.items():
                known, _ = self.rows.setdefault(run_id, (row, seal))  # the first counts: a row never changes
                if known.sha256 != row.sha256:
                    self.conflicting.setdefault(run_id, (first[run_id], path))
                first.setdefault(run_id, path)
            claimed |= seal.replaced
        # A run is only done again as one that is sealed too and has the same measurement.
        self.replaced = {run_id: again for run_id, again in claimed.items() if self._same_measurement(run_id, again)}

    def _same_measurement(self, run_id: str, again: str) -> bool:
        rows = [self.rows[name][0] for name in (run_id, again) if name in self.rows]
        return len(rows) == 2 and rows[0].measurement == rows[1].measurement

    def __bool__(self) -> bool:
        return bool(self.by_path or self.damaged)

    @property
    def latest(self) -> tuple[str, ...]:
        """Names of the seals that no other one names."""
        named = {name for seal in self.by_path.values() for name in seal.after}
        return tuple(name for name in map(_name, self.by_path) if name not in named)

    def taken_out(self) -> dict[str, str]:
        """Paths of the seals that are gone, with that of one that was made after it."""
        here = {_name(path) for path in [*self.by_path, *self.damaged]}
        return {f"{SEALS}/{name}": path for path, seal in self.by_path.items() for name in seal.after if name not in here}

    def contradicts(self, run_id: str, sha256: str) -> Seal | None:
        """The seal under which this row had other content; None where it had this, or no seal has the row."""
        row, seal = self.rows.get(run_id, (None, None))
        return seal if row is not None and row.sha256 != sha256 else None


def read_seals(store: ResultStore) -> Seals:
    """The seals of a results folder, as they are now."""
    paths = sorted(path for path in store.files.find(SEALS) if is_seal(path))
    found: dict[str, Seal] = {}
    damaged: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for path, made in zip(paths, readers.map(partial(_read, store), paths), strict=True):
            if isinstance(made, Seal):
                found[path] = made
            else:
                damaged[path] = made
    return Seals(found, damaged)


def _read(store: ResultStore, path: str) -> Seal | str:
    """A seal, or a line on why there is none."""
    try:
        return checked_seal(path, store.read_bytes(path))
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{path}: can't be read: {error.strerror or error}"


def is_seal(path: str) -> bool:
    return path.startswith(f"{SEALS}/") and path.endswith(".json") and not _name(path).startswith(".")


def checked_seal(path: str, content: bytes) -> Seal:
    """The seal in a file. Raises UserError, beginning with `path`, where it is none or was edited."""
    if len(content) > LARGEST_SEAL:
        raise UserError(f"{path}: is no seal: it has {len(content)} bytes, expected at most {LARGEST_SEAL}")
    if path.removesuffix(".json").rpartition("-")[2] != _digest(content):
        raise UserError(f"{path}: this seal was changed after it was written (its checksum differs)")
    try:
        seal = Seal.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: is no seal that this kdbench can read: {where}: {first['msg']}") from error
    if seal.format != _FORMAT:
        raise UserError(f"{path}: has seal format {seal.format}, this kdbench reads {_FORMAT}: update kdbench (pip install -U kdbench)")
    return seal


def seal(store: ResultStore, command: str) -> int:
    """Seal every row that has no seal yet, those of commands that were killed before they could too; how many these are.

    A row that was sealed before is never sealed again, so that an edit stays visible. A row that does not fit its own checksum is left out.

    Raises what `ResultStore.append` raises where the location can't be written.
    """
    seals = read_seals(store)
    for _ in range(LISTINGS - 1):
        try:
            return _seal(store, command, seals)
        except FileNotFoundError:  # compacted meanwhile
            continue
    return _seal(store, command, seals)


def _seal(store: ResultStore, command: str, seals: Seals) -> int:
    new: dict[str, SealedRow] = {}
    present: set[str] = set()
    for path, file in store.record_files().items():
        ids = [identity.run_id for identity in file.identities]
        present.update(ids)
        if not all(run_id in seals.rows for run_id in ids):
            new |= {run_id: row for run_id, row in _rows(store, path) if run_id not in seals.rows}
    gone = {run_id: row for run_id, (row, _) in seals.rows.items() if run_id not in present and run_id not in seals.replaced}
    again = {row.measurement: run_id for run_id, row in new.items()}
    replaced = {run_id: again[row.measurement] for run_id, row in gone.items() if row.measurement in again}
    made_at, after = datetime.now(UTC).isoformat(timespec="seconds"), seals.latest
    for begin in range(0, len(new), _ROWS):
        part = dict(list(new.items())[begin : begin + _ROWS])
        made = Seal(made_at=made_at, command=command, rows=part, replaced=replaced if begin == 0 else {}, after=after)
        path = made.path(new_run_id())
        store.files.create(path, made.content)
        after = (_name(path),)
    return len(new)


def take(store: ResultStore, seals: Mapping[str, Seal], run_ids: Collection[str]) -> None:
    """Keep what the seals of an archive, by path, say of these rows."""
    for path, part in _parts(seals, run_ids):
        if not store.has(path):
            store.files.create(path, part.content)


def carried(seals: Seals, run_ids: Collection[str]) -> Iterator[tuple[str, Seal]]:
    """What the seals of a folder say of these rows, as files of another folder: path and seal."""
    yield from _parts(seals.by_path, run_ids)


def _parts(seals: Mapping[str, Seal], run_ids: Collection[str]) -> Iterator[tuple[str, Seal]]:
    for path, made in seals.items():
        part = made.of_rows(run_ids)
        if part.rows:
            yield part.path(_name(path).partition("-")[0]), part


@dataclass(frozen=True)
class Comparison:
    """Rows against seals. sealed: rows that are as they were sealed. problems, notes: as `training.verification.Verification` has them."""

    sealed: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def compared_with_seals(seals: Seals, rows: Sequence[CheckedRow], location: str) -> Comparison:
    """What is gone or was changed since it was sealed. location: of the results, for the lines. seals: read before the rows."""
    if not seals:
        note = f"{location} has no seals yet, so records that were deleted, or changed together with their checksum, can't be named"
        return Comparison(0, (), (note,) if rows else ())
    problems = [*seals.damaged.values(), *(f"{path} is missing: {later} was made after it" for path, later in seals.taken_out().items())]
    problems += [
        f"run {run_id} ({seals.rows[run_id][0].title}) is sealed with two contents, in {one} and {other}: one of these seals is forged"
        for run_id, (one, other) in seals.conflicting.items()
    ]
    unsealed = sealed = 0
    unreadable = {_name(row.path).removesuffix(".parquet") for row in rows if row.record is None}
    for row in rows:
        if row.record is None or row.sha256 is None:
            continue
        run_id = row.record.run_id
        made = seals.contradicts(run_id, row.sha256)
        if made is None:
            sealed, unsealed = sealed + (run_id in seals.rows), unsealed + (run_id not in seals.rows)
        elif row.problem is None:  # else it was said already
            problems.append(f"{row.path}: {made.changed(run_id)}")
    present = {row.record.run_id for row in rows if row.record is not None}
    gone = {run_id: entry for run_id, entry in seals.rows.items() if run_id not in present and path_name(run_id) not in unreadable}
    lost = [run_id for run_id in gone if run_id not in seals.replaced]
    for run_id in lost[:_NAMED]:
        row_, made = gone[run_id]
        problems.append(f"run {run_id} ({row_.title}) is missing: kdbench {made.command} sealed it, {made.made_at}")
    if len(lost) > _NAMED:
        problems.append(f"{len(lost) - _NAMED} more sealed records are missing")
    notes = [
        f"run {run_id} ({gone[run_id][0].title}) is missing, and run {seals.replaced[run_id]} is the same training, done again"
        for run_id in gone
        if run_id in seals.replaced
    ]
    if unsealed:
        notes.append(
            f"{unsealed} record{'s have' if unsealed > 1 else ' has'} no seal yet; "
            "the next kdbench run, tune, results import or results compact seals them"
        )
    return Comparison(sealed, tuple(problems), tuple(notes))


def _rows(store: ResultStore, path: str) -> Iterator[tuple[str, SealedRow]]:
    """The rows of a file by run id, but for those that don't fit their own checksum."""
    table = read_table(store.files.read(path, largest(path)), path)
    for row in plain_rows(table, path):
        checksum = row_checksum(row)
        if row.get(CHECKSUM) == checksum:
            told = {name: row.get(name) for name in ("unit_key", "test_hash", "student", "label", "seed")}
            yield row["run_id"], SealedRow.model_validate({"sha256": checksum, **told})


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
