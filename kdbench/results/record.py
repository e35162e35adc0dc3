"""RunRecord v1: one finished training, a row of the store. Parquet holds it; everything printed derives from it."""

from __future__ import annotations

import json
import secrets
import time
from datetime import datetime
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdbench.errors import UserError

SCHEMA_VERSION = 1
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
COLUMN_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


class RunRecord(BaseModel):
    """One finished training. Metrics are in the unit that people print: accuracy and mIoU in percent, times in seconds, latency in ms."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    # identity
    schema_version: int = SCHEMA_VERSION
    run_id: str  # ULID
    unit_key: str  # content hash of what was asked; a second record with the same key supersedes the first
    study_id: str | None = None
    created_at: datetime
    status: Literal["ok", "failed", "stopped"] = "ok"
    failure: str | None = None
    source: Literal["kdbench", "published"] = "kdbench"
    citation: str | None = None
    role: Literal[
        "teacher", "trial", "candidate", "final"
    ]  # trials live in their study, never in the store; a candidate is a winner of the search on a fresh seed

    # protocol
    protocol_hash: str
    experiment: str
    task: str
    task_version: int
    data: str
    data_hash: str
    split_hash: str
    recipe: dict[str, Any]
    global_batch: int
    world_size: int  # workers of one training; of one whose number changed, those at its end
    worker_counts: list[int] | None = None  # how many took part, one number after the other; unknown of older records
    precision: str

    # pair
    teacher: str | None = None
    teacher_sha: str | None = None
    teacher_metric: float | None = None  # test metric of the teacher
    student: str
    student_init: str | None = None

    # method
    method: str
    label: str  # what the board calls it; the method's name unless the experiment says otherwise
    method_version: int
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int
    data_seed: int

    # search
    sampler: str | None = None
    scheduler: str | None = None
    trials: int | None = None
    trials_failed: int | None = None
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
    nll: float | None = None
    ece: float | None = None
    agreement: float | None = None  # share of test samples whose argmax equals the teacher's
    teacher_kl: float | None = None  # mean KL(teacher || student) on the test set, nats
    curve: list[dict[str, float]] = Field(default_factory=list)  # one entry an epoch

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
    """One nullable column a field of RunRecord; dicts and lists are columns of JSON text."""
    return pa.schema([(name, _column_type(field.annotation)) for name, field in RunRecord.model_fields.items()])


def to_table(record: RunRecord) -> pa.Table:
    """The record as a table of one row. JSON columns hold strict JSON: a nan or inf in them is the string "NaN" or "Infinity"."""
    schema = record_schema()
    as_json = json.loads(record.model_dump_json())
    structured = _structured_fields()
    row = {
        name: json.dumps(as_json[name]) if name in structured and as_json[name] is not None else getattr(record, name)
        for name in schema.names
    }
    return pa.Table.from_pylist([row], schema=schema)


def from_table(table: pa.Table, source: str) -> RunRecord:
    """The record in a table of one row; a naive `created_at` was taken for UTC. `source` names the file in errors.

    Raises UserError for a table of a newer schema version, and for one that is no record.
    """
    if table.num_rows != 1 or "schema_version" not in table.column_names:
        raise UserError(
            f"{source} is not a kdbench record: expected one row with a column 'schema_version', got {table.num_rows} rows; move it away"
        )
    row = table.to_pylist()[0]
    if not isinstance(row["schema_version"], int):
        raise UserError(f"{source} is not a kdbench record: its schema version is {row['schema_version']!r}, no number; move it away")
    if row["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"{source} has schema version {row['schema_version']}, this kdbench reads up to {SCHEMA_VERSION}: "
            "update kdbench (pip install -U kdbench)"
        )
    try:
        structured = _structured_fields()
        return RunRecord(**{name: json.loads(value) if name in structured and value is not None else value for name, value in row.items()})
    except (ValidationError, json.JSONDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("JSON",), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{source} is not a record of schema version {row['schema_version']}: {where}: {first['msg']}; move it away"
        ) from error


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
