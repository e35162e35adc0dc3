"""An archive that somebody else made takes neither the machine's memory nor its disk, and leaves nothing behind where it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdbench import bounded
from kdbench.errors import UserError
from kdbench.records import archive as archives
from kdbench.records.exchange import MANIFEST, import_results
from kdbench.records.record import CHECKSUM, row_checksum, to_table
from kdbench.records.store import ResultStore, record_path
from tests.peak_memory import Measured, measured

MOST_MEMORY_KB = 300_000  # above what a process has that imported the same modules


def written(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, manifest: Any = None) -> Path:
    """A zip with these files, and a manifest with their true hashes unless another one is given."""
    told = {"format": 1, "files": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(MANIFEST, json.dumps(told if manifest is None else manifest) if not isinstance(manifest, bytes) else manifest)
    return path


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = BytesIO()
    pq.write_table(table, buffer, **({"compression": "none", "use_dictionary": False} | options))
    return buffer.getvalue()


@pytest.fixture
def record(make_record: Callable[..., Any]) -> Any:
    return make_record(seed=7)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "theirs")


def refused(store: ResultStore, path: Path, *said: str) -> None:
    """The import ends in one line, and leaves no folder."""
    with pytest.raises(UserError) as problem:
        import_results(store, path)
    assert "\n" not in str(problem.value)
    for part in said:
        assert part in str(problem.value)
    assert not Path(store.location).exists()


COLUMNS: dict[str, pa.Array] = {
    "binary": pa.array([b"\x00"], pa.binary()),
    "date": pa.array([date(2026, 1, 1)], pa.date32()),
    "time": pa.array([1], pa.time64("us")),
    "decimal": pa.array([Decimal("1.5")], pa.decimal128(5, 2)),
    "struct": pa.array([{"a": 1}], pa.struct([("a", pa.int64())])),
    "list": pa.array([[1]], pa.list_(pa.int64())),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "a year of 300,000": pa.array([2**63 - 1], pa.int64()).cast(pa.timestamp("us")),
    "bytes that are no text": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string()),
    "5,000 digits": pa.array(["9" * 5_000], pa.string()),
    "no JSON": pa.array(["{"], pa.string()),
    "nested JSON": pa.array(["[" * 100_000], pa.string()),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_that_no_record_has_is_one_line(store: ResultStore, record: Any, tmp_path: Path, kind: str) -> None:
    row = to_table(record)
    name = "curve"
    table = row.set_column(row.column_names.index(name), name, COLUMNS[kind])
    archive = written(tmp_path / "odd.zip", {record_path(record): parquet(table)})
    refused(store, archive, "nothing was imported")


@pytest.mark.parametrize("text", ["9" * 5_000, "[" * 100_000, "{"])
def test_a_json_column_that_python_can_not_read_is_one_line(store: ResultStore, record: Any, tmp_path: Path, text: str) -> None:
    [row] = to_table(record).to_pylist()
    row |= {"params": text}
    row[CHECKSUM] = row_checksum(row)
    archive = written(tmp_path / "odd.zip", {record_path(record): parquet(pa.Table.from_pylist([row], schema=to_table(record).schema))})
    refused(store, archive, "nothing was imported", "JSON")


def test_many_rows_in_few_bytes_are_refused_unread(
    store: ResultStore, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"schema_version": pa.array([1], pa.int64()).take(pa.array([0] * 5_000_000))})
    content = parquet(table, compression="zstd", use_dictionary=True)
    assert len(content) < 100_000
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("read"))
    refused(store, written(tmp_path / "rows.zip", {record_path(record): content}), "has 5000000 rows, expected one")


def test_a_compressed_column_is_refused_unread(store: ResultStore, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet(pa.table({"config": ["x" * 50_000_000]}), compression="zstd")
    assert len(content) < 100_000
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("read"))
    refused(store, written(tmp_path / "long.zip", {record_path(record): content}), "compressed")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_can_not_be_unpacked_in_bounds_is_refused(store: ResultStore, record: Any, tmp_path: Path, method: int) -> None:
    archive = written(tmp_path / "other.zip", {record_path(record): parquet(to_table(record))}, method)
    refused(store, archive, "compressed in a way that export never uses")


@pytest.mark.parametrize(
    "manifest",
    [
        b"[" * 200_000,
        {"format": "1", "files": {}},
        {"format": 1, "files": {"a": 5}},
        {"format": 1, "files": [1]},
        b'{"format": ' + b"9" * 5_000,
    ],
    ids=["nested", "text for a number", "number for a hash", "list", "digits"],
)
def test_a_manifest_that_is_none_is_one_line(store: ResultStore, tmp_path: Path, manifest: Any) -> None:
    refused(store, written(tmp_path / "manifest.zip", {}, manifest=manifest), "its manifest.json can't be read")


def test_a_long_manifest_is_refused_unread(store: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST_MANIFEST", 1_000)
    refused(store, written(tmp_path / "manifest.zip", {}, manifest=b" " * 1_001), "'manifest.json' is 0.0 MB, expected at most")


def test_a_list_of_files_that_is_too_long_is_refused_unread(store: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LARGEST_DIRECTORY", 1_000)
    archive = written(tmp_path / "many.zip", {f"predictions/{number}": b"" for number in range(30)})
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *_: pytest.fail("read"))
    refused(store, archive, "its list of files is longer than 1 kB")


def _another_end(archive: Path, size: int, *, wide: bool) -> None:
    """Put a list of `size` bytes at the end of a zip, and the records that say so where zipfile looks and a plain reader does not."""
    begin = archive.stat().st_size
    with archive.open("ab") as file:
        file.truncate(begin + size)
        file.seek(0, os.SEEK_END)
        if wide:  # the 64-bit record counts even where the one of 32 bits tells a plausible size
            file.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, size, begin))
            file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, begin + size, 1))
            file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 100, begin, 0))
        else:  # the record at the very end counts; its own field looks as if another one began inside of it
            file.write(b"PK\x05\x06" + struct.pack("<HH4sII", 0, 0, b"PK\x05\x06", size, begin) + b"\0\0")


@pytest.mark.parametrize("wide", [True, False])
def test_the_list_of_files_that_zipfile_reads_is_bounded_whatever_its_records_say(
    store: ResultStore, record: Any, tmp_path: Path, wide: bool
) -> None:
    archive = written(tmp_path / "ends.zip", {record_path(record): parquet(to_table(record))})
    _another_end(archive, 400_000_000, wide=wide)
    refused(store, archive, "its list of files is longer than 16 MB")
    memory, said = imported_alone(archive, tmp_path / "theirs")
    assert "its list of files is longer than 16 MB" in said
    assert memory < 100_000


def test_an_archive_of_60_000_empty_files_takes_little_memory(tmp_path: Path) -> None:
    archive = written(tmp_path / "many.zip", {f"predictions/{number:0100}": b"" for number in range(60_000)}, zipfile.ZIP_STORED)
    memory, said = imported_alone(archive, tmp_path / "theirs")
    assert "belongs to none of its records" in said
    assert memory < MOST_MEMORY_KB
    assert not (tmp_path / "theirs").exists()


def test_an_archive_has_no_more_files_than_the_bound(store: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = written(tmp_path / "many.zip", {f"predictions/{number}": b"" for number in range(30)})
    monkeypatch.setattr(bounded, "MOST_MEMBERS", 31)
    refused(store, archive, "belongs to none of its records")
    monkeypatch.setattr(bounded, "MOST_MEMBERS", 30)
    refused(store, archive, "it has more than 30 files")


def test_a_long_name_is_refused(store: ResultStore, tmp_path: Path) -> None:
    refused(store, written(tmp_path / "name.zip", {"n" * 65_535: b""}), "has 65,535 bytes, expected at most 1,000")


def test_a_name_that_is_listed_twice_among_many_is_found_at_once(store: ResultStore, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        for number in range(30_000):
            archive.writestr(f"predictions/{number}", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("predictions/29999", b"")
    refused(store, tmp_path / "twice.zip", "'predictions/29999' is in it twice")


def test_a_file_that_unpacks_to_more_than_it_says_takes_no_memory(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped, zipped.open(MANIFEST, "w") as member:
        for _ in range(400):
            member.write(bytes(1 << 20))
    content = bytearray(archive.read_bytes())
    struct.pack_into("<I", content, content.rfind(b"PK\x01\x02") + 24, 100)
    archive.write_bytes(content)
    memory, said = imported_alone(archive, tmp_path / "theirs")
    assert "Bad CRC-32" in said
    assert memory < 50_000


def test_a_manifest_of_many_values_takes_little_memory(tmp_path: Path) -> None:
    archive = written(tmp_path / "values.zip", {}, manifest=b"[" + b"[]," * 10_000_000 + b"[]]")
    memory, said = imported_alone(archive, tmp_path / "theirs")
    assert "its manifest.json can't be read" in said
    assert memory < MOST_MEMORY_KB


def test_files_that_overlap_are_refused(store: ResultStore, record: Any, tmp_path: Path) -> None:
    data = os.urandom(1_000)
    archive = written(tmp_path / "one.zip", {"predictions/a": data, "predictions/b": data}, zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    place = content.rfind(b"PK\x01\x02", 0, content.rfind(b"PK\x01\x02"))  # the entry of b: its bytes are said to be longer
    struct.pack_into("<I", content, place + 20, 5_000)
    archive.write_bytes(content)
    refused(store, archive, "its files overlap")


def test_what_is_no_file_is_not_waited_for(store: ResultStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(store, tmp_path / "pipe", "pipe can't be read: it is a pipe, expected a regular file")
    refused(store, Path("/dev/zero"), "can't be read: it is a device, expected a regular file")
    refused(store, tmp_path, "can't be read: it is a folder, expected a regular file")


HEADERS = {
    "longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "too long": (5_000_000).to_bytes(8, "little") + b"{" + b" " * 5_000_000,
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no entries": (6).to_bytes(8, "little") + b'{"a":1}'[:6],
    "short": b"\x02",
    "empty": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_weights_with_an_implausible_header_are_refused(
    store: ResultStore, make_record: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    record = make_record(artifacts_uri="students/a/student.safetensors")
    files = {record_path(record): parquet(to_table(record)), "students/a/student.safetensors": HEADERS[kind]}
    refused(store, written(tmp_path / "weights.zip", files), "is not a safetensors file")


@pytest.mark.parametrize("journal", [b"[" * 200_000 + b"\n", b'{"a": 1}', b" " * 2_000_000 + b"\n", b"", b"1\n"])
def test_a_search_that_is_none_is_refused(store: ResultStore, make_record: Callable[..., Any], tmp_path: Path, journal: bytes) -> None:
    record = make_record(study_id="abc")
    files = {record_path(record): parquet(to_table(record)), "studies/abc.journal": journal}
    refused(store, written(tmp_path / "search.zip", files), "is not the journal of a search")


def imported_alone(archive: Path, store: Path) -> Measured:
    """An import in a process of its own."""
    imports = "from pathlib import Path; from kdbench.records.exchange import import_results; from kdbench.records.store import ResultStore"
    return measured(imports, "import_results(ResultStore(sys.argv[2]), Path(sys.argv[1]))", archive, store)


def test_a_small_archive_that_claims_to_be_large_takes_no_memory(record: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(record_path(record), "w", force_zip64=True) as member:
            for _ in range(400):
                member.write(bytes(1 << 20))
        archive.writestr(MANIFEST, json.dumps({"format": 1, "files": {record_path(record): ""}}))
    assert (tmp_path / "bomb.zip").stat().st_size < 2_000_000
    memory, said = imported_alone(tmp_path / "bomb.zip", tmp_path / "theirs")
    assert "claims to hold 0.42 GB" in said
    assert memory < MOST_MEMORY_KB
    assert not (tmp_path / "theirs").exists()


def test_large_weights_pass_through_in_pieces(make_record: Callable[..., Any], tmp_path: Path) -> None:
    record, size = make_record(artifacts_uri="students/a/student.safetensors"), 300 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    digest = hashlib.sha256()
    row = parquet(to_table(record))
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        with archive.open(record.artifacts_uri, "w", force_zip64=True) as member:
            for piece in [len(header).to_bytes(8, "little") + header, *[bytes(1 << 20)] * 300]:
                digest.update(piece)
                member.write(piece)
        archive.writestr(record_path(record), row)
        files = {record.artifacts_uri: digest.hexdigest(), record_path(record): hashlib.sha256(row).hexdigest()}
        archive.writestr(MANIFEST, json.dumps({"format": 1, "files": files}))
    memory, said = imported_alone(tmp_path / "large.zip", tmp_path / "theirs")
    assert said == ""
    assert memory < 150_000
    assert (tmp_path / "theirs" / record.artifacts_uri).stat().st_size == 8 + len(header) + size
