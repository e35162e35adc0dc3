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

from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Phase, Unwatched
from kdbench.experiment import Experiment, Unit
from kdbench.results.record import RunRecord
from kdbench.results.store import ResultStore
from tests.training.units import TEACHER, saved_teacher

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
    """Remembers what it is told, and does something once, when something happens."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        notes.mkdir()
        self.said: list[str] = []
        self.ran: list[tuple[Unit, RunRecord]] = []
        self.at_epoch: dict[int, Callable[[list[Note]], None]] = {}
        self.in_cache: Callable[[], None] | None = None

    def trained(self) -> list[Note]:
        parts = [file.name.split(".") for file in self.notes.iterdir()]
        return [Note(node, int(rank), int(process)) for node, rank, process in parts if node != "here"]

    def progress(self, phase: Phase, done: int, total: int) -> None:
        if phase == "cache" and 0 < done < total and self.in_cache is not None:
            self.in_cache, now = None, self.in_cache
            now()

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str) -> None:
        if unit.role != "teacher" and (then := self.at_epoch.pop(int(metrics["epoch"]), None)) is not None:
            then(self.trained())

    def note(self, text: str) -> None:
        self.said.append(text)

    def finished(self, unit: Unit, record: RunRecord) -> None:
        self.ran.append((unit, record))


def student(watch: Watch) -> dict[str, Any]:
    return {"name": "tests.distributed.models:placed", "notes": str(watch.notes), "pause": 0.1, "label": "placed"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (record,) = ResultStore(folder).scan(role="final")
    return load_file(folder / (record.artifacts_uri or ""))


def test_a_training_on_three_nodes_survives_a_killed_worker_and_goes_on_with_two_when_a_node_is_lost(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(tmp_path / "notes")
    parts = {
        "name": "elastic",
        "task": TASK,
        "teacher": {"model": TEACHER, "weights": str(saved_teacher(tmp_path, "fp64").weights)},
        "students": [student(watch)],
        "methods": ["rkd"],  # it looks across samples, so each worker has to see the joined batch
        "recipe": RECIPE | {"epochs": 5},
        "seeds": 1,
    }
    runtime = {"workers": {"min": 1, "max": 3}, "placement": "spread", "checkpoint_seconds": 0, "address": nodes.address}
    first: list[Note] = []

    def kill_a_worker(trained: list[Note]) -> None:
        first.extend(trained)
        os.kill(next(note.process for note in trained if note.rank == 1), signal.SIGKILL)

    def kill_a_node(trained: list[Note]) -> None:
        assert {note.rank for note in set(trained) - set(first)} == {0, 1, 2}
        nodes.kill(next(note.node for note in set(trained) - set(first) if note.rank == 0))

    watch.at_epoch = {1: kill_a_worker, 3: kill_a_node}
    summary = run(Experiment.model_validate(parts | {"runtime": runtime}), tmp_path / "three", watch)
    assert summary.failures == ()
    assert len({note.node for note in first}) == 3
    assert [message for message in caplog.messages if "died" in message] == [
        "rkd seed 0: its process died; another one goes on with it"
    ] * 2
    places = [text for text in watch.said if "goes on from" in text]
    assert len(places) == 2
    assert places[0].startswith("rkd seed 0: goes on from epoch 2 of 5")
    assert places[1].startswith("rkd seed 0: goes on from epoch 4 of 5")
    assert places[1].endswith(", with 2 workers instead of 3")
    assert capfd.readouterr() == ("", "")

    alone = Watch(tmp_path / "alone-notes")
    parts["students"] = [student(alone)]
    run(Experiment.model_validate(parts), tmp_path / "alone", alone)
    (one,), (several,) = (ResultStore(tmp_path / name).scan(role="final") for name in ("alone", "three"))
    assert (several.worker_counts, several.world_size, one.worker_counts) == ([3, 2], 2, [1])
    assert several.metrics == pytest.approx(one.metrics)
    assert [row["epoch"] for row in several.curve] == [1, 2, 3, 4, 5]
    assert [row["train_total"] for row in several.curve] == pytest.approx([row["train_total"] for row in one.curve])
    expected = weights_of(tmp_path / "alone")
    for name, found in weights_of(tmp_path / "three").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-11)
