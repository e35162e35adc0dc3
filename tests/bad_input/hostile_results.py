"""Hostile results folders: a finished run, of which one file was torn, edited or replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.records.record import CHECKSUM, row_checksum, to_table
from kdbench.records.store import record_path
from tests.bad_input.hostile_archives import record
from tests.bad_input.hostile_case import FILES_IMPORTS, RUN_IMPORTS, SENTINEL, Case, Draws, Makers, experiment, odd_file
from tests.records.test_hostile_archives import COLUMNS, HEADERS, parquet, written
from tests.test_yaml12 import bomb

FOLDER = ("--results", "results")
READING_IMPORTS = (*FILES_IMPORTS, "kdbench.boards.leaderboard", "kdbench.report.rendering", "kdbench.boards.summary", "rich.console")
CHECKING_IMPORTS = (*RUN_IMPORTS, "kdbench.deploy.verification", "kdbench.deploy.export")

_making = Lock()


def finished(folder: Path) -> Path:
    """A copy, in `folder`, of the results of a run that is done: made once for all cases beside their folders."""
    base = folder.parents[1] / "finished"
    with _making:
        if not base.exists():
            new = base.with_name("unfinished")
            new.mkdir()
            _trained(new)
            new.rename(base)
    shutil.copytree(base / "results", folder / "results")
    shutil.copy(base / "tiny.yaml", folder)
    return folder / "results"


def _trained(folder: Path) -> None:
    file = experiment(folder, {"search": {"trials": 1, "top_k": 1}, "methods": ["none", "kd"]}, name="tiny.yaml")
    command = [sys.executable, "-m", "kdbench.cli", "run", file, *FOLDER, "--no-mlflow"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    )
    if done.returncode:
        raise RuntimeError(f"the run whose results are damaged failed:\n{done.stderr}")


def _command(draws: Draws, *commands: tuple[str, ...], **facts: Any) -> Case:
    command = draws.choice(commands)
    imports = READING_IMPORTS if command[0] in ("leaderboard", "recommend", "results") else CHECKING_IMPORTS
    # What a run that goes on says of the teacher, before it looks at what belongs to students.
    progress = ("teacher ", "warning: the teacher ") if command[0] in ("run", "tune") else ()
    return Case((*command, *FOLDER), **{"imports": imports, "progress": progress, **facts})


READERS = (("leaderboard",), ("recommend",), ("results", "export", "out.zip"), ("results", "compact"), ("verify",))


def _final(results: Path, label: str = "kd") -> Path:
    return next(results.glob(f"v1/*/*/*/{label}/*.parquet"))


def _edited(path: Path, changes: dict[str, Any]) -> None:
    """A record with other values, and a checksum that fits them."""
    table = pq.ParquetFile(path).read()
    [values] = table.to_pylist()
    values |= changes
    values[CHECKSUM] = row_checksum(values)
    path.write_bytes(parquet(pa.Table.from_pylist([values], schema=table.schema)))


# --- the folder ------------------------------------------------------------------------------------------------------


def layouts(folder: Path, draws: Draws) -> Case:
    """`v1` is a file, a pipe, a device or a socket."""
    results = finished(folder)
    shutil.rmtree(results / "v1")
    if draws.pick(["file", "odd"]) == "file":
        (results / "v1").write_text("records")
    else:
        odd_file(results / "v1", draws, but=["folder", "dangling link", "circular link", "endless file", "own memory"])
    return _command(draws, *READERS, ("run", "tiny.yaml", "--no-mlflow"), said="v1 is a file")


def roots(folder: Path, draws: Draws) -> Case:
    """The results folder itself is none."""
    odd_file(folder / "results", draws, but=["folder", "dangling link"])
    return _command(draws, *READERS)


def places(folder: Path, draws: Draws) -> Case:
    """A folder inside it is a file."""
    results = finished(folder)
    place, command = draws.pick(
        [
            ("locks", ("run", "tiny.yaml", "--no-mlflow")),
            ("seals", ("verify",)),
            ("seals", ("results", "compact")),
            ("seals", ("results", "export", "out.zip")),
        ]
    )
    shutil.rmtree(results / place)
    (results / place).write_text("")
    return _command(draws, command)


def locks(folder: Path, draws: Draws) -> Case:
    """A lock is a folder, a pipe, a socket or a device."""
    results = finished(folder)
    (results / "locks" / "tiny.lock").unlink()
    odd_file(results / "locks" / "tiny.lock", draws, but=["dangling link", "sparse file", "endless file", "own memory", "circular link"])
    return _command(draws, ("run", "tiny.yaml", "--no-mlflow"), said="expected a regular file")


def newer_records(folder: Path, draws: Draws) -> Case:
    """A record that says it is of a later kdbench."""
    results = finished(folder)
    _edited(_final(results), {"schema_version": draws.choice([2, 3, 2**62])})
    return _command(draws, *READERS[:3], ("run", "tiny.yaml", "--no-mlflow"), said="update kdbench")


# --- one run ---------------------------------------------------------------------------------------------------------


def exported_weights(folder: Path, draws: Draws) -> Case:
    """`kdbench export` of a run whose weights are a pipe, a hole, a header that lies, or those of another network."""
    results = finished(folder)
    final = _final(results)
    [uri] = pq.ParquetFile(final).read(columns=["artifacts_uri"])["artifacts_uri"].to_pylist()
    weights = results / uri
    content = weights.read_bytes()
    weights.unlink()
    kind = draws.pick(["odd", "odd", "header", "cut", "pickle", "other names", "other shapes", "gone"])
    if kind == "odd":
        odd_file(weights, draws)
    elif kind == "header":
        weights.write_bytes(HEADERS[draws.choice(list(HEADERS))])
    elif kind == "pickle":
        weights.write_bytes(f"cos\nsystem\n(S'touch {SENTINEL}'\ntR.".encode())
    elif kind != "gone":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if kind == "other names":
            header = {f"x{name}" if name != "__metadata__" else name: entry for name, entry in header.items()}
        elif kind == "other shapes":
            for entry in header.values():
                if "shape" in entry:
                    entry["shape"] = [1, *entry["shape"]]
        text = json.dumps(header).encode()
        end = -draws.randint(1, 100) if kind == "cut" else None
        weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length : end])
    return _command(draws, ("export", final.stem), said="student.safetensors" if kind != "gone" else "")


def exported_records(folder: Path, draws: Draws) -> Case:
    """`kdbench export` of a run whose record, checksum made again, holds a bomb, names code, or leads out of the folder."""
    results = finished(folder)
    final = _final(results)
    config = pq.ParquetFile(final).read(columns=["config"])["config"][0].as_py()
    network = "name: tiny_cnn"
    changes: dict[str, Any] = draws.pick(
        [
            {"config": bomb(10)},
            {"config": "name: " + "[" * 3_000},
            {"config": config.replace(network, f"name: os:system\n  command: touch {SENTINEL}")},
            {"config": config.replace("name: shapes", f"name: subprocess:getoutput\n    cmd: touch {SENTINEL}")},
            {"config": "name: &a [*a]"},
            {"config": "x" * 1_500_000},
            {"config": ""},
            {"artifacts_uri": "../../etc/passwd"},
            {"artifacts_uri": "/dev/zero"},
            {"artifacts_uri": "students/\x00/x"},
            {"artifacts_uri": "x" * 100_000},
            {"config": config.replace("width: 4", "width: 1000000000000")},
        ]
    )
    _edited(final, changes)
    return _command(draws, ("export", final.stem))


def carried(folder: Path, draws: Draws) -> Case:
    """`kdbench results export` of what an import would refuse."""
    results = finished(folder)
    final = _final(results, draws.choice(["kd", "none"]))
    predictions = results / pq.ParquetFile(final).read(columns=["predictions_uri"])["predictions_uri"][0].as_py()
    kind = draws.pick(["odd", "odd", "header", "other", "edited record", "sealed record", "no checksum"])
    if kind == "odd":
        predictions.unlink()
        odd_file(predictions, draws, but=["dangling link"])
    elif kind == "header":
        predictions.write_bytes(HEADERS[draws.choice(list(HEADERS))])
    elif kind == "other":
        content = bytearray(predictions.read_bytes())
        content[-1] ^= 1
        predictions.write_bytes(content)
    elif kind == "sealed record":
        _edited(final, {"test_metric": 99.9})
    else:
        table = pq.ParquetFile(final).read()
        name, value = ("test_metric", pa.array([99.9])) if kind == "edited record" else (CHECKSUM, pa.array([None], pa.string()))
        final.write_bytes(parquet(table.set_column(table.column_names.index(name), name, value)))
    return _command(draws, ("results", "export", "out.zip"), ("results", "export", "out.zip", "--weights"))


def journals(folder: Path, draws: Draws) -> Case:
    """A search whose journal is a pipe, a hole, deeply nested, or no journal."""
    results = finished(folder)
    _final(results).unlink()  # so that the search is looked at
    journal = next(results.glob("studies/*.journal"))
    kind = draws.pick(["odd", "odd", "nested", "noise", "other operations", "long line", "digits"])
    if kind == "odd":
        journal.unlink()
        odd_file(journal, draws, but=["dangling link"])
    else:
        content = {
            "nested": b"[" * 100_000 + b"\n\n",
            "noise": draws.randbytes(1_000) + b"\n\n",
            "other operations": b'{"op_code": 999}\n{"op_code": "x"}\n',
            "long line": b'{"a": "' + b"x" * 2_000_000 + b'"}\n',
            "digits": b'{"op_code": ' + b"9" * 5_000 + b"}\n\n",
        }
        journal.write_bytes(content[kind])
    return _command(draws, ("run", "tiny.yaml", "--no-mlflow"), ("tune", "tiny.yaml", "--no-mlflow"), said="the journal of a search")


def merged(folder: Path, draws: Draws) -> Case:
    """An import into a folder whose layout is torn, or that holds the same run with another content."""
    results = finished(folder)
    final = _final(results)
    kind = draws.pick(["v1", "conflict"])
    made = record(draws, **({"run_id": final.stem} if kind == "conflict" else {}))
    written(folder / "theirs.zip", {record_path(made): parquet(to_table(made))})
    if kind == "v1":
        shutil.rmtree(results / "v1")
        (results / "v1").write_text("")
    return _command(draws, ("results", "import", "theirs.zip"), most_lines=1 if kind == "v1" else 2)


RESULTS: Makers = (
    (layouts, 4),
    (roots, 3),
    (places, 2),
    (locks, 2),
    (newer_records, 2),
    (exported_weights, 5),
    (exported_records, 4),
    (carried, 4),
    (journals, 3),
    (merged, 1),
)


# --- what is named and left out --------------------------------------------------------------------------------------


def _torn(path: Path, draws: Draws) -> None:
    """A record that is none any more."""
    table = pq.ParquetFile(path).read()
    kind = draws.pick(["odd", "odd", "odd", "cut", "empty", "noise", "year 300,000", "not UTF-8", "other table", "many rows"])
    content = path.read_bytes()
    path.unlink()
    if kind == "odd":
        odd_file(path, draws)
    elif kind in ("year 300,000", "not UTF-8"):
        name = "created_at" if kind == "year 300,000" else "label"
        column = COLUMNS["a year of 300,000" if kind == "year 300,000" else "bytes that are no text"]
        path.write_bytes(parquet(table.set_column(table.column_names.index(name), name, column)))
    elif kind == "other table":
        path.write_bytes(parquet(pa.table({"a": [1]})))
    elif kind == "many rows":
        path.write_bytes(parquet(pa.table({"schema_version": pa.nulls(5_000_000, pa.int64())}), compression="zstd"))
    else:
        path.write_bytes({"cut": content[:-20], "empty": b"", "noise": draws.randbytes(5_000)}[kind])


def torn_records(folder: Path, draws: Draws) -> Case:
    """A record that is a pipe, a hole, not UTF-8, of a year of 300,000, or cut off: named and left out, and the rest is read."""
    results = finished(folder)
    final = _final(results)
    _torn(final, draws)
    return _command(draws, ("leaderboard",), ("recommend",), code=0, said=final.name)


def checked_records(folder: Path, draws: Draws) -> Case:
    """The same, and `verify` names it with exit code 1."""
    results = finished(folder)
    final = _final(results)
    _torn(final, draws)
    return _command(draws, ("verify",), code=1, said=final.name)


def checked_seals(folder: Path, draws: Draws) -> Case:
    """A seal that is none, or was edited: `verify` names it with exit code 1."""
    results = finished(folder)
    seal = next(results.glob("seals/*.json"))
    content = seal.read_bytes()
    if draws.pick([True, False]):
        seal.unlink()
        odd_file(seal, draws)
    else:
        forged = draws.choice([b"[" * 100_000, b'{"format": ' + b"9" * 5_000 + b"}", content.replace(b'"seed":0', b'"seed":1')])
        seal.unlink()
        if draws.random() < 0.5:
            seal = seal.with_name(f"{seal.name.partition('-')[0]}-{hashlib.sha256(forged).hexdigest()[:32]}.json")
        seal.write_bytes(forged)
    return _command(draws, ("verify",), code=1, said=seal.name)


def checked_caches(folder: Path, draws: Draws) -> Case:
    """A manifest of the teacher's cache that is a pipe, a hole or nested: `cache ls` goes on with what it can read."""
    results = finished(folder)
    manifest = next(results.glob(f"cache/*/{draws.choice(['entry.json', 'logits.json'])}"))
    manifest.unlink()
    odd_file(manifest, draws)
    return _command(draws, ("cache", "ls"), code=0, said=manifest.parent.name)


LEFT_OUT: Makers = ((torn_records, 5), (checked_records, 2), (checked_seals, 2), (checked_caches, 1))
