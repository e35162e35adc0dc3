"""Several nodes: trainings and searches spread over them, and what it costs when processes and whole nodes are killed.

The nodes are Ray's simulated ones: a raylet each, with processes of its own, on this machine. kdbench can't tell the difference.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from kdbench.benchmark.run import Summary, run
from kdbench.benchmark.watch import Phase, Unwatched
from kdbench.experiment import Experiment, Unit
from kdbench.results.record import RunRecord
from kdbench.results.store import ResultStore
from tests.training.units import saved_teacher

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

TASK = {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200}
RECIPE = {"epochs": 4, "batch_size": 50, "lr": 0.1, "precision": "fp64", "memory_format": "contiguous", "views": None}


class Nodes:
    """A head without CPUs, and nodes of one CPU each."""

    def __init__(self, count: int) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.add(count)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, count: int) -> None:
        for _ in range(count):
            self.cluster.add_node(num_cpus=1, wait=False)
        self.cluster.wait_for_nodes()

    def kill(self, node_id: str) -> None:
        """As if its plug were pulled."""
        (node,) = [node for node in self.cluster.worker_nodes if node.node_id == node_id]
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray

    ray.shutdown()
    nodes = Nodes(3)
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()


class Note(NamedTuple):
    """What `tests.distributed.models:placed` left of a process that trained."""

    node: str
    rank: int
    process: int


class Watch(Unwatched):
    """Remembers what it is told, and does something at the first epoch of a number."""

    def __init__(self, notes: Path, at_epoch: int = 0, then: Callable[[list[Note]], None] | None = None) -> None:
        self.notes, self.at_epoch, self.then = notes, at_epoch, then
        self.said: list[str] = []
        self.ran: list[tuple[Unit, RunRecord]] = []

    def trained(self) -> list[Note]:
        parts = [file.name.split(".") for file in self.notes.iterdir()]
        return [Note(node, int(rank), int(process)) for node, rank, process in parts if node != "here"]

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str) -> None:
        if self.then is not None and metrics["epoch"] >= self.at_epoch:
            self.then, then = None, self.then
            then(self.trained())

    def note(self, text: str) -> None:
        self.said.append(text)

    def finished(self, unit: Unit, record: RunRecord) -> None:
        self.ran.append((unit, record))
