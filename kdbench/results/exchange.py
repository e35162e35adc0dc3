"""Records, and what belongs to them, in one archive: from one results folder into another, whoever's it is.

An archive is a zip of one-row Parquet files, of safetensors files and of the journals of searches, under the names that they have in a
results folder, and of `manifest.json` with the SHA-256 of each. Nothing in it is ever unpickled or executed. Reading one, everything is
checked before anything is written, and names are taken from the records, never from the archive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench import __version__
from kdbench.errors import UserError, not_written
from kdbench.results.integrity import altered, checked_records, stored_rows
from kdbench.results.journals import whole_journal, whole_lines
from kdbench.results.layout import Layout
from kdbench.results.record import RunRecord, from_table
from kdbench.results.store import ResultStore, path_name, record_path

FORMAT = 1
MANIFEST = "manifest.json"
_FOLDERS = ("predictions", "students", "teachers", "studies")  # where what a record names may lie
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows


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
    a record of the store was changed by hand; RunFailed where the archive can't be written.
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
    for path in store.record_paths():
        for row in stored_rows(store.read_bytes(path), path):
            record = wanted.pop(row["run_id"][0].as_py(), None)
            if record is None:
                continue
            if problem := altered(row, path):
                raise UserError(f"{problem}; nothing was exported")
            yield record_path(record), _parquet(row)
    for uri in dict.fromkeys(uri for record in records for uri in _attachments(record, predictions, weights)):
        if _is_search(uri):
            if lines := whole_lines(whole_journal(store.files, uri)):
                yield uri, lines
            continue
        try:
            yield uri, store.read_bytes(uri)
        except UserError:
            yield uri, None


def _attachments(record: RunRecord, predictions: bool = True, weights: bool = True) -> list[str]:
    """What belongs to a record, by its place in a results folder: predictions, weights, and the search that its parameters are from."""
    named = ([record.predictions_uri] if predictions else []) + ([record.artifacts_uri] if weights else [])
    if record.study_id is not None:
        named.append(str(Layout(Path()).study(path_name(record.study_id))))
    return [uri for uri in named if uri is not None]


def _is_search(uri: str) -> bool:
    return uri.startswith("studies/")


def _parquet(row: pa.Table) -> bytes:
    buffer = BytesIO()
    pq.write_table(row, buffer, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    return buffer.getvalue()


# --- reading ---------------------------------------------------------------------------------------------------------


def import_results(store: ResultStore, path: Path, *, keep_ours: bool = False) -> Imported:
    """Take what the archive `path` holds into the store. What is there already is left as it is, so a second import changes nothing.

    A conflict is a run that is here with another content, or a unit (one training, fully described) that another run has here. With
    `keep_ours` such records and their files are left out; without it, UserError names them and nothing is written. UserError is also
    raised, and nothing written, for a file that is no archive of kdbench's, or that was changed. All files are written before the first
    record: an import that is killed leaves whole records, and the same command again brings in the others.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = _listed(archive, path)
            records = dict(_records(archive, files, path))
            _check_attachments(archive, files, records, path)
            _check_room(archive, store, path)
            return _merge(archive, files, records, store, path, keep_ours)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} is not an archive that kdbench results export wrote, or it is damaged ({error}); nothing was imported"
        ) from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


def _merge(
    archive: zipfile.ZipFile, files: dict[str, str], records: dict[str, RunRecord], store: ResultStore, path: Path, keep_ours: bool
) -> Imported:
    by_id = {record.run_id: record for _, record, _ in checked_records(store) if record is not None}  # superseded ones too
    by_unit = {record.unit_key: record for record in store.scan()}
    known = [name for name, record in records.items() if _text(by_id.get(record.run_id)) == _text(record)]
    conflicts = {name: reason for name, record in records.items() if name not in known and (reason := _conflict(record, by_id, by_unit))}
    if conflicts and not keep_ours:
        shown = "\n".join(f"  {reason}" for reason in conflicts.values())
        raise UserError(
            f"{path}: {len(conflicts)} of its records conflict with {store.location}; nothing was imported. "
            f"--keep-ours takes in the others:\n{shown}"
        )
    new = {name: record for name, record in records.items() if name not in known and name not in conflicts}
    # Of a record that is here, files may still be missing: it was exported without them at first.
    wanted = [uri for name, record in records.items() if name not in conflicts for uri in _attachments(record) if uri in files]
    absent = [uri for uri in dict.fromkeys(wanted) if not store.has(uri)]
    for uri in absent:
        store.write_bytes(uri, _content(archive, uri, files, path))
    for record in new.values():
        store.append(record)
    return Imported(len(new), len(absent), len(known), tuple(conflicts.values()))


def _conflict(record: RunRecord, by_id: dict[str, RunRecord], by_unit: dict[str, RunRecord]) -> str | None:
    who = f"{record.label}, seed {record.seed}, on {record.data}"
    if record.run_id in by_id:
        return f"run {record.run_id} ({who}) is here with another content"
    ours = by_unit.get(record.unit_key)
    if ours is not None:
        told = f"test metric {ours.test_metric} here, {record.test_metric} there"
        return f"run {record.run_id} ({who}) is the same training as {ours.run_id} here: {told}"
    return None


def _text(record: RunRecord | None) -> str | None:
    """For comparison: as text a nan is equal to itself."""
    return record.model_dump_json() if record is not None else None


def _listed(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """The SHA-256 of every file by name, as the manifest has it. Raises UserError where archive and manifest disagree."""
    names = archive.namelist()
    if MANIFEST not in names:
        raise UserError(f"{path} is not an archive that kdbench results export wrote: it has no {MANIFEST}")
    try:
        manifest: Any = json.loads(archive.read(MANIFEST))
        version, files = manifest["format"], dict(manifest["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its {MANIFEST} can't be read; nothing was imported") from error
    if version != FORMAT:
        raise UserError(f"{path} has archive format {version}, this kdbench reads {FORMAT}: update kdbench (pip install -U kdbench)")
    if sorted(names) != sorted([*files, MANIFEST]):
        odd = sorted((set(names) ^ {*files, MANIFEST}) or {name for name in names if names.count(name) > 1})
        raise UserError(f"{path}: {odd[0]!r} is not what its {MANIFEST} lists; nothing was imported")
    return files


def _records(archive: zipfile.ZipFile, files: dict[str, str], path: Path) -> Iterator[tuple[str, RunRecord]]:
    """Every record by its name, migrated to this version. Raises UserError for one that was changed, or is not where it belongs."""
    for name in files:
        if not name.endswith(".parquet"):
            continue
        where = f"{path}: {name}"
        rows = stored_rows(_content(archive, name, files, path), where)
        if len(rows) != 1:
            raise UserError(f"{where} has {len(rows)} rows, expected one; nothing was imported")
        if problem := altered(rows[0], where):
            raise UserError(f"{problem}; nothing was imported")
        record = from_table(rows[0], where)
        if name != record_path(record):
            raise UserError(f"{where} is not where its record belongs, {record_path(record)}; nothing was imported")
        yield name, record


def _check_attachments(archive: zipfile.ZipFile, files: dict[str, str], records: dict[str, RunRecord], path: Path) -> None:
    """Each is named by a record, lies inside the results folder, is of its kind, and has the content that its record was made from."""
    hashes: dict[str, str | None] = {}
    for record in records.values():
        for uri in _attachments(record):
            hashes[uri] = record.predictions_sha256 if uri == record.predictions_uri else hashes.get(uri)
            if uri == record.artifacts_uri and record.role == "teacher":
                hashes[uri] = record.teacher_sha
    for name in files.keys() - records.keys():
        where = f"{path}: {name!r}"
        if name not in hashes:
            raise UserError(f"{where} belongs to none of its records; nothing was imported")
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or parts[0] not in _FOLDERS:
            raise UserError(f"{where} is not a place inside a results folder; nothing was imported")
        content = _content(archive, name, files, path)
        fits, kind = (_is_journal, "the journal of a search") if _is_search(name) else (_is_safetensors, "a safetensors file")
        if not fits(content):
            raise UserError(f"{where} is not {kind}; nothing was imported")
        if hashes[name] not in (None, files[name]):
            raise UserError(f"{where} is not the file that its record was made with (its SHA-256 differs); nothing was imported")


def _content(archive: zipfile.ZipFile, name: str, files: dict[str, str], path: Path) -> bytes:
    content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != files[name]:
        raise UserError(f"{path}: {name!r} was changed after it was exported (its SHA-256 differs); nothing was imported")
    return content


def _is_safetensors(content: bytes) -> bool:
    """Eight bytes of the header's length, the header as a JSON object, the tensors: anything else, a pickle say, is refused."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= min(_LARGEST_HEADER, len(content) - 8):
        return False
    try:
        return isinstance(json.loads(content[8 : 8 + length]), dict)
    except ValueError:
        return False


def _is_journal(content: bytes) -> bool:
    """Lines of JSON objects, as Optuna writes them."""
    try:
        return content.endswith(b"\n") and all(isinstance(json.loads(line), dict) for line in content.splitlines())
    except ValueError:
        return False


def _check_room(archive: zipfile.ZipFile, store: ResultStore, path: Path) -> None:
    """A small archive may say that it holds terabytes."""
    folder = Path(store.location)
    if not folder.is_absolute():  # an address, whose room nobody knows
        return
    needed = sum(entry.file_size for entry in archive.infolist())
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    if needed > free:
        raise UserError(f"{path} needs {needed / 1e9:.2f} GB, {store.location} has {free / 1e9:.2f} GB free; nothing was imported")
