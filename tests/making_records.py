"""Records to build boards and stores from: a fixture for all tests."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kdbench.records.record import RunRecord, new_run_id

START = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    """A final record of kd, seed 0, an hour later than the one before; any field can be given."""
    made = 0

    def make(**fields: Any) -> RunRecord:
        nonlocal made
        made += 1
        method = fields.setdefault("method", "kd")
        given = {
            "run_id": new_run_id(),
            "unit_key": f"unit-{made}",
            "created_at": START + timedelta(hours=made),
            "role": "final",
            "protocol_hash": "p1",
            "experiment": "quick",
            "task": "classification",
            "task_version": 1,
            "data": "fashion_mnist",
            "data_hash": "d1",
            "split_hash": "s1",
            "recipe": {"epochs": 5, "lr": 0.1},
            "global_batch": 128,
            "world_size": 1,
            "precision": "bf16",
            "teacher": "cifar_resnet56",
            "teacher_metric": 94.0,
            "student": "cifar_resnet8",
            "label": method,
            "method_version": 1,
            "seed": 0,
            "data_seed": 0,
            "primary": "top1",
            "test_metric": 90.0,
        }
        return RunRecord(**{**given, **fields})

    return make
