"""What is damaged in a results folder is named, or made again where it can be, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdbench.benchmark import run as running
from kdbench.experiment import Experiment
from kdbench.records.record import CHECKSUM, row_checksum
from kdbench.records.store import ResultStore
from kdbench.search.space import Parameter, Range
from kdbench.search.study import MethodStudy
from kdbench.storage.layout import Layout
from kdbench.training import precision
from tests.bad_input.tiny_experiment import TINY, assert_one_line, results, run, write
from tests.console import Kdbench


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a run that is done."""
    folder = tmp_path_factory.mktemp("finished")
    running.run(Experiment.model_validate(TINY), folder / "results", running_watch())
    return folder / "results"


def running_watch() -> Any:
    from kdbench.benchmark.watch import Unwatched

    return Unwatched()


@pytest.fixture
def done(kdbench: Kdbench, finished: Path) -> Path:
    """A copy of it in the working directory."""
    return Path(shutil.copytree(finished, "results"))


@pytest.mark.parametrize("command", ["run tiny.yaml --no-mlflow", "leaderboard", "export 01A"])
@pytest.mark.parametrize("kind", ["empty", "cut", "garbage", "foreign", "other version", "no json"])
def test_a_damaged_record_is_named_by_every_command_that_reads_it_and_left_out(
    kdbench: Kdbench, done: Path, caplog: pytest.LogCaptureFixture, kind: str, command: str
) -> None:
    write({})
    path = next((done / "v1").rglob("kd/*.parquet"))
    table = pq.ParquetFile(path).read()
    column = table.column_names.index
    if kind == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    elif kind == "other version":
        pq.write_table(table.set_column(column("schema_version"), "schema_version", pa.array([None], pa.int64())), path)
    elif kind == "no json":
        pq.write_table(table.set_column(column("recipe"), "recipe", pa.array(["{"])), path)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-20], "garbage": bytes(1000)}[kind])
    ended = kdbench(*command.split(), "--results", "results")
    assert [line for line in caplog.messages if "left out" in line and path.name in line] != []
    if command.startswith("export"):
        assert_one_line(ended, 2, "01A")
    else:
        assert ended.code == 0, ended


def test_damaged_weights_of_a_teacher_are_trained_again_and_nothing_else(kdbench: Kdbench, done: Path) -> None:
    weights = next((done / "teachers").rglob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    before = {record.run_id for record in ResultStore(done).scan()}
    assert run(kdbench).code == 0
    assert weights.read_bytes() == whole
    new = [record for record in ResultStore(done).scan() if record.run_id not in before]
    assert [record.role for record in new] == ["teacher"]


@pytest.mark.parametrize("kind", ["cut", "empty", "garbage", "other size", "entry", "index"])
def test_a_damaged_teacher_cache_is_made_again(kdbench: Kdbench, done: Path, kind: str) -> None:
    logits, manifest, entry, index = (
        next((done / "cache").rglob(name)) for name in ("logits.npy", "logits.json", "entry.json", "index.npy")
    )
    whole = {path: path.read_bytes() for path in (logits, manifest, entry, index)}
    if kind == "cut":
        logits.write_bytes(whole[logits][:-100])
    elif kind == "empty":
        logits.write_bytes(b"")
    elif kind == "garbage":
        manifest.write_text("{")
    elif kind == "other size":
        manifest.write_text(manifest.read_text().replace('"images": 200', '"images": 20'))
    elif kind == "entry":
        entry.write_text("[]")
    else:
        index.write_bytes(whole[index][:-1] + b"\xff")
    ended = run(kdbench, {"seeds": 2, "control_seeds": 2})
    assert ended.code == 0, ended.err
    assert "it is made again" in ended.out
    assert {path: path.read_bytes() for path in whole} == whole
    assert len(results()) == 5


def test_a_damaged_choice_of_precision_is_measured_again(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_fastest", lambda *_: ("fp32", "contiguous"))
    changes = {"recipe.precision": "auto", "recipe.memory_format": "auto", "recipe.compile": "auto", "methods": ["none"], "teacher": None}
    assert run(kdbench, changes).code == 0
    choice = next(Path("results/choices").iterdir())
    for content in ("", "{", "[]", '{"precision": "fp9", "memory_format": "contiguous"}'):
        choice.write_text(content)
        assert run(kdbench, changes).code == 0
        assert json.loads(choice.read_text()) == {"precision": "fp32", "memory_format": "contiguous", "compile": {"2": False}}
    assert results() == ["final none ok"]


AXES = (Parameter("temperature", Range(1, 8), 4.0),)


def study(path: Path) -> MethodStudy:
    return MethodStudy(path, "s", AXES, trials=3, sampler="random", seed=0)


@pytest.mark.parametrize(
    "content", [b"garbage\nmore\n", b'{"a": 1}\n', b"[]\n{}\n", bytes(range(128, 256)) + b"\n" * 2, b'{"op_code": 999, "worker_id": "x"}\n']
)
def test_a_damaged_journal_of_a_search_is_named(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    Path("s.journal").write_bytes(content)
    monkeypatch.setattr(Layout, "study", lambda *_: Path("s.journal"))
    ended = run(kdbench, {"search": {"trials": 1}})
    assert_one_line(ended, 2, "the journal of a search, s.journal, is damaged", "delete it to have that search run again")
    assert Path("s.journal").read_bytes() == content


def test_a_journal_whose_last_line_was_cut_off_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "s.journal"
    first = study(journal)
    first.complete(first.ask().number, [50.0], 1.0, 1.0)
    point = first.ask()
    lines = journal.read_bytes()
    journal.write_bytes(lines + b'{"op_code": 6, "worker')
    second = study(journal)
    assert second.ask() == point
    second.complete(point.number, [60.0], 1.0, 1.0)
    assert [trial.values for trial in study(journal).study.trials] == [[50.0], [60.0]]


def test_a_journal_that_the_disk_does_not_give_is_named(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.journal").symlink_to("/proc/self/mem")  # whose first bytes can't be read, as those of a bad disk
    monkeypatch.setattr(Layout, "study", lambda *_: Path("s.journal"))
    ended = run(kdbench, {"search": {"trials": 1}})
    assert_one_line(ended, 2, "the journal of a search, s.journal, can't be read: Input/output error. Move it away")


@pytest.mark.parametrize("uri", ["../../etc/passwd", "/dev/zero", "students/\0/x", "x" * 100_000])
def test_weights_that_a_record_says_are_elsewhere_are_not_read(kdbench: Kdbench, done: Path, uri: str) -> None:
    path = next((done / "v1").rglob("kd/*.parquet"))
    table = pq.ParquetFile(path).read()
    [row] = table.to_pylist()
    row |= {"artifacts_uri": uri}
    row[CHECKSUM] = row_checksum(row)
    pq.write_table(pa.Table.from_pylist([row], schema=table.schema), path)
    ended = kdbench("export", path.stem, "--results", "results")
    assert_one_line(ended, 2, "are gone" if len(uri) > 1_000 else "are not in the results folder, so they are not read")
    assert len(ended.err) < 1_000
    verified = kdbench("verify", "--results", "results")
    assert (verified.code, "changed after kdbench run had sealed it" in verified.out) == (1, True)


def test_a_file_in_place_of_the_locks_is_named(kdbench: Kdbench, done: Path) -> None:
    shutil.rmtree(done / "locks", ignore_errors=True)
    (done / "locks").write_text("")
    ended = run(kdbench, {"seeds": 2, "control_seeds": 2})
    assert_one_line(ended, 2, "locks/tiny.lock can't be taken: ", "locks is no folder; move away what is in its place")


def test_an_unknown_run_is_refused(kdbench: Kdbench, done: Path) -> None:
    assert_one_line(kdbench("export", "01NOWHERE", "--results", "results"), 2, "run '01NOWHERE'", "kdbench leaderboard --format json")


@pytest.mark.parametrize("command", ["leaderboard --format tabel", "list methods --format jsn", "export 01 --format onx"])
def test_an_unknown_format_is_answered_with_the_nearest(kdbench: Kdbench, done: Path, command: str) -> None:
    run_id = next(record.run_id for record in ResultStore(done).scan(role="final"))
    ended = kdbench(*command.replace("01", run_id).split(), *([] if "list" in command else ["--results", "results"]))
    assert_one_line(ended, 2, "unknown format", "; did you mean ")
