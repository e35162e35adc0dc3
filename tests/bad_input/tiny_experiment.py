"""An experiment that is trained in a moment, changed and run as a user would, and what has to be true of how it ends."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from kdbench.records.store import ResultStore
from tests.console import Ended, Kdbench

TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200},
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}, "recipe": {"lr": 0.1}},
    "students": [{"name": "tiny_cnn", "width": 4}],
    "methods": ["none", "kd"],
    "recipe": {"epochs": 1, "batch_size": 100, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 1,
}


# Trained in a moment, where a test has to run it many times.
TINIER = {"task": {"name": "classification", "data": {"name": "shapes", "train": 120, "test": 20, "target": "class"}, "val_size": 20}}


def write(changes: dict[str, Any], name: str = "tiny.yaml") -> str:
    """TINY with the dotted keys changed, as a file in the working directory; None takes a key away."""
    experiment: dict[str, Any] = deepcopy(TINY)
    for key, value in changes.items():
        *path, last = key.split(".")
        place = experiment
        for part in path:
            place = place.setdefault(part, {})
        if value is None:
            del place[last]
        else:
            place[last] = deepcopy(value)  # a later key may change a part of it
    Path(name).write_text(yaml.safe_dump(experiment))
    return name


def run(kdbench: Kdbench, changes: dict[str, Any] | None = None, *arguments: object) -> Ended:
    return kdbench("run", write(changes or {}), "--results", "results", "--no-mlflow", *arguments)


def results() -> list[str]:
    """Titles of the whole results in the working directory's results folder, and a check that there is nothing half-written beside them."""
    scraps = [path for path in Path("results").rglob("*") if ".tmp" in path.name]
    assert scraps == []
    for path in Path("results/v1").rglob("*.parquet"):
        pq.read_table(path)
    return sorted(f"{r.role} {r.label} {r.status}" for r in ResultStore("results").scan())


WHOLE = ["final kd ok", "final none ok", "teacher teacher ok"]


def assert_mistake(ended: Ended, *said: str) -> None:
    """One line, exit code 2, every part of `said` in it, and no result on disk."""
    assert_one_line(ended, 2, *said)
    assert results() == []


def assert_one_line(ended: Ended, code: int, *said: str) -> None:
    assert ended.code == code, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("kdbench: ")
    for part in said:
        assert part in ended.err
