"""What all tests share: one thread a process, no network, no one's own results folder or MLflow server."""

from __future__ import annotations

import gc
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from kdbench.distributed.cluster import quiet
from kdbench.storage.layout import Layout, results_folder
from tests import private_ray
from tests.browser import browser as browser
from tests.browser import chromium as chromium
from tests.console import Kdbench
from tests.making_records import make_record as make_record
from tests.object_storage import ObjectStorage

for _variable in ("KDBENCH_RESULTS", "KDBENCH_DATA", "KDBENCH_WORKING_COPIES", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_PROFILE"):
    os.environ.pop(_variable, None)
quiet()
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's own 15 would let tests that train in this process starve those that train in Ray's
torch.set_num_threads(1)
# A shell starts its background jobs with Ctrl-C ignored, and so would be all processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run, so that a change that broke nothing is never blamed; `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws from the generators that a whole process shares does not depend on the tests that ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the generator that libraries share
    torch.manual_seed(0)


LONGEST = ("test_tune.py", "test_tasks.py", "test_jobs.py", "test_randomness.py")  # with their slow tests, some minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some processes share the tests, a file at a time; the longest files go first, so that neither ends long before the other."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in long, item.path.name not in LONGEST))


def pytest_collection_finish() -> None:
    """What is there now, a million objects of libraries and tests, stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray instance for all tests of a process: starting it is dear."""
    import ray

    private_ray.start()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cluster_token() -> Iterator[None]:
    """The token that nodes show each other. `ray.init` makes one where the user has none; Ray's commands and its `Cluster` ask for one.

    A process reads its token once, so it is that of a Ray which this process may have started before.
    """
    made = Path.home() / ".ray" / "auth_token"
    token = os.environ.get("RAY_AUTH_TOKEN") or (made.read_text().strip() if made.exists() else secrets.token_hex(16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", token)
        yield


@pytest.fixture(scope="session")
def object_storage() -> Iterator[ObjectStorage]:
    """An S3 server of this process."""
    with ObjectStorage() as storage:
        yield storage


@pytest.fixture
def bucket(object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of an empty bucket, and what is in the environment of somebody who uses it."""
    for name, value in object_storage.environment(tmp_path / "copies").items():
        monkeypatch.setenv(name, value)
    return object_storage.new_bucket()


@pytest.fixture
def machine(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Layout]:
    """The layout of the bucket's results on the machine of a name."""

    def on(name: str) -> Layout:
        monkeypatch.setenv("KDBENCH_WORKING_COPIES", str(tmp_path / name))
        return Layout(results_folder(bucket))

    return on


@pytest.fixture
def kdbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Kdbench]:
    """The console script, in an empty working directory. What it changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGTERM)
    yield Kdbench(monkeypatch, capsys)
    signal.signal(signal.SIGTERM, handler)
