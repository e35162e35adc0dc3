"""A record survives Parquet, and an unreadable one says so."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from kdbench.errors import UserError
from kdbench.records.record import CHECKSUM, CROCKFORD, RunRecord, from_table, new_run_id, record_schema, row_checksum, to_table


def test_run_ids_sort_by_the_moment_they_were_made() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_run_id() for _ in range(2000)]
    after = time.time_ns() // 1_000_000

    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 26 and set(i) <= set(CROCKFORD) for i in ids)
    milliseconds = sum(CROCKFORD.index(character) * 32**place for place, character in enumerate(reversed(ids[0][:10])))
    assert before <= milliseconds <= after


def test_columns_have_the_types_of_the_fields() -> None:
    schema = record_schema()

    assert schema.names == [*RunRecord.model_fields, CHECKSUM]
    wanted = {"run_id": pa.string(), "status": pa.string(), "seed": pa.int64(), "teacher_metric": pa.float64(), "git_dirty": pa.bool_()}
    assert {name: schema.field(name).type for name in wanted} == wanted
    assert schema.field("created_at").type == pa.timestamp("us", tz="UTC")
    assert {schema.field(name).type for name in ("recipe", "params", "curve", "metrics", "devices", "space")} == {pa.string()}


def test_a_record_comes_back_equal(make_record) -> None:
    record = make_record(
        params={"temperature": 2.5, "taps": ["stage:-1"], "nested": {"on": True}},
        curve=[{"epoch": 1.0, "loss": 0.1 + 0.2}],
        metrics={"top1": 90.0},
        flops=2**40,
        git_dirty=False,
        devices=["cpu"],
        config="name: ü\n",
    )

    assert from_table(to_table(record), "here") == record


def test_json_columns_are_strict_json_and_keep_nan_and_inf(make_record) -> None:
    table = to_table(make_record(metrics={"a": math.nan, "b": math.inf}, curve=[{"loss": -math.inf}], val_metric=math.nan))

    assert table["metrics"][0].as_py() == '{"a": "NaN", "b": "Infinity"}'
    back = from_table(table, "here")
    assert math.isnan(back.metrics["a"])
    assert back.metrics["b"] == math.inf
    assert back.curve == [{"loss": -math.inf}]
    assert back.val_metric is not None
    assert math.isnan(back.val_metric)


def test_a_naive_time_is_taken_for_utc(make_record) -> None:
    back = from_table(to_table(make_record(created_at=datetime(2030, 5, 1, 12))), "here")

    assert back.created_at.isoformat() == "2030-05-01T12:00:00+00:00"


def test_a_newer_schema_asks_for_an_update_and_names_the_file(make_record) -> None:
    table = to_table(make_record(schema_version=2)).append_column("new_field", pa.array([1]))

    with pytest.raises(UserError, match=r"v1/x\.parquet has schema version 2.*update kdbench"):
        from_table(table, "v1/x.parquet")


def test_a_record_without_a_later_optional_column_takes_its_default(make_record) -> None:
    record = make_record()

    assert from_table(to_table(record).drop_columns(["artifacts_uri"]), "here") == record


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"a": [1, 2]}), "not a kdbench record"),
        (pa.table({"schema_version": [1], "run_id": ["x"]}), "unit_key"),
    ],
)
def test_a_table_that_is_no_record_is_named(table, words) -> None:
    with pytest.raises(UserError, match=f"strange.parquet.*{words}"):
        from_table(table, "strange.parquet")


def test_broken_json_in_a_column_is_named(make_record) -> None:
    table = to_table(make_record())
    at = table.column_names.index("recipe")

    with pytest.raises(UserError, match=r"x\.parquet.*JSON"):
        from_table(table.set_column(at, "recipe", pa.array(["{"])), "x.parquet")


def test_a_row_has_a_checksum_that_any_change_of_it_breaks(make_record) -> None:
    table = to_table(make_record(metrics={"top1": math.nan}, created_at=datetime(2030, 5, 1, 12, 0, 0, 123456)))
    [row] = table.to_pylist()

    assert row[CHECKSUM] == row_checksum(row)
    assert row_checksum({**row, "a_column_of_later_versions": None}) == row[CHECKSUM]
    changed = {"test_metric": 90.00000001, "seed": 1, "created_at": datetime(2030, 5, 1, 12, tzinfo=UTC), "failure": "", "params": "{}  "}
    assert all(row_checksum({**row, name: value}) != row[CHECKSUM] for name, value in changed.items())


def test_a_record_without_a_checksum_is_read(make_record) -> None:
    record = make_record()

    assert from_table(to_table(record).drop_columns([CHECKSUM]), "here") == record


def test_rows_of_older_versions_are_migrated_step_by_step_when_they_are_read(make_record, monkeypatch) -> None:
    """As if version -1 had called the label `name`, and version 0 had kept the recipe's rate in a column of its own."""

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in row.items() if name != "name"}, "label": row["name"], "schema_version": 0}

    def gathered(row: dict[str, Any]) -> dict[str, Any]:
        recipe = json.loads(row["recipe"]) | {"lr": row["lr"]}
        return {**{name: value for name, value in row.items() if name != "lr"}, "recipe": json.dumps(recipe), "schema_version": 1}

    record = make_record(recipe={"epochs": 5, "lr": 0.1})
    [row] = to_table(record).drop_columns([CHECKSUM]).to_pylist()
    newer = {**row, "recipe": '{"epochs": 5}', "lr": 0.1, "schema_version": 0}
    oldest = {name: value for name, value in newer.items() if name != "label"} | {"name": row["label"], "schema_version": -1}
    monkeypatch.setattr("kdbench.records.record.MIGRATIONS", {-1: renamed, 0: gathered})

    assert [from_table(pa.Table.from_pylist([old]), "here") for old in (oldest, newer)] == [record, record]


def test_a_version_that_nothing_leads_from_is_named(make_record) -> None:
    with pytest.raises(UserError, match=r"v1/x\.parquet has schema version 0, which this kdbench can't read any more"):
        from_table(to_table(make_record(schema_version=0)), "v1/x.parquet")
