"""Hostile archives for `kdbench results import`: bombs, lies about sizes, places outside of the folder, Parquet that no record has."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.records.archive import MANIFEST
from kdbench.records.record import CHECKSUM, CROCKFORD, RunRecord, row_checksum, to_table
from kdbench.records.seals import Seal, SealedRow
from kdbench.records.store import record_path
from tests.bad_input.hostile_case import FILES_IMPORTS, Case, Draws, Makers, odd_file
from tests.records.test_hostile_archives import COLUMNS, HEADERS, parquet, written

FILE = "hostile.zip"
STAMP = "01KAMZ3Q0000000000000000AB"  # of a seal


def imported(said: str = "") -> Case:
    return Case(("results", "import", FILE, "--results", "results"), imports=FILES_IMPORTS, said=said)


def record(draws: Draws, **fields: Any) -> RunRecord:
    """A final record, as somebody's results folder may hold it."""
    run_id = "01" + "".join(draws.choices(CROCKFORD, k=24))
    given = {
        "run_id": run_id,
        "unit_key": f"{draws.randrange(16**16):016x}",
        "created_at": datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=draws.randrange(10**6)),
        "role": "final",
        "protocol_hash": "p1",
        "experiment": "theirs",
        "task": "classification",
        "task_version": 1,
        "data": "shapes",
        "data_hash": "d1",
        "split_hash": "s1",
        "recipe": {"epochs": draws.randint(1, 300), "lr": draws.random()},
        "global_batch": 128,
        "world_size": 1,
        "precision": "fp32",
        "teacher": "cifar_resnet56",
        "student": "cifar_resnet8",
        "method": "kd",
        "label": "kd",
        "method_version": 1,
        "seed": draws.randrange(1_000),
        "data_seed": 0,
        "primary": "accuracy",
        "test_metric": 100 * draws.random(),
    }
    return RunRecord(**{**given, **fields})


def row(made: RunRecord) -> bytes:
    return parquet(to_table(made))


def archive_of(folder: Path, content: bytes, draws: Draws) -> Case:
    """An archive whose one record is `content`."""
    written(folder / FILE, {record_path(record(draws)): content})
    return imported("nothing was imported")


# --- the zip ---------------------------------------------------------------------------------------------------------


def packed_zeros(folder: Path, draws: Draws) -> Case:
    """Hundreds of megabytes of one byte, in a few hundred kilobytes."""
    made = record(draws, predictions_uri="predictions/a.safetensors")
    name = draws.pick([record_path(made), MANIFEST, "predictions/a.safetensors", f"seals/{STAMP}-0.json"])
    piece = bytes([draws.randrange(256)]) * (1 << 20)
    with zipfile.ZipFile(folder / FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            for _ in range(draws.randint(150, 500)):
                member.write(piece)
        if name != MANIFEST:
            archive.writestr(MANIFEST, json.dumps({"format": 1, "files": {name: "0" * 64}}))
    return imported("nothing was imported")


def _directory_entry(content: bytes, name: str) -> int:
    """Where a zip's list of files describes `name`."""
    place = content.find(b"PK\x01\x02")
    while content[place + 46 : place + 46 + len(name)] != name.encode():
        place = content.index(b"PK\x01\x02", place + 4)
    return place


# Of the entry of a file in the list: offset, format, value (PKWARE's APPNOTE 6.3.10, section 4.3.12).
EDITS: dict[str, tuple[int, str, int]] = {
    "encrypted": (8, "<H", 0x1),
    "strongly encrypted": (8, "<H", 0x41),
    "unknown compression": (10, "<H", 99),
    "LZMA that is none": (10, "<H", 14),
    "bzip2 that is none": (10, "<H", 12),
    "wrong checksum": (16, "<I", 12345),
    "packed longer than the file": (20, "<I", 50_000_000),
    "larger than it is": (24, "<I", 90_000_000),
    "smaller than it is": (24, "<I", 10),
    "gigabytes": (24, "<I", 0xFFFFFFF0),
    "a name of 60,000 characters": (28, "<H", 60_000),
    "many extra fields": (30, "<H", 60_000),
    "a long comment": (32, "<H", 65_535),
    "beyond the end": (42, "<I", 0x7FFFFFFF),
    "in the middle of another": (42, "<I", 7),
    "other name than before its bytes": (46, "<B", 0x58),
}


def edited_list(folder: Path, draws: Draws) -> Case:
    """One number in the list of files is another one."""
    made = record(draws)
    offset, form, value = EDITS[draws.pick(list(EDITS))]
    content = bytearray(written(folder / FILE, {record_path(made): row(made)}).read_bytes())
    struct.pack_into(form, content, _directory_entry(content, draws.choice([record_path(made), MANIFEST])) + offset, value)
    (folder / FILE).write_bytes(content)
    return imported()


def damaged_bytes(folder: Path, draws: Draws) -> Case:
    """Bytes of a packed record are noise, or the file ends early."""
    made = record(draws)
    content = bytearray(written(folder / FILE, {record_path(made): row(made)}).read_bytes())
    if draws.pick([True, False]):
        begin = len(record_path(made)) + 30 + draws.randrange(200)  # behind the header of the first member
        content[begin : begin + 300] = draws.randbytes(300)
    else:
        del content[draws.randrange(100, len(content) - 30) :]
    (folder / FILE).write_bytes(content)
    return imported()


def lzma_members(folder: Path, draws: Draws) -> Case:
    """Compression whose unpacking can't be bounded, damaged too."""
    made = record(draws)
    method = draws.pick([zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    content = bytearray(written(folder / FILE, {record_path(made): row(made)}, method).read_bytes())
    begin = len(record_path(made)) + 30 + draws.randrange(100)
    content[begin : begin + 50] = draws.randbytes(50)
    (folder / FILE).write_bytes(content)
    return imported("compressed in a way that export never uses")


def many_members(folder: Path, draws: Draws) -> Case:
    """60,000 files that belong to nothing."""
    count, prefix = draws.randint(55_000, 65_000), draws.choice(["predictions/", "v1/", "", "a/" * 50])
    written(folder / FILE, {f"{prefix}{number}": b"" for number in range(count)}, zipfile.ZIP_STORED)
    return imported("nothing was imported")


def twice(folder: Path, draws: Draws) -> Case:
    """Two files of one name, of which readers take the one or the other."""
    made = record(draws)
    written(folder / FILE, {record_path(made): row(made)})
    with warnings.catch_warnings(), zipfile.ZipFile(folder / FILE, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(draws.choice([record_path(made), MANIFEST]), b"{}")
    return imported("is in it twice")


def overlapping(folder: Path, draws: Draws) -> Case:
    """Thousands of names for the same packed bytes: a zip bomb without nesting (David Fifield, 2019)."""
    count = draws.randint(50, 3_000)
    names = [f"predictions/{number:06d}" for number in range(count)]
    written(folder / FILE, {name: os.urandom(1_000) if name == names[0] else b"" for name in names}, zipfile.ZIP_STORED)
    content = bytearray((folder / FILE).read_bytes())
    place = content.find(b"PK\x01\x02")
    first = content[place : place + 46]
    while content[place : place + 4] == b"PK\x01\x02" and content[place + 46 : place + 58] == b"predictions/":
        content[place + 16 : place + 28] = first[16:28]  # checksum and sizes
        content[place + 42 : place + 46] = first[42:46]
        place += 46 + 18
    (folder / FILE).write_bytes(content)
    return imported()


def far_lists(folder: Path, draws: Draws) -> Case:
    """The record at the end tells of a list that is nowhere, or of more files than there are."""
    made = record(draws)
    content = bytearray(written(folder / FILE, {record_path(made): row(made)}).read_bytes())
    end = content.rfind(b"PK\x05\x06")
    offset, form, value = draws.pick(
        [(10, "<H", 65_535), (12, "<I", 0xFFFFFFFE), (16, "<I", 0xFFFFFFF0), (12, "<I", 20_000_000), (4, "<H", 7)]
    )
    if offset == 10:  # readers that go by the size never look at the number: the size is wrong too
        struct.pack_into("<I", content, end + 12, 3)
    struct.pack_into(form, content, end + offset, value)
    if offset == 4:
        content[end:end] = b"PK\x06\x07" + struct.pack("<IQI", 0, 2**62, 9)  # where a larger record is said to be
        struct.pack_into("<I", content, content.rfind(b"PK\x05\x06") + 12, 0xFFFFFFFF)
    (folder / FILE).write_bytes(content)
    return imported()


def outside(folder: Path, draws: Draws) -> Case:
    """A record, right in all else, whose files lie outside of the results folder."""
    name = draws.pick(
        [
            "../evil.safetensors",
            "predictions/../../evil.safetensors",
            "/tmp/evil.safetensors",
            "predictions/..\\..\\evil.safetensors",
            "C:\\evil.safetensors",
            "v1/../evil.safetensors",
            "locks/x.lock",
            "~/evil.safetensors",
            "predictions/" + "x" * 60_000,
            "predictions/a\nb",
            "predictions/a\x1b[2J",
        ]
    )
    made = record(draws, **{draws.choice(["predictions_uri", "artifacts_uri"]): name})
    header = b"{}".ljust(8)
    written(folder / FILE, {record_path(made): row(made), name: len(header).to_bytes(8, "little") + header + b"evil"})
    return imported("nothing was imported")


def links(folder: Path, draws: Draws) -> Case:
    """A symbolic link, a device or a folder as a member."""
    made = record(draws, predictions_uri="predictions/a.safetensors")
    mode = draws.pick([0o120777, 0o020666, 0o040755, 0o010666])
    link = zipfile.ZipInfo("predictions/a.safetensors" + ("/" if mode == 0o040755 else ""))
    link.external_attr = mode << 16
    target = b"" if mode == 0o040755 else b"/etc/passwd"
    files = {record_path(made): row(made), link.filename: target}
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        archive.writestr(record_path(made), row(made))
        archive.writestr(link, target)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        archive.writestr(MANIFEST, json.dumps({"format": 1, "files": hashes}))
    return imported("nothing was imported")


def no_archives(folder: Path, draws: Draws) -> Case:
    """What is no zip at all."""
    kind = draws.pick(["odd", "odd", "empty", "tar", "noise", "text", "end alone"])
    if kind == "odd":
        odd_file(folder / FILE, draws)
    elif kind == "tar":
        with tarfile.open(folder / FILE, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("../evil"))
    else:
        end = b"PK\x05\x06" + bytes(18)
        content = {"empty": b"", "noise": draws.randbytes(100_000), "text": b"records\n" * 1_000, "end alone": end}
        (folder / FILE).write_bytes(content[kind])
    return imported(FILE)


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifests(folder: Path, draws: Draws) -> Case:
    """A manifest of another form, nested deeply, or of numbers that have no end."""
    sha = "0" * 64
    manifest: Any = draws.pick(
        [
            b"[" * draws.randint(100, 200_000),
            b'{"a":' * draws.randint(1_000, 100_000) + b"1" + b"}" * 10,
            b'{"format": ' + b"9" * 5_000 + b', "files": {}}',
            b'{"format": 1, "files": {"a": ' + b"9" * 5_000 + b"}}",
            {"format": "1", "files": {}},
            {"format": 1, "files": {"a": 5}},
            {"format": 1, "files": [[1, 2]]},
            {"format": 1e308, "files": {}},
            {"format": True, "files": None},
            {"format": 2**62, "files": {}},
            {"format": 1, "files": {"a": sha, "b": sha}},
            {"format": 1, "files": {MANIFEST: sha, "\ud83d": sha}},
            [],
            "text",
            b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}",
            b'{"format": NaN, "files": Infinity}',
            b" " * 40_000_000,
        ]
    )
    written(folder / FILE, {"v1/a.parquet": b""}, manifest=manifest)
    return imported()


# --- records ---------------------------------------------------------------------------------------------------------


def parquet_bombs(folder: Path, draws: Draws) -> Case:
    """Parquet of more rows, columns or bytes than any record has, in a few kilobytes."""
    codec = draws.choice(["zstd", "gzip", "snappy", "brotli", "lz4"])
    count = draws.randint(1_000_000, 6_000_000)
    zeros = pa.array([0]).take(pa.repeat(0, count))
    long = "x" * draws.randint(10_000_000, 60_000_000)
    names = [f"column{number}" for number in range(draws.randint(600, 4_000))]
    make: Callable[[], bytes] = draws.pick(
        [
            lambda: parquet(pa.table({"schema_version": zeros}), compression=codec, use_dictionary=True),
            lambda: parquet(pa.table({"schema_version": pa.nulls(count, pa.int64())}), compression=codec),
            lambda: parquet(pa.table({"config": [long]}), compression=codec),
            lambda: parquet(pa.table({"config": pa.array([long]).dictionary_encode()}), compression=codec, use_dictionary=True),
            lambda: parquet(pa.table({name: [1] for name in names})),
            lambda: parquet(pa.table({"curve": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), zeros)}), compression=codec),
            lambda: parquet(pa.table({"schema_version": zeros[:200_000]}), row_group_size=10),
            lambda: parquet(pa.table({"a": [_nested(60)]})),
        ]
    )
    return archive_of(folder, make(), draws)


def _nested(levels: int) -> Any:
    return {"a": _nested(levels - 1)} if levels else 1


def foreign_columns(folder: Path, draws: Draws) -> Case:
    """A column of a type that no record has, or of values that Python has no like of."""
    made, kind = record(draws), draws.pick(list(COLUMNS))
    table = to_table(made)
    name = draws.choice(["curve", "created_at", "schema_version", "run_id", "test_metric", CHECKSUM])
    written(folder / FILE, {record_path(made): parquet(table.set_column(table.column_names.index(name), name, COLUMNS[kind]))})
    return imported("nothing was imported")


def foreign_values(folder: Path, draws: Draws) -> Case:
    """A record whose checksum is right, and whose values are those of none."""
    made = record(draws)
    table = to_table(made)
    [values] = table.to_pylist()
    values |= draws.pick(
        [
            {"params": "9" * 5_000},
            {"recipe": "[" * draws.randint(1_000, 200_000)},
            {"curve": "{"},
            {"devices": '{"a": 1}'},
            {"metrics": '{"a": "text"}'},
            {"schema_version": 2**62},
            {"schema_version": -1},
            {"status": "odd"},
            {"run_id": "../../evil"},
            {"task": "x" * 3_000_000},
            {"unit_key": None},
            {"label": "\x00\x1b[2J"},
        ]
    )
    values[CHECKSUM] = row_checksum(values)
    written(folder / FILE, {record_path(made): parquet(pa.Table.from_pylist([values], schema=table.schema))})
    return imported()


def damaged_parquet(folder: Path, draws: Draws) -> Case:
    """Parquet whose footer or pages are noise, or whose length is a lie."""
    content = bytearray(row(record(draws)))
    footer = int.from_bytes(content[-8:-4], "little")
    change = draws.pick(["footer", "length", "pages", "cut", "encrypted", "edited"])
    if change == "footer":
        content[-8 - footer : -8] = draws.randbytes(footer)
    elif change == "length":
        content[-8:-4] = (2**31 + draws.randrange(2**30)).to_bytes(4, "little")
    elif change == "pages":
        content[4 : -8 - footer] = draws.randbytes(len(content) - 12 - footer)
    elif change == "cut":
        del content[draws.randrange(10, len(content) - 1) :]
    elif change == "encrypted":
        content[:4] = content[-4:] = b"PARE"
    else:
        table = pq.read_table(BytesIO(content))
        content = bytearray(parquet(table.set_column(table.column_names.index("test_metric"), "test_metric", pa.array([99.9]))))
    return archive_of(folder, bytes(content), draws)


# --- what belongs to records -----------------------------------------------------------------------------------------


def weights_of_others(folder: Path, draws: Draws) -> Case:
    """Weights whose header is longer than the file, deeply nested, or no header."""
    made = record(draws, artifacts_uri="students/a/student.safetensors")
    written(folder / FILE, {record_path(made): row(made), str(made.artifacts_uri): HEADERS[draws.pick(list(HEADERS))]})
    return imported("is not a safetensors file")


def searches(folder: Path, draws: Draws) -> Case:
    """The journal of a search that is none."""
    made = record(draws, study_id="abc")
    journal = draws.pick(
        [b"[" * 200_000 + b"\n", b'{"a": 1}', b" " * 2_000_000 + b"\n", b"", b"9" * 5_000 + b"\n", b"\x80\x05cos\nsystem\n"]
    )
    written(folder / FILE, {record_path(made): row(made), "studies/abc.journal": journal})
    return imported("is not the journal of a search")


def foreign_seals(folder: Path, draws: Draws) -> Case:
    """A seal of rows that are not there or were others, or one that is none."""
    made = record(draws)
    sealed = SealedRow(sha256="0" * 64, unit_key=made.unit_key, student=made.student, label=made.label, seed=made.seed)
    content = draws.pick(
        [
            Seal(made_at="2030-01-01", command="run", rows={made.run_id: sealed}).content,
            Seal(made_at="2030-01-01", command="run", rows={"01" + "A" * 24: sealed}).content,
            Seal(format=9, made_at="2030-01-01", command="run").content,
            b"[" * 200_000,
            b'{"format": ' + b"9" * 5_000 + b"}",
            b'{"made_at": 1, "command": {}, "rows": []}',
            b"\xff\xfe",
            b" " * 9_000_000,
        ]
    )
    name = f"seals/{STAMP}-{hashlib.sha256(content).hexdigest()[:32]}.json"
    written(folder / FILE, {record_path(made): row(made), name: content})
    return imported("nothing was imported")


ARCHIVES: Makers = (
    (packed_zeros, 3),
    (edited_list, 5),
    (damaged_bytes, 2),
    (lzma_members, 1),
    (many_members, 1),
    (twice, 1),
    (overlapping, 1),
    (far_lists, 2),
    (outside, 3),
    (links, 1),
    (no_archives, 3),
    (manifests, 4),
    (parquet_bombs, 3),
    (foreign_columns, 3),
    (foreign_values, 2),
    (damaged_parquet, 2),
    (weights_of_others, 1),
    (searches, 1),
    (foreign_seals, 1),
)
