"""Part store: what keeping and reading records costs, one file each and compacted, up to 100,000 of them."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import random
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.part import ROOT, Bench, child_environment, kdbench_command
from benchmarks.report import Row, at_most
from benchmarks.timing import Sample, Spent, timed
from kdbench.records.compaction import FULL_ROWS, compact
from kdbench.records.record import RunRecord, new_run_id, record_schema, to_table
from kdbench.records.store import ResultStore

SECONDS = at_most(15)  # of a board over 100,000 records
_METHODS, _SEEDS, _EPOCHS = 25, 5, 30


def measure(bench: Bench) -> Iterator[Row]:
    """Appending, reading and compacting files of one record, then boards over many compacted ones."""
    few = bench.pick(quick=200, usual=2_000, full=10_000)
    bench.say(f"{few:,} records, a file each")
    singles = bench.scratch / "singles"
    store = ResultStore(singles)
    records = [_record(number) for number in range(few)]
    yield Row("append a record", Sample((timed(lambda: [store.append(record) for record in records]).wall * 1e3 / few,)), "ms")
    reading = timed(lambda: ResultStore(singles).scan()).wall
    yield Row("read a file of one record", Sample((reading * 1e3 / few,)), "ms", note=f"first scan of {few:,}, in {reading:.3g} s")
    compacting = timed(lambda: compact(store)).wall
    yield Row("compact a file of one record", Sample((compacting * 1e3 / few,)), "ms", note=f"{few:,} in {compacting:.3g} s")
    nbytes = sum(path.stat().st_size for path in singles.rglob("*.parquet"))
    yield Row("a compacted record", Sample((nbytes / few,)), "bytes", note=f"a curve of {_EPOCHS} epochs of random numbers")
    yield Row("read the same, compacted", Sample((timed(lambda: ResultStore(singles).scan()).wall * 1e3 / few,)), "ms", note="a record")
    many = bench.pick(quick=5_000, usual=100_000, full=100_000)
    bench.say(f"{many:,} compacted records")
    large = bench.scratch / "large"
    _write_compacted(large, many)
    opened = ResultStore(large)
    opened.keys()
    unit = timed(lambda: opened.scan(unit_key="unit 77")[-1]).wall
    yield Row(f"look up a unit among {many:,}", Sample((unit * 1e3,)), "ms", note="a store that has read them")
    repeats = bench.pick(quick=1, usual=3, full=5)
    spent = [_leaderboard(large, many) for _ in range(repeats)]
    yield Row(
        f"kdbench leaderboard over {many:,} records",
        Sample(tuple(one.cpu for one in spent)),
        "s",
        SECONDS if many == 100_000 else None,
        wall=median(one.wall for one in spent),
        note=f"the whole command, {many // (_METHODS * _SEEDS):,} boards of {_METHODS} methods on {_SEEDS} seeds, as JSON",
    )


def _record(number: int) -> RunRecord:
    """The n-th final: seeds change fastest, then methods, then protocols."""
    setting, seed = divmod(number, _SEEDS)
    board, method = divmod(setting, _METHODS)
    label = ("none", "kd")[method] if method < 2 else f"method {method}"
    quality = 80 + 0.1 * method + 0.01 * seed
    return RunRecord(
        run_id=new_run_id(),
        unit_key=f"unit {number}",
        created_at=datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
        role="final",
        protocol_hash=f"protocol {board}",
        experiment="store",
        task="classification",
        task_version=1,
        data="fashion_mnist",
        data_hash="d",
        split_hash="s",
        recipe={"epochs": _EPOCHS, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "schedule": "cosine", "precision": "fp32"},
        global_batch=128,
        world_size=1,
        precision="fp32",
        teacher="cifar_resnet56",
        teacher_sha="t",
        teacher_metric=94.0,
        student="cifar_resnet8",
        method=label,
        label=label,
        method_version=1,
        params={"temperature": 4.0},
        seed=seed,
        data_seed=0,
        primary="top1",
        val_metric=quality,
        test_metric=quality,
        metrics={"top1": quality, "nll": 0.4},
        curve=[{"epoch": float(epoch), "lr": 0.1, "seconds": 1.5 * epoch, "val_top1": random()} for epoch in range(1, _EPOCHS + 1)],
        config="name: store\n" * 60,
    )


def _write_compacted(folder: Path, count: int) -> None:
    """As compaction leaves it. Columns that need not differ are repeated, to be quick about it."""
    (folder / "v1").mkdir(parents=True)
    schema, pattern = record_schema(), to_table(_record(0))
    for start in range(0, count, FULL_ROWS):
        part = [_record(number) for number in range(start, min(count, start + FULL_ROWS))]
        columns: dict[str, Any] = {name: pa.repeat(pattern[name][0], len(part)) for name in pattern.column_names}
        for name in ("run_id", "unit_key", "created_at", "protocol_hash", "method", "label", "seed", "val_metric", "test_metric"):
            columns[name] = pa.array([getattr(record, name) for record in part], schema.field(name).type)
        columns["metrics"] = pa.array([json.dumps(record.metrics) for record in part])
        path = folder / "v1" / f"compacted-{start:08d}.parquet"
        pq.write_table(pa.table(columns, schema), path, compression="zstd", row_group_size=2_000)


def _leaderboard(folder: Path, count: int) -> Spent:
    """By the wall, and of the command's CPU time."""
    command = kdbench_command("leaderboard", "--results", str(folder), "--format", "json")
    wall, cpu = time.perf_counter(), _children()
    done = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, check=True)
    spent = Spent(time.perf_counter() - wall, _children() - cpu)
    ranked = sum(len(row["run_ids"]) for board in json.loads(done.stdout)["boards"] for row in board["rows"])
    if ranked != count:
        raise RuntimeError(f"kdbench leaderboard ranked {ranked} of {count} records")
    return spent


def _children() -> float:
    """CPU seconds of all processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
