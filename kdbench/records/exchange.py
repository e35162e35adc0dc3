"""Records, and what belongs to them, in one archive: from one results folder into another, whoever's it is.

An archive is a zip of one-row Parquet files, of the seals of these rows, of safetensors files and of the journals of searches, under the
names that they have in a results folder, and of `manifest.json` with the SHA-256 of each. Nothing in it is ever unpickled or executed.
Reading one, everything is checked before anything is written, and names are taken from the records, never from the archive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench import __version__
from kdbench.bounded import parse_json, tensor_shapes
from kdbench.errors import UnreadableFile, UserError, not_written, printable
from kdbench.records.archive import FORMAT, LARGEST_RECORD, MANIFEST, Archive
from kdbench.records.integrity import altered, checked_records, single_row, stored_rows
from kdbench.records.record import CHECKSUM, RunRecord, from_table, plain_rows, to_table
from kdbench.records.record_files import largest
from kdbench.records.seals import LARGEST_SEAL, Seal, carried, checked_seal, is_seal, read_seals, seal, take
from kdbench.records.store import ResultStore, path_name, record_path
from kdbench.storage.journals import LONGEST_LINE, whole_journal, whole_lines
from kdbench.storage.layout import Layout

_FOLDERS = ("predictions", "students", "teachers", "studies")  # where what a record names may lie
_LARGEST_SEALS = 32_000_000  # bytes of all seals: 100,000 rows


@dataclass(frozen=True)
class Exported:
    """What an archive holds. missing: files that records name and the results folder lacks."""

    path: Path
    records: int
    predictions: int
    weights: int
    searches: int
    nbytes: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What an import did. known: records that were there already, the same. kept: conflicts in which what was here stays."""

    records: int
    files: int
    known: int
    kept: tuple[str, ...]


# --- writing ---------------------------------------------------------------------------------------------------------


def export_results(
    store: ResultStore, records: Sequence[RunRecord], path: Path, *, predictions: bool = True, weights: bool = False
) -> Exported:
    """Write `records` of the store to the archive `path`, with their searches, and with predictions and weights if so asked.

    The file has its name only once it is whole. Raises UserError where there is nothing to write, where `path` is there already, or where
    a record of the store was changed by hand or after it was sealed; RunFailed where the archive can't be written.
    """
    if not records:
        raise UserError(f"there is nothing to export: no record in {store.location} fits")
    if path.exists():
        raise UserError(f"{path} exists; choose another name, or delete it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_DEFLATED) as archive:
            written, missing = _write(archive, store, records, predictions, weights)
        temporary.replace(path)
    except OSError as error:
        raise not_written(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    kinds = [name.partition("/")[0] for name in written]
    weighty = kinds.count("students") + kinds.count("teachers")
    return Exported(path, len(records), kinds.count("predictions"), weighty, kinds.count("studies"), path.stat().st_size, tuple(missing))


def _write(
    archive: zipfile.ZipFile, store: ResultStore, records: Sequence[RunRecord], predictions: bool, weights: bool
) -> tuple[dict[str, str], list[str]]:
    """Everything, the manifest last; the SHA-256 of each file by name, and the names of those that are missing."""
    written: dict[str, str] = {}
    missing = []
    for name, content in _contents(store, records, predictions, weights):
        if content is None:
            missing.append(name)
        elif name not in written:
            archive.writestr(name, content)
            written[name] = hashlib.sha256(content).hexdigest()
    manifest = {"format": FORMAT, "kdbench": __version__, "files": written}
    archive.writestr(MANIFEST, json.dumps(manifest, indent=1))
    return written, missing


def _contents(store: ResultStore, records: Sequence[RunRecord], predictions: bool, weights: bool) -> Iterator[tuple[str, bytes | None]]:
    wanted = {record.run_id: record for record in records}
    seals = read_seals(store)
    hashes: dict[str, str | None] = {}
    for each in records:
        hashes |= _hashes(each, hashes)
    for path in store.record_files():
        for row in stored_rows(store.read_bytes(path, largest(path)), path):
            record = wanted.pop(row["run_id"][0].as_py(), None)
            if record is None:
                continue
            if problem := altered(row, path):
                raise UserError(f"{problem}; nothing was exported")
            if made := seals.contradicts(record.run_id, _checksum(row, path)):
                raise UserError(f"{path}: {made.changed(record.run_id)}; nothing was exported")
            yield record_path(record), _parquet(row)
    yield from ((path, part.content) for path, part in carried(seals, {record.run_id for record in records}))
    for uri in dict.fromkeys(uri for record in records for uri in _attachments(record, predictions, weights)):
        if _is_search(uri):
            if lines := whole_lines(whole_journal(store.files, uri)):
                yield uri, lines
            continue
        try:
            content = store.read_bytes(uri)
        except UnreadableFile:
            content = b""
        except UserError:
            yield uri, None
            continue
        # An import would refuse the whole archive.
        if hashes[uri] not in (None, hashlib.sha256(content).hexdigest()) or not _is_safetensors(iter([content]), len(content)):
            raise UserError(
                f"{store.location}/{uri} is damaged: it is not the file that its record was made with; nothing was exported. "
                "Restore it from a copy, or delete it to export the records without it"
            )
        yield uri, content


def _attachments(record: RunRecord, predictions: bool = True, weights: bool = True) -> list[str]:
    """What belongs to a record, by its place in a results folder: predictions, weights, and the search that its parameters are from."""
    named = ([record.predictions_uri] if predictions else []) + ([record.artifacts_uri] if weights else [])
    if record.study_id is not None:
        named.append(str(Layout(Path()).study(path_name(record.study_id))))
    return [uri for uri in named if uri is not None]


def _is_search(uri: str) -> bool:
    return uri.startswith("studies/")


def _checksum(row: pa.Table, path: str) -> str:
    """Of a row that was not altered, and so has one that fits."""
    return str(plain_rows(row, path)[0][CHECKSUM])


def _parquet(row: pa.Table) -> bytes:
    buffer = BytesIO()
    pq.write_table(row, buffer, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    return buffer.getvalue()


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A record of an archive: its identity, and the files that belong to it. The record itself is read again when it is written."""

    run_id: str
    measurement: tuple[str, str | None]  # the training, and the test part that it was measured on
    text: str  # the SHA-256 of its fields
    attachments: tuple[str, ...]


def import_results(store: ResultStore, path: Path, *, keep_ours: bool = False) -> Imported:
    """Take what the archive `path` holds into the store. What is there already is left as it is, so a second import changes nothing.

    A conflict is a run that is here with another content, or a unit (one training, fully described) that another run has here. With
    `keep_ours` such records and their files are left out; without it, UserError names them and nothing is written. UserError is also
    raised, and nothing written, for a file that is no archive of kdbench's, that was changed, or that claims implausible sizes. All files
    are written before the first record: an import that is killed leaves whole records, and the same command again brings in the others.
    Memory is bounded, whatever the archive holds: weights and predictions pass through it in pieces, records one at a time.
    """
    with Archive(path) as archive:
        _check_room(archive, store)
        members: dict[str, _Member] = {}
        hashes: dict[str, str | None] = {}
        checksums: dict[str, str] = {}
        for name, record, checksum in _records(archive):
            members[name] = _Member(record.run_id, (record.unit_key, record.test_hash), _text(record), tuple(_attachments(record)))
            hashes |= _hashes(record, hashes)
            checksums[record.run_id] = checksum
        seals = _seals(archive, checksums)
        _check_attachments(archive, members.keys() | seals.keys(), hashes)
        return _merge(archive, members, seals, store, keep_ours)


def _seals(archive: Archive, checksums: Mapping[str, str]) -> dict[str, Seal]:
    """What the folder that was exported says of these rows, by name. checksums: of the rows of the archive, by run id.

    Raises UserError for a seal that was edited, is of other rows, or shows that a row was edited after it was sealed.
    """
    names = [name for name in archive.hashes if is_seal(name)]
    if (size := sum(map(archive.size, names))) > _LARGEST_SEALS:
        raise UserError(f"{archive.path}: its seals have {size} bytes, expected at most {_LARGEST_SEALS}; nothing was imported")
    found: dict[str, Seal] = {}
    for name in names:
        try:
            found[name] = sealed = checked_seal(name, archive.read(name, LARGEST_SEAL))
            for run_id, row in sealed.rows.items():
                if run_id not in checksums:
                    raise UserError(f"{name}: seals run {run_id}, which is not in the archive")
                if row.sha256 != checksums[run_id]:
                    raise UserError(sealed.changed(run_id))
        except UserError as error:
            raise UserError(f"{archive.path}: {error}; nothing was imported") from error
    return found


def _merge(archive: Archive, members: dict[str, _Member], seals: Mapping[str, Seal], store: ResultStore, keep_ours: bool) -> Imported:
    by_id = {record.run_id: _text(record) for _, record, _ in checked_records(store) if record is not None}  # superseded ones too
    by_unit = {(record.unit_key, record.test_hash): record for record in store.scan()}
    known = {name for name, member in members.items() if by_id.get(member.run_id) == member.text}
    suspects = {name for name, member in members.items() if name not in known and (member.run_id in by_id or member.measurement in by_unit)}
    conflicts = {name: _conflict(_record(archive, name)[0], by_id, by_unit) for name in members if name in suspects}
    if conflicts and not keep_ours:
        shown = "\n".join(f"  {reason}" for reason in conflicts.values())
        raise UserError(
            f"{archive.path}: {len(conflicts)} of its records conflict with {store.location}; nothing was imported. "
            f"--keep-ours takes in the others:\n{shown}"
        )
    new = [name for name in members if name not in known and name not in conflicts]
    # Of a record that is here, files may still be missing: it was exported without them at first.
    wanted = [uri for name, member in members.items() if name not in conflicts for uri in member.attachments if uri in archive.hashes]
    absent = [uri for uri in dict.fromkeys(wanted) if not store.has(uri)]
    for uri in absent:
        store.write_pieces(uri, archive.pieces(uri))
    unchanged = set()
    for name in new:
        record, checksum = _record(archive, name)
        store.append(record)
        if to_table(record)[CHECKSUM][0].as_py() == checksum:  # a record of an older form is written in that of now
            unchanged.add(record.run_id)
    take(store, seals, unchanged)
    seal(store, "results import")
    return Imported(len(new), len(absent), len(known), tuple(conflicts.values()))


def _conflict(record: RunRecord, by_id: dict[str, str], by_unit: dict[tuple[str, str | None], RunRecord]) -> str:
    who = f"{record.label}, seed {record.seed}, on {record.data}"
    if record.run_id in by_id:
        return f"run {record.run_id} ({who}) is here with another content"
    ours = by_unit[record.unit_key, record.test_hash]
    told = f"test metric {ours.test_metric} here, {record.test_metric} there"
    return f"run {record.run_id} ({who}) is the same training as {ours.run_id} here: {told}"


def _text(record: RunRecord) -> str:
    """For comparison: as text a nan is equal to itself."""
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()


def _records(archive: Archive) -> Iterator[tuple[str, RunRecord, str]]:
    """Every record with its name and its checksum. Raises UserError for one that was changed, or is not where it belongs."""
    for name in archive.hashes:
        if name.endswith(".parquet"):
            yield name, *_record(archive, name)


def _record(archive: Archive, name: str) -> tuple[RunRecord, str]:
    """A record, migrated to this version, and the checksum of its row as it is in the archive."""
    where = f"{archive.path}: {name}"
    try:
        row = single_row(archive.read(name, LARGEST_RECORD), where)
        problem = altered(row, where)
        record = from_table(row, where)
    except UserError as error:
        reason = str(error).removesuffix("; move it away").removesuffix("; nothing was imported")
        raise UserError(f"{reason}; nothing was imported") from error
    if problem:
        raise UserError(f"{problem}; nothing was imported")
    if name != record_path(record):
        raise UserError(f"{where} is not where its record belongs, {record_path(record)}; nothing was imported")
    return record, _checksum(row, where)


def _hashes(record: RunRecord, known: dict[str, str | None]) -> dict[str, str | None]:
    """The SHA-256 that each file of a record must have, None where the record does not say."""
    told: dict[str, str | None] = {}
    for uri in _attachments(record):
        told[uri] = record.predictions_sha256 if uri == record.predictions_uri else known.get(uri)
        if uri == record.artifacts_uri and record.role == "teacher":
            told[uri] = record.teacher_sha
    return told


def _check_attachments(archive: Archive, known: Collection[str], hashes: dict[str, str | None]) -> None:
    """Each is named by a record, lies inside the results folder, is of its kind, and has the content that its record was made from."""
    for name in archive.hashes.keys() - set(known):
        where = f"{archive.path}: {name!r}"
        if name not in hashes:
            raise UserError(f"{where} belongs to none of its records; nothing was imported")
        parts = PurePosixPath(name).parts
        odd = "\\" in name or printable(name) != name
        if PurePosixPath(name).is_absolute() or ".." in parts or odd or parts[0] not in _FOLDERS:
            raise UserError(f"{where} is not a place inside a results folder; nothing was imported")
        fits, kind = (_is_journal, "the journal of a search") if _is_search(name) else (_is_safetensors, "a safetensors file")
        if not fits(archive.pieces(name), archive.size(name)):
            raise UserError(f"{where} is not {kind}; nothing was imported")
        if hashes[name] not in (None, archive.hashes[name]):
            raise UserError(f"{where} is not the file that its record was made with (its SHA-256 differs); nothing was imported")


def _is_safetensors(pieces: Iterator[bytes], size: int) -> bool:
    """Anything else, a pickle say, is refused. All pieces are read, so that the file's hash is compared."""
    rest = b""

    def read(length: int) -> bytes:
        nonlocal rest
        while len(rest) < length and (piece := next(pieces, b"")):
            rest += piece
        found, rest = rest[:length], rest[length:]
        return found

    try:
        tensor_shapes(read, size)
        fits = True
    except ValueError:
        fits = False
    for _ in pieces:
        pass
    return fits


def _is_journal(pieces: Iterator[bytes], size: int) -> bool:
    """Lines of JSON objects, as Optuna writes them."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > LONGEST_LINE or not all(_is_object(line) for line in lines):
            return False
    return size > 0 and not rest


def _is_object(line: bytes) -> bool:
    try:
        return len(line) <= LONGEST_LINE and isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _check_room(archive: Archive, store: ResultStore) -> None:
    """A small archive may say that it holds terabytes."""
    folder = Path(store.location)
    if not folder.is_absolute():  # an address, whose room nobody knows
        return
    needed = archive.nbytes
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    if needed > free:
        raise UserError(f"{archive.path} needs {needed / 1e9:.2f} GB, {store.location} has {free / 1e9:.2f} GB free; nothing was imported")
