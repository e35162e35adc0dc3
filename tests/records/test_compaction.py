"""Compaction makes few files of many, and whatever happens on the way no row is lost and none counts twice."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdbench.boards.leaderboard import boards
from kdbench.errors import RunFailed
from kdbench.records import compaction
from kdbench.records.compaction import Compacted, compact
from kdbench.records.integrity import checked_records
from kdbench.records.record import RunRecord, record_schema, to_table
from kdbench.records.record_files import is_compacted
from kdbench.records.store import LONG_FIELDS, ResultStore


@pytest.fixture(params=["folder", "bucket"])
def location(request, tmp_path) -> str:
    return str(tmp_path / "results") if request.param == "folder" else request.getfixturevalue("bucket")


def filled(location: str | Path, make_record: Callable[..., RunRecord], count: int = 12) -> list[RunRecord]:
    store = ResultStore(location)
    records = [
        make_record(
            seed=seed % 3,
            label=f"m{seed % 4}",
            unit_key=f"u{seed % 10}",  # the last two supersede the first two
            curve=[{"epoch": 1.0, "loss": math.inf}],
            val_metric=math.nan if seed == 5 else 50.0 + seed,
            metrics={"top1": math.nan},
            params={"temperature": seed},
        )
        for seed in range(count)
    ]
    for record in records:
        store.append(record)
    return records


def dumped(records: list[RunRecord]) -> list[str]:
    """In an order, and with nan equal to itself."""
    return [record.model_dump_json() for record in records]


def files(location: str | Path) -> list[str]:
    return sorted(ResultStore(location).files.find("v1"))


def test_a_compacted_store_reads_as_it_did(location, make_record) -> None:
    filled(location, make_record)
    before = ResultStore(location).scan()

    assert compact(ResultStore(location)) == Compacted(before=12, after=1, rows=12)
    [path] = files(location)
    assert is_compacted(path)
    store = ResultStore(location)
    assert dumped(store.scan()) == dumped(before)
    assert dumped(store.scan(label="m1", seed=2)) == dumped([r for r in before if r.label == "m1" and r.seed == 2])
    assert store.keys() == {record.unit_key for record in before}
    assert dumped(store.scan(study_id=None)) == dumped(before)
    assert store.scan(unit_key="u1")[-1].params == {"temperature": 11}


def test_rows_of_files_that_are_older_than_a_column_take_its_default(tmp_path, make_record) -> None:
    store = ResultStore(tmp_path)
    paths = [tmp_path / store.append(make_record(metrics={"top1": 1.0}, devices=["cpu"])) for _ in range(3)]
    pq.write_table(pq.read_table(paths[0]).drop_columns(["metrics", "devices", "flops"]), paths[0])
    compact(ResultStore(tmp_path))

    for without in ((), ["curve"]):
        records = ResultStore(tmp_path).scan(without=without)
        assert [(r.metrics, r.devices, r.flops) for r in records] == [
            ({}, [], None),
            ({"top1": 1.0}, ["cpu"], None),
            ({"top1": 1.0}, ["cpu"], None),
        ]


def test_a_compacted_store_passes_verification_row_by_row(tmp_path, make_record) -> None:
    filled(tmp_path, make_record)
    compact(ResultStore(tmp_path))

    assert [problem for _, _, problem in checked_records(ResultStore(tmp_path))] == [None] * 12


def test_a_superseded_row_is_kept_though_nobody_reads_it(tmp_path, make_record) -> None:
    records = filled(tmp_path, make_record)
    compact(ResultStore(tmp_path))

    [path] = files(tmp_path)
    assert pq.read_table(tmp_path / path)["run_id"].to_pylist() == [record.run_id for record in records]


def test_records_that_come_later_are_read_beside_and_compacted_along(location, make_record) -> None:
    filled(location, make_record)
    compact(ResultStore(location))
    store = ResultStore(location)
    later = make_record(unit_key="u3", test_metric=99.0)
    store.append(later)

    assert store.scan(unit_key="u3")[-1] == later
    assert compact(store) == Compacted(before=2, after=1, rows=13)
    assert dumped([store.scan(unit_key="u3")[-1]]) == dumped([later])
    assert compact(store) == Compacted(0, 0, 0)


def test_an_open_store_goes_on_reading_while_its_files_are_compacted(location, make_record) -> None:
    filled(location, make_record)
    store = ResultStore(location)
    before = dumped(store.scan())
    compact(ResultStore(location))

    assert dumped(store.scan()) == before


def test_files_that_vanish_between_listing_and_reading_are_looked_for_again(tmp_path, make_record, monkeypatch) -> None:
    filled(tmp_path, make_record)
    before = dumped(ResultStore(tmp_path).scan())
    store = ResultStore(tmp_path)
    find = store.files.find

    def then_compacted(prefix: str) -> list[str]:
        found = find(prefix)
        compact(ResultStore(tmp_path))
        return found

    monkeypatch.setattr(store.files, "find", then_compacted)
    assert dumped(store.scan()) == before


@pytest.mark.parametrize("survivors", [0, 1, 7, 12])
def test_killed_at_any_point_nothing_is_lost_and_nothing_counts_twice(tmp_path, make_record, monkeypatch, survivors) -> None:
    filled(tmp_path, make_record)
    store = ResultStore(tmp_path)
    before = dumped(store.scan())
    remove, removed = store.files.remove, []

    def killed(path: str) -> None:
        if len(removed) == survivors:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    monkeypatch.setattr(store.files, "remove", killed)
    if survivors == 12:
        compact(store)
    else:
        with pytest.raises(KeyboardInterrupt):
            compact(store)

    assert dumped(ResultStore(tmp_path).scan()) == before
    compact(ResultStore(tmp_path))
    assert dumped(ResultStore(tmp_path).scan()) == before
    [path] = files(tmp_path)
    assert pq.read_metadata(tmp_path / path).num_rows == 12


def test_nothing_is_deleted_where_what_is_read_back_is_not_what_was_written(tmp_path, make_record, monkeypatch) -> None:
    filled(tmp_path, make_record)
    store = ResultStore(tmp_path)
    before = files(tmp_path)
    create = store.files.create

    def flawed(path: str, data: bytes) -> None:
        table = pq.read_table(pa.BufferReader(data))
        buffer = pa.BufferOutputStream()
        pq.write_table(table.slice(1), buffer)
        create(path, buffer.getvalue().to_pybytes())

    monkeypatch.setattr(store.files, "create", flawed)
    with pytest.raises(RunFailed, match="does not hold what was written to it"):
        compact(store)
    assert set(before) < set(files(tmp_path))


def test_full_files_are_not_written_again(tmp_path, make_record, monkeypatch) -> None:
    monkeypatch.setattr(compaction, "FULL_ROWS", 5)
    filled(tmp_path, make_record)
    before = dumped(ResultStore(tmp_path).scan())
    told: list[tuple[int, int]] = []

    assert compact(ResultStore(tmp_path), lambda *counts: told.append(counts)) == Compacted(before=12, after=3, rows=12)
    assert told == [(5, 12), (10, 12), (12, 12)]
    assert compact(ResultStore(tmp_path)) == Compacted(0, 0, 0)
    assert dumped(ResultStore(tmp_path).scan()) == before


def test_any_rows_are_read_from_whatever_groups_they_are_in(tmp_path, make_record, monkeypatch) -> None:
    monkeypatch.setattr(compaction, "_GROUP_ROWS", 3)
    records = {record.unit_key: record for record in filled(tmp_path, make_record)}
    compact(ResultStore(tmp_path))
    store = ResultStore(tmp_path)

    for key, record in records.items():
        assert dumped([store.scan(unit_key=key)[-1]]) == dumped([record])
    wanted = [record for record in records.values() if record.label == "m1"]
    assert {record.run_id for record in store.scan(label="m1", without=["curve"])} == {record.run_id for record in wanted}
    assert len(wanted) == 2


def test_a_damaged_compacted_file_is_not_to_be_deleted(tmp_path, make_record, caplog) -> None:
    filled(tmp_path, make_record)
    compact(ResultStore(tmp_path))
    [path] = files(tmp_path)
    (tmp_path / path).write_bytes(b"PAR1")

    assert ResultStore(tmp_path).scan() == []
    (line,) = caplog.messages
    assert "restore it from a copy: it holds many records" in line


def test_a_field_that_was_not_read_can_not_be_taken_for_empty(tmp_path, make_record) -> None:
    filled(tmp_path, make_record)
    compact(ResultStore(tmp_path))
    record = ResultStore(tmp_path).scan(without=["curve"])[0]

    assert record.params == {"temperature": 2}
    assert math.isnan(record.metrics["top1"])
    with pytest.raises(AttributeError):
        _ = record.curve


PROTOCOLS, METHODS, SEEDS = 500, 40, 5
SINGLE = 300  # files of one record beside the compacted ones


@pytest.mark.slow
def test_a_hundred_thousand_records_make_the_boards_that_they_should(tmp_path, make_record) -> None:
    expected = large_store(tmp_path, make_record)
    store = ResultStore(tmp_path)
    found = boards(store.scan(without=LONG_FIELDS))

    assert sum(len(row.run_ids) for board in found for row in board.rows) == PROTOCOLS * METHODS * SEEDS
    assert {board.protocol_hash: board.rows[0].label for board in found} == expected

    keys = store.keys()
    assert compact(store) == Compacted(before=SINGLE + 1, after=1, rows=compaction.FULL_ROWS)  # the last of the large files was not full
    assert ResultStore(tmp_path).keys() == keys
    assert boards(ResultStore(tmp_path).scan(protocol_hash="p0", without=LONG_FIELDS)) == [b for b in found if b.protocol_hash == "p0"]


def large_store(folder: Path, make_record: Callable[..., RunRecord]) -> dict[str, str]:
    """PROTOCOLS boards of METHODS methods on SEEDS seeds, nearly all compacted; returns the best method of each board."""
    draw = random.Random(0)
    labels = ["none", "kd", *(f"method {number}" for number in range(METHODS - 2))]
    best = {f"p{number}": draw.choice(labels) for number in range(PROTOCOLS)}
    first = datetime(2030, 1, 1, tzinfo=UTC)
    rows: list[dict[str, Any]] = [
        {
            "run_id": f"{protocol}-{label}-{seed}",
            "unit_key": f"{protocol}-{label}-{seed}",
            "created_at": first,
            "protocol_hash": protocol,
            "label": label,
            "method": label,
            "seed": seed,
            "test_metric": 80.0 + draw.random() + (5.0 if label == best[protocol] else 0.0),
        }
        for protocol in best
        for label in labels
        for seed in range(SEEDS)
    ]
    for number, row in enumerate(rows):
        row["created_at"] += timedelta(seconds=number)
    pattern = make_record(curve=[{"epoch": float(epoch), "val_top1": draw.random()} for epoch in range(30)], config="name: x\n" * 50)
    single, many = rows[:SINGLE], rows[SINGLE:]
    (folder / "v1").mkdir()
    for start in range(0, len(many), compaction.FULL_ROWS):
        part = many[start : start + compaction.FULL_ROWS]
        columns = {
            name: pa.repeat(column[0], len(part)) for name, column in zip(record_schema().names, to_table(pattern).columns, strict=True)
        }
        columns |= {name: pa.array([row[name] for row in part], record_schema().field(name).type) for name in part[0]}
        pq.write_table(pa.table(columns, record_schema()), folder / "v1" / f"compacted-{start:08d}.parquet", compression="zstd")
    store = ResultStore(folder)
    for row in single:
        store.append(pattern.model_copy(update=row))
    return best
