"""What all tests share: one thread a process, no network, no one's own results folder or MLflow server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kdbench.distributed.cluster import quiet

for _variable in ("KDBENCH_RESULTS", "KDBENCH_DATA", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(_variable, None)
quiet()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray instance for the whole test session: starting it is dear."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        resources={"trial_slot": 1},
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
