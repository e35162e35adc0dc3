"""A record that is no record is named by every command that reads, and left out; nothing is waited for, nothing hides the rest."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdbench.errors import UnreadableFile
from kdbench.records import compaction
from kdbench.records.compaction import Compacted, compact
from kdbench.records.record import CHECKSUM, NewerRecord, RunRecord, record_schema, row_checksum
from kdbench.records.store import ResultStore
from kdbench.storage.folder import Folder
from tests.console import Kdbench

SECONDS = 30  # for a command that would wait for ever
MakeRecord = Callable[..., RunRecord]


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """Ends a test that waits for a pipe, which nothing else would."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- kinds of damage -------------------------------------------------------------------------------------------------


def sealed(table: pa.Table) -> pa.Table:
    """With a checksum of what it holds now, as someone makes it who edits a record."""
    [row] = table.to_pylist()
    column = table.column_names.index(CHECKSUM)
    return table.set_column(column, CHECKSUM, pa.array([row_checksum(row)]))


def written(path: Path, table: pa.Table, **options: Any) -> None:
    pq.write_table(table, path, **({"compression": "none", "use_dictionary": False} | options))


def with_column(path: Path, name: str, column: pa.Array) -> None:
    table = pq.ParquetFile(path).read()
    written(path, table.set_column(table.column_names.index(name), name, column))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target if target else path.name)

    return link


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def socket(path: Path) -> None:
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(50_000_000_000)


def column(name: str, array: pa.Array) -> Callable[[Path], None]:
    return lambda path: with_column(path, name, array)


def many_rows(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    written(path, pa.table({name: pa.concat_arrays([table[name].chunk(0)] * 50_000) for name in table.column_names}), compression="zstd")


def large_column(path: Path) -> None:
    with_column(path, "config", pa.array(["a" * 5_000_000]))
    written(path, pq.ParquetFile(path).read(), compression="zstd")  # of a few kilobytes


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "it is a pipe, expected a regular file"),
    "socket": (socket, "it is a socket, expected a regular file"),
    "device": (linked("/dev/zero"), "it is a device, expected a regular file"),
    "terminal": (linked("/dev/tty"), "can't be read"),
    "folder": (folder, "it is a folder, expected a regular file"),
    "link to a folder": (linked("/"), "it is a folder, expected a regular file"),
    "dangling link": (linked("nowhere"), "it is a link to nothing"),
    "circular link": (linked(""), "it is a circle of symbolic links"),
    "sparse": (sparse, "it has more than 4 MB"),
    "empty": (lambda path: path.write_bytes(b"") and None, "is not a readable Parquet file"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 9), "is not a readable Parquet file"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "is not a readable Parquet file"),
    "text": (lambda path: path.write_text("no parquet") and None, "is not a readable Parquet file"),
    "many rows": (many_rows, "has 50000 rows, expected one"),
    "large column": (large_column, "declares 5"),
    "not UTF-8": (column("label", pa.array([b"kd\xff\xfe"], pa.binary()).view(pa.string())), "is not a kdbench record: UnicodeDecodeError"),
    "no JSON": (column("recipe", pa.array(["{"])), "is not a record of schema version 1"),
    "year 300,000": (column("created_at", pa.array([2**63 - 1], pa.int64()).cast(pa.timestamp("us", "UTC"))), "is not a kdbench record"),
    "no version": (column("schema_version", pa.array([None], pa.int64())), "is not a kdbench record"),
    "no time": (column("created_at", pa.array([None], pa.timestamp("us", "UTC"))), "created_at"),
    "binary": (column("host_hash", pa.array([b"\x00"], pa.binary())), "is of the type binary"),
    "decimal": (column("test_metric", pa.array([Decimal("1.5")], pa.decimal128(5, 2))), "is of the type decimal"),
    "list": (column("params", pa.array([[1]], pa.list_(pa.int64()))), "is of the type list"),
    "long list": (column("params", pa.array([[1, 2, 3]], pa.list_(pa.int64()))), "holds nested columns"),
    "struct": (column("metrics", pa.array([{"a": 1}], pa.struct([("a", pa.int64())]))), "is of the type struct"),
    "other columns": (lambda path: written(path, pa.table({"a": [1]})), "is not a kdbench record"),
}


@pytest.fixture
def results(tmp_path: Path, make_record: MakeRecord) -> Path:
    """A board of two methods with three seeds."""
    store = ResultStore(tmp_path / "results")
    for seed in range(3):
        for method, value in (("none", 80.0), ("kd", 82.0)):
            store.append(make_record(method=method, label=method, seed=seed, test_metric=value + seed, latency_ms_p50=1.0, params_count=9))
    return tmp_path / "results"


def a_record(results: Path) -> Path:
    return sorted((results / "v1").rglob("kd/*.parquet"))[0]


def only_line(caplog: pytest.LogCaptureFixture, path: Path) -> str:
    """The one warning of a command."""
    [message] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in message
    assert "\n" not in message
    assert message.startswith("left out: ")
    return message


# --- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_store_names_what_is_no_record_and_reads_the_rest(kind: str, results: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage, reason = DAMAGE[kind]
    path = a_record(results)
    content = path.read_bytes()
    store = ResultStore(results)
    damage(path)

    assert len(store.scan()) == 5
    assert len(store.scan(without=["curve"], label="kd")) == 2
    assert len(store.keys()) == 5
    assert store.by_unit()("unit-2") == []  # what `run` asks
    assert reason in only_line(caplog, path)
    restored(path, content)
    assert len(store.scan()) == 6


def restored(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        (path / "notes.txt").unlink()
        path.rmdir()
    else:
        path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_what_is_no_record_and_exits_with_1(kind: str, results: Path, kdbench: Kdbench) -> None:
    damage, reason = DAMAGE[kind]
    path = a_record(results)
    damage(path)

    ended = kdbench("verify", "--results", results)
    named = [line for line in ended.out.splitlines() if path.name in line]
    assert ended.code == 1
    assert len(named) == 1
    assert reason in named[0]


COMMANDS: dict[str, list[str]] = {
    **{f"leaderboard, {name}": ["leaderboard", "--format", name] for name in ("table", "json", "csv", "markdown", "latex")},
    "explanation": ["leaderboard", "--explain", "kd"],
    "report": ["leaderboard", "--html", "report.html"],
    "site": ["leaderboard", "--site", "site"],
    "recommendation": ["recommend", "--latency", "5ms"],
    "export": ["results", "export", "boards.zip"],
    "compaction": ["results", "compact"],
    "cache": ["cache", "prune", "--dry-run"],
}


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "sparse", "truncated", "not UTF-8", "folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_the_rest_and_ends_well(
    command: str,
    kind: str,
    results: Path,
    kdbench: Kdbench,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = a_record(results)
    DAMAGE[kind][0](path)

    ended = kdbench(*COMMANDS[command], "--results", results)
    assert ended.code == 0, ended.err
    assert "traceback" not in ended.err
    only_line(caplog, path)
    if command == "leaderboard, json":
        [board] = json.loads(ended.out)["boards"]
        assert {row["method"]: row["seeds"] for row in board["rows"]} == {"kd": 2, "none": 3}
    if command == "export":
        assert "5 records" in ended.out
    if command == "compaction":
        assert "5 records in 1 files, before in 5" in ended.out
        assert os.path.lexists(path)


def test_the_line_is_on_stderr_of_the_real_command(results: Path) -> None:
    path = a_record(results)
    pipe(path)
    command = [sys.executable, "-m", "kdbench.cli", "leaderboard", "--format", "json", "--results", str(results)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == 0
    assert len(json.loads(ended.out if hasattr(ended, "out") else ended.stdout)["boards"]) == 1
    assert ended.stderr == f"left out: {path} can't be read: it is a pipe, expected a regular file\n"


def test_a_record_of_a_newer_kdbench_is_not_left_out_of_a_board(results: Path) -> None:
    """It is whole: a board without it would be wrong, and to train it again a waste."""
    with_column(a_record(results), "schema_version", pa.array([2], pa.int64()))
    for read in (lambda: ResultStore(results).scan(), lambda: compact(ResultStore(results))):
        with pytest.raises(NewerRecord, match="update kdbench"):
            read()


def test_a_file_that_may_not_be_read_is_left_out(results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = a_record(results)
    real = os.open

    def refusing(name: Any, *given: Any, **named: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return real(name, *given, **named)

    monkeypatch.setattr(os, "open", refusing)
    assert len(ResultStore(results).scan()) == 5
    assert "Permission denied" in only_line(caplog, path)


# --- files of many records -------------------------------------------------------------------------------------------


def compacted(results: Path) -> Path:
    compact(ResultStore(results))
    [path] = (results / "v1").glob("compacted-*.parquet")
    return path


def replaced_row(name: str, value: pa.Array) -> Callable[[Path], None]:
    """One row of six has another value."""

    def damage(path: Path) -> None:
        table = pq.ParquetFile(path).read()
        chunk = pa.concat_arrays([value, table[name].combine_chunks().slice(1)])
        written(path, table.set_column(table.column_names.index(name), name, chunk), compression="zstd")

    return damage


def without_column(name: str) -> Callable[[Path], None]:
    return lambda path: written(path, pq.ParquetFile(path).read().drop_columns([name]))


def too_many_rows(path: Path) -> None:
    table = pq.ParquetFile(path).read()
    written(path, pa.table({name: pa.nulls(5_000_000, table.schema.field(name).type) for name in table.column_names}), compression="zstd")


def a_page(path: Path) -> None:
    """The content of a column is overwritten, what the file declares is not."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(record_schema().get_field_index("label"))
    start = min(place for place in (chunk.data_page_offset, chunk.dictionary_page_offset) if place)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * chunk.total_compressed_size)


TEXT = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
DAMAGE_OF_MANY: dict[str, Callable[[Path], None]] = {
    **{kind: DAMAGE[kind][0] for kind in ("pipe", "folder", "dangling link", "circular link", "sparse", "empty", "truncated", "text")},
    "many rows": too_many_rows,
    "a page": a_page,
    "label not UTF-8": replaced_row("label", TEXT),
    "run id not UTF-8": replaced_row("run_id", TEXT),
    "no label": replaced_row("label", pa.nulls(1, pa.string())),
    "no run id": replaced_row("run_id", pa.nulls(1, pa.string())),
    "no JSON": replaced_row("metrics", pa.array(["{"])),
    "year 300,000": replaced_row("created_at", pa.array([2**62], pa.int64()).cast(pa.timestamp("us", "UTC"))),
    "foreign type": lambda path: with_column(path, "test_metric", pa.array(["a"] * 6)),
    "without run ids": without_column("run_id"),
    "without versions": without_column("schema_version"),
    "other columns": lambda path: written(path, pa.table({"a": [1]})),
}


@pytest.mark.parametrize("kind", DAMAGE_OF_MANY)
def test_a_file_of_many_records_that_is_damaged_is_left_out_as_a_whole(
    kind: str, results: Path, kdbench: Kdbench, make_record: MakeRecord, caplog: pytest.LogCaptureFixture
) -> None:
    path = compacted(results)
    ResultStore(results).append(make_record(method="none", label="none", seed=7))
    DAMAGE_OF_MANY[kind](path)
    store = ResultStore(results)

    assert [record.seed for record in store.scan(without=["curve", "config"])] == [7]
    assert [record.seed for record in store.scan()] == [7]
    assert [record.seed for record in store.scan(label="none")] == [7]
    assert store.by_unit()("unit-1") == []
    assert path.name in caplog.text
    assert kdbench("leaderboard", "--results", results).code == 0
    ended = kdbench("verify", "--results", results)
    assert ended.code == 1
    assert path.name in ended.out
    assert "traceback" not in ended.err


def test_a_row_of_a_damaged_file_does_not_stand_for_a_good_one(results: Path, make_record: MakeRecord, tmp_path: Path) -> None:
    """The damaged file has the later record of a unit; the earlier one counts again."""
    store = ResultStore(results)
    earlier = make_record(method="kd", label="kd", seed=9, unit_key="same", test_metric=70.0)
    store.append(make_record(method="kd", label="kd", seed=9, unit_key="same", test_metric=71.0))
    path = compacted(results)
    store = ResultStore(results)
    store.append(earlier)
    assert [record.test_metric for record in store.scan(unit_key="same")] == [71.0]
    replaced_row("label", pa.nulls(1, pa.string()))(path)

    assert [record.test_metric for record in ResultStore(results).scan(unit_key="same")] == [70.0]
    assert [record.test_metric for record in ResultStore(results).by_unit()("same")] == [70.0]


def test_what_can_not_be_merged_with_records_stays_as_it_is(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = a_record(results)
    with_column(path, "seed", pa.array(["0"]))  # read as a number, but no column of numbers

    assert len(ResultStore(results).scan()) == 6
    assert compact(ResultStore(results)) == Compacted(before=5, after=1, rows=5)
    assert "can't be compacted: its column 'seed' is of the type string, expected int64" in only_line(caplog, path)
    assert len(ResultStore(results).scan()) == 6


def test_full_files_and_one_more_are_plausible(results: Path) -> None:
    """The bound on rows is above what compaction writes."""
    from kdbench.records.parquet import COMPACTED

    assert COMPACTED.rows >= 2 * compaction.FULL_ROWS - 1


# --- files beside the records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circular link", "dangling link", "sparse", "empty", "text"])
def test_predictions_that_are_no_such_file_are_named_by_verify(kind: str, results: Path, kdbench: Kdbench, make_record: MakeRecord) -> None:
    uri = "predictions/a.safetensors"
    store = ResultStore(results)
    store.write_bytes(uri, b"predictions")
    record = make_record(seed=5, predictions_uri=uri, predictions_sha256="0" * 64)
    store.append(record)
    damage = {"sparse": lambda path: os.truncate(path, 30_000_000_000)}.get(kind, DAMAGE[kind][0])
    damage(results / uri)

    ended = kdbench("verify", "--results", results)
    assert ended.code == 1
    assert len([line for line in ended.out.splitlines() if record.run_id in line]) == 1
    assert "traceback" not in ended.err
    assert kdbench("leaderboard", "--results", results).code == 0


@pytest.mark.parametrize("declared", [b"", (20).to_bytes(8, "little") + b'{"a": 1}            ', (2).to_bytes(8, "little") + b"{}"])
def test_tensors_that_do_not_fill_a_large_file_are_not_read(declared: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(declared)
    os.truncate(tmp_path / "a.safetensors", 30_000_000_000)
    with pytest.raises(UnreadableFile, match=r"a\.safetensors can't be read: it (is not a safetensors file|does not have the length)"):
        Folder(tmp_path).read("a.safetensors")


@pytest.mark.parametrize("kind", ["pipe", "folder", "circular link", "sparse", "empty", "text"])
def test_weights_of_a_teacher_that_are_no_such_file_are_named_by_verify(
    kind: str, results: Path, kdbench: Kdbench, make_record: MakeRecord
) -> None:
    uri = "teachers/a/model.safetensors"
    ResultStore(results).write_bytes(uri, b"weights")
    record = make_record(role="teacher", teacher_sha="0" * 64, artifacts_uri=uri, test_metric=None)
    ResultStore(results).append(record)
    DAMAGE[kind][0](results / uri)

    ended = kdbench("verify", "--results", results)
    assert ended.code == 1
    assert [uri in line for line in ended.out.splitlines() if record.run_id in line] == [True]


@pytest.mark.parametrize("kind", ["pipe", "folder", "circular link", "sparse", "empty", "text"])
def test_a_damaged_database_of_mlflow_and_a_damaged_journal_stop_nothing(
    kind: str, results: Path, kdbench: Kdbench, make_record: MakeRecord, tmp_path: Path
) -> None:
    for path in (results / "mlflow.db", results / "studies" / "s1.journal", results / "locks" / "quick.lock"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        DAMAGE[kind][0](path)
    (results / ".ray-quick-a1").mkdir()  # so that verify asks who runs
    ResultStore(results).append(make_record(seed=5, study_id="s1", trials=3))

    for command in (["leaderboard"], ["leaderboard", "--html", tmp_path / "report.html"], ["recommend"], ["verify"]):
        ended = kdbench(*command, "--results", results)
        assert ended.code == (1 if command == ["verify"] else 0), ended.err  # records without predictions
        assert "traceback" not in ended.err


LINES = ["[1]", "1", "null", '{"op_code": 99}', '{"op_code": 4, "trial_id": 7}', "[" * 2000, '{"op_code": "a", "worker_id": []}']


@pytest.mark.parametrize("line", LINES)
def test_a_journal_that_optuna_did_not_write_is_a_sentence(line: str) -> None:
    from kdbench.report.searches import read_search

    found = read_search(f"{line}\n".encode(), "s1", None)
    assert isinstance(found, str)
    assert found.startswith("The journal of the search is damaged (")


def test_an_export_refuses_predictions_that_are_no_file(results: Path, make_record: MakeRecord, tmp_path: Path, kdbench: Kdbench) -> None:
    uri = "predictions/a.safetensors"
    ResultStore(results).append(make_record(seed=5, predictions_uri=uri, predictions_sha256="0" * 64))
    (results / "predictions").mkdir()
    os.mkfifo(results / uri)

    ended = kdbench("results", "export", tmp_path / "a.zip", "--results", results)
    assert ended.code == 2
    assert f"{uri} is damaged" in ended.err
    assert not (tmp_path / "a.zip").exists()
    assert kdbench("results", "export", tmp_path / "a.zip", "--no-predictions", "--results", results).code == 0
