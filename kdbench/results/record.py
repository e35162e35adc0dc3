"""RunRecord v1: one finished training, a row of the store. Parquet holds it; everything printed derives from it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class RunRecord(BaseModel):
    """One finished training. Metrics are in the unit that people print: accuracy and mIoU in percent, times in seconds, latency in ms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    role: Literal["teacher", "candidate", "final"]  # candidate: a tuned setting trained again on a fresh seed, judged on validation

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
    world_size: int
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
