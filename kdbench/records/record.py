"""RunRecord v1: one finished training, a row of the store. Parquet holds it; everything printed derives from it."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, lru_cache
from types import NoneType
from typing import Any, Literal, get_args

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kdbench.bounded import parse_json
from kdbench.errors import UserError, in_one_line

SCHEMA_VERSION = 1
# From the version that a row has to the next: a function that gets the row, its JSON columns as text, and returns it as the next version
# has it, `schema_version` included. Rows are migrated when they are read; files stay as they were written.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
CHECKSUM = "record_sha256"  # the column beside the record's own
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
COLUMN_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}

_PLAIN_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_timestamp,
    pa.types.is_null,
)


class NewerRecord(UserError):
    """A record of a schema version that only a newer kdbench can read. Nothing is wrong with it."""


class RunRecord(BaseModel):
    """One finished training. Metrics are in the unit that people print: accuracy and mIoU in percent, times in seconds, latency in ms."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    # identity
    schema_version: int = SCHEMA_VERSION
    run_id: str  # ULID
    unit_key: str  # content hash of the training; a second record with the same key and the same test part supersedes the first
    supersedes: str | None = None  # the run that this row stands for, under another unit_key
    study_id: str | None = None
    created_at: datetime
    status: Literal["ok", "failed", "stopped"] = "ok"
    failure: str | None = None
    source: Literal["kdbench", "published"] = "kdbench"
    citation: str | None = None
    role: Literal[
        "teacher", "trial", "candidate", "final"
    ]  # trials live in their study, never in the store; a candidate is a winner of the search on a fresh seed

    lease: int | None = None  # number of the lease under which it was written; none in a folder, where a lock keeps drivers apart

    # protocol
    protocol_hash: str  # of what a board shares, the test part included
    experiment: str
    task: str
    task_version: int
    data: str
    data_hash: str
    split_hash: str
    learned_hash: str | None = None  # content of train, transfer and val: what decided the training
    near_duplicates: int | None = None  # test samples that training samples nearly equal, see `data.near_duplicates`; null where unknown
    test_hash: str | None = None  # content of the test part that was measured on; null where none was
    recipe: dict[str, Any]
    global_batch: int
    world_size: int  # workers of one training; of one whose number changed, those at its end
    worker_counts: list[int] | None = None  # how many took part, one number after the other; unknown of older records
    precision: str

    # pair
    teacher: str | None = None
    teacher_sha: str | None = None  # SHA-256 of its weights' file
    teacher_state: str | None = None  # of its tensors as loaded, whatever the kind of file
    teacher_id: str | None = None  # of all that decides its outputs: tensors, model options, precision and memory format
    teacher_metric: float | None = None  # test metric of the teacher
    student: str
    student_init: str | None = None  # content of the weights that it began with; null where they were drawn

    # method
    method: str
    label: str  # what the board calls it; the method's name unless the experiment says otherwise
    method_version: int
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int
    data_seed: int
    plan: dict[str, Any] | None = None  # of a final: how many its board was meant to have, see `records.plan`; unknown of older records

    # search
    # Of a final that is no row of its board: at its method's published default, or `none` for as long as a method took in all.
    beside: Literal["default", "cost"] | None = None
    beside_of: str | None = None  # the label of the row that such a final is compared with
    search_number: int | None = None  # where each method is searched several times, which search its parameters are from, from 0 on
    sampler: str | None = None
    scheduler: str | None = None
    trials: int | None = None
    trials_failed: int | None = None
    search_budget: dict[str, float] | None = None  # `device_hours` or `epochs` of one search; null where the number of trials was given
    epochs_spent: float | None = None  # of all trials and candidates of this method
    search_device_hours: float | None = None
    space: dict[str, Any] | None = None
    search_hash: str | None = None

    # quality
    primary: str
    higher_is_better: bool = True
    val_metric: float | None = None
    test_metric: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    # Of the primary metric on this test part: `step`, the smallest difference it can show, bounds `low` and `high`, and `smallest_gap`.
    primary_scale: dict[str, float] | None = None
    # Where the primary metric is the share of samples that are predicted right: a bit for each test sample, see `records.bits`.
    samples_right: str | None = None
    chance_metric: float | None = None  # the primary metric up to which a network is no better than chance on the test set
    nll: float | None = None
    ece: float | None = None
    agreement: float | None = None  # share of test samples whose argmax equals the teacher's
    teacher_kl: float | None = None  # mean KL(teacher || student) on the test set, nats
    curve: list[dict[str, float]] = Field(default_factory=list)  # one entry an epoch
    stages: dict[str, int] | None = None  # epochs of each stage of the training, one after the other; null where it had one

    # cost
    params_count: int | None = None
    flops: int | None = None  # of one forward pass of one image, a multiply-add counted as two
    latency_ms_p50: float | None = None
    latency_ms_p95: float | None = None
    latency_device: str | None = None
    latency_batch: int | None = None
    train_seconds: float | None = None
    device_hours: float | None = None
    peak_memory_mb: float | None = None
    samples_per_second: float | None = None
    adapter_params: int | None = None

    # environment
    code: dict[str, str] | None = None  # the user's own modules that took part, each with a hash of its code
    git_commit: str | None = None
    git_dirty: bool | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    devices: list[str] = Field(default_factory=list)
    host_hash: str | None = None
    config: str | None = None  # the experiment as YAML
    mlflow_run_id: str | None = None
    artifacts_uri: str | None = None
    predictions_uri: str | None = None  # relative to the results folder
    predictions_sha256: str | None = None


def new_run_id() -> str:
    """A ULID (26 Crockford characters) that sorts by the moment it was made.

    48 bits of Unix milliseconds as the ULID specification asks, then 20 bits of nanoseconds, so that ids of one process sort
    within a millisecond too, then 60 random bits.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    number = milliseconds << 80 | nanoseconds << 60 | secrets.randbits(60)
    return "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def record_schema() -> pa.Schema:
    """One nullable column a field of RunRecord, and the checksum of the row; dicts and lists are columns of JSON text."""
    fields = [(name, _column_type(field.annotation)) for name, field in RunRecord.model_fields.items()]
    return pa.schema([*fields, (CHECKSUM, pa.string())])


def to_table(record: RunRecord) -> pa.Table:
    """The record as a table of one row. JSON columns hold strict JSON: a nan or inf in them is the string "NaN" or "Infinity"."""
    schema = record_schema()
    as_json = json.loads(record.model_dump_json())
    structured = _structured_fields()
    row = {
        name: json.dumps(as_json[name]) if name in structured and as_json[name] is not None else getattr(record, name)
        for name in RunRecord.model_fields
    }
    [stored] = pa.Table.from_pylist([row], schema=schema).to_pylist()  # a time, say, as it will be read back
    return pa.Table.from_pylist([{**row, CHECKSUM: row_checksum(stored)}], schema=schema)


def row_checksum(row: Mapping[str, Any]) -> str:
    """The SHA-256 of a row as `Table.to_pylist` gives it, but for its checksum and for columns that are null.

    It stands in the row, so it finds what was damaged, or edited by hand. It does not stop anyone who computes it again.
    """
    content = {name: value for name, value in row.items() if value is not None and name != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=datetime.isoformat).encode()).hexdigest()


def from_table(table: pa.Table, source: str) -> RunRecord:
    """The record in a table of one row; a naive `created_at` was taken for UTC. `source` names the file in errors.

    Raises NewerRecord for a table of a newer schema version, UserError for one that is no record.
    """
    if table.num_rows != 1 or "schema_version" not in table.column_names:
        raise UserError(
            f"{source} is not a kdbench record: expected one row with a column 'schema_version', got {table.num_rows} rows; move it away"
        )
    return _record(plain_rows(table, source)[0], source)


def plain_rows(table: pa.Table, source: str) -> list[dict[str, Any]]:
    """The rows of a table of records as Python values.

    Raises UserError for a column of a type that no record has, and for a value that Python has no like of: a year of 300,000, or bytes
    that are no text.
    """
    for field in table.schema:
        if not any(fits(field.type) for fits in _PLAIN_TYPES):
            raise UserError(f"{source} is not a kdbench record: its column {field.name!r} is of the type {field.type}; move it away")
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise UserError(f"{source} is not a kdbench record: {in_one_line(error)}; move it away") from error
    return rows


def all_from_table(table: pa.Table, source: str) -> list[RunRecord]:
    """The records in a table of any number of rows, as `from_table` reads and refuses them."""
    if "schema_version" not in table.column_names:
        raise UserError(f"{source} holds no kdbench records: expected a column 'schema_version'; move it away")
    return [_record(row, source) for row in plain_rows(table, source)]


def partly_from_table(table: pa.Table) -> list[RunRecord]:
    """Records that have the columns of the table and no other fields, from rows that were whole records: reading 100,000 takes seconds.

    Asking such a record for a field that it was read without is an AttributeError.

    Raises ValueError for a row that can't have been a whole record: a field is missing, or Python has no like of its value.
    """
    names = [name for name in table.column_names if name in RunRecord.model_fields]
    columns = [_values(name, table[name].to_pylist()) for name in names]
    read = set(names)  # one for all: seventy names in a set are more than all else of a record
    return [_unchecked(dict(zip(names, values, strict=True)), read) for values in zip(*columns, strict=True)]


def _values(name: str, column: list[Any]) -> list[Any]:
    """A column as the field has it. Null, as where a file is older than the field, is the field's default."""
    if name in _structured_fields():
        column = [None if text is None else _structure(name, text) for text in column]
    field = RunRecord.model_fields[name]
    if field.is_required() and None in column:
        raise ValueError(f"a row has no {name}")
    default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
    return column if default is None else [default if value is None else value for value in column]


def _unchecked(fields: dict[str, Any], names: set[str]) -> RunRecord:
    """As `model_construct`, which takes ten times as long and fills in the defaults of fields that were not read."""
    record = RunRecord.__new__(RunRecord)
    for name, value in (("__dict__", fields), ("__pydantic_fields_set__", names), ("__pydantic_extra__", None)):
        object.__setattr__(record, name, value)
    object.__setattr__(record, "__pydantic_private__", None)
    return record


@lru_cache(maxsize=4096)
def _structure(name: str, text: str) -> Any:
    """A JSON column's value. Many records have the same; nobody writes into a record."""
    return _adapter(name).validate_json(text)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    kind: Any = RunRecord.model_fields[name].annotation
    return TypeAdapter(kind)


def _record(row: dict[str, Any], source: str) -> RunRecord:
    if not isinstance(row["schema_version"], int):
        raise UserError(f"{source} is not a kdbench record: its schema version is {row['schema_version']!r}, no number; move it away")
    if row["schema_version"] > SCHEMA_VERSION:
        raise NewerRecord(
            f"{source} has schema version {row['schema_version']}, this kdbench reads up to {SCHEMA_VERSION}: "
            "update kdbench (pip install -U kdbench)"
        )
    row = _migrated({name: value for name, value in row.items() if name != CHECKSUM and value is not None}, source)  # null: the default
    try:
        structured = _structured_fields()
        return RunRecord(**{name: parse_json(value) if name in structured else value for name, value in row.items()})
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        # Of JSON: no JSON, a number of thousands of digits, nested thousands deep, or no text at all.
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("JSON",), "msg": in_one_line(error)}
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{source} is not a record of schema version {row['schema_version']}: {where}: {first['msg']}; move it away"
        ) from error


def _migrated(row: dict[str, Any], source: str) -> dict[str, Any]:
    """The row as this version of the schema has it. Raises UserError where there is no way from its own."""
    while (version := row["schema_version"]) < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise UserError(f"{source} has schema version {version}, which this kdbench can't read any more; it writes {SCHEMA_VERSION}")
        row = MIGRATIONS[version](row)
    return row


@cache
def _structured_fields() -> frozenset[str]:
    return frozenset(name for name, field in RunRecord.model_fields.items() if _scalar(field.annotation) not in COLUMN_TYPES)


def _column_type(annotation: Any) -> pa.DataType:
    return COLUMN_TYPES.get(_scalar(annotation), pa.string())


def _scalar(annotation: Any) -> Any:
    """`float` for `float | None`, `str` for a Literal of strings, the annotation itself for dicts and lists."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    if all(isinstance(option, str) for option in options) and options:
        return str
    if NoneType in get_args(annotation) and len(options) == 1:
        return options[0]
    return annotation
