"""Several nodes: trainings and searches spread over them, and what it costs when processes and whole nodes are killed.

The nodes are Ray's simulated ones: a raylet each, with processes of its own, on this machine. kdbench can't tell the difference.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from kdbench.benchmark import emptying
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Phase, Unwatched
from kdbench.deploy.verification import verify
from kdbench.experiment import Experiment, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from tests import private_ray
from tests.each_task import EACH_TASK
from tests.listening import descendants
from tests.training.units import TEACHER, saved_teacher

pytestmark = [pytest.mark.nodes, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
TASK = {"name": "classification", "data": "fashion_mnist", "transfer_size": 200, "val_size": 200}
RECIPE = {"epochs": 4, "batch_size": 50, "lr": 0.1, "precision": "fp64", "memory_format": "contiguous", "compile": False, "views": None}


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

    def kill(self, node_id: str | None = None) -> None:
        """As if a node's plug were pulled, any node's if none is named."""
        node = next(node for node in self.cluster.worker_nodes if node_id in (None, node.node_id))
        self.cluster.remove_node(node, allow_graceful=False)

    def signal(self, node_id: str, number: signal.Signals) -> None:
        """Send it to all processes of a node."""
        node = next(node for node in self.cluster.worker_nodes if node.node_id == node_id)
        for started in node.all_processes.values():
            for one in started:
                for pid in (one.process.pid, *descendants(one.process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)

    def kill_head(self) -> None:
        for started in self.cluster.head_node.all_processes.values():
            for one in started:
                os.kill(one.process.pid, signal.SIGKILL)


@pytest.fixture
def nodes(cluster_token: None) -> Iterator[Nodes]:
    """Three nodes of one test alone: what a test kills, the head too, no other test goes without."""
    import ray

    others = ray.is_initialized()  # those of another file, of which a process can have one only
    ray.shutdown()
    nodes = Nodes(3)
    yield nodes
    ray.shutdown()
    nodes.cluster.shutdown()
    if others:
        private_ray.start()


class Note(NamedTuple):
    """What `tests.distributed.models:placed` left of a process that trained."""

    node: str
    rank: int
    process: int


class Watch(Unwatched):
    """Remembers what it is told, and does something once, when something happens."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        notes.mkdir(exist_ok=True)
        self.said: list[str] = []
        self.ran: list[tuple[Unit, RunRecord]] = []
        self.at_epoch: dict[int, Callable[[list[Note]], None]] = {}
        self.in_cache: Callable[[bool], None] = lambda done: None
        self.at_note: Callable[[str], None] = lambda text: None

    def trained(self) -> list[Note]:
        parts = [file.name.split(".") for file in self.notes.iterdir()]
        return [Note(node, int(rank), int(process)) for node, rank, process in parts if node != "here"]

    def progress(self, phase: Phase, done: int, total: int) -> None:
        if phase == "cache" and done:
            self.in_cache(done == total)

    def epoch(self, unit: Unit, metrics: Mapping[str, float], primary: str) -> None:
        if unit.role != "teacher" and (then := self.at_epoch.pop(int(metrics["epoch"]), None)) is not None:
            then(self.trained())

    def note(self, text: str) -> None:
        self.said.append(text)
        self.at_note(text)

    def finished(self, unit: Unit, record: RunRecord) -> None:
        self.ran.append((unit, record))


def student(watch: Watch) -> dict[str, Any]:
    return {"name": "tests.distributed.models:placed", "notes": str(watch.notes), "pause": 0.1, "label": "placed"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (record,) = ResultStore(folder).scan(role="final")
    return load_file(folder / (record.artifacts_uri or ""))


def test_a_training_on_three_nodes_survives_a_killed_worker_and_goes_on_with_two_when_a_node_is_lost_and_three_when_one_joins(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(tmp_path / "notes")
    parts = {
        "name": "elastic",
        "task": TASK,
        "teacher": {"model": TEACHER, "weights": str(saved_teacher(tmp_path, "fp64").weights)},
        "students": [student(watch)],
        "methods": ["rkd"],  # it looks across samples, so each worker has to see the joined batch
        "recipe": RECIPE | {"epochs": 15},
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

    def add_a_node(trained: list[Note]) -> None:
        watch.notes.with_suffix(".hold").write_text(str(3 + 3 + 2 + 3))  # the two are not done before three begin again
        nodes.add(1)

    def when_two_have_ended_an_epoch(text: str) -> None:  # before that, nothing is stored of their having trained
        if text.endswith("with 2 workers instead of 3"):
            watch.at_epoch[int(text.split(" of 15")[0].split()[-1])] = add_a_node

    watch.at_epoch, watch.at_note = {1: kill_a_worker, 3: kill_a_node}, when_two_have_ended_an_epoch
    summary = run(Experiment.model_validate(parts | {"runtime": runtime}), tmp_path / "three", watch)
    assert summary.failures == ()
    assert len({note.node for note in first}) == 3
    assert [message for message in caplog.messages if "died" in message] == [
        "rkd seed 0: its process died; another one goes on with it"
    ] * 2
    places = [text for text in watch.said if "goes on from" in text]
    for place, said in zip(
        places, (r"\d+ of 15.*", r"\d+ of 15.*, with 2 workers instead of 3", r"\d+ of 15.*, with 3 workers instead of 2"), strict=True
    ):
        assert re.fullmatch(f"rkd seed 0: goes on from epoch {said}", place)
    assert capfd.readouterr() == ("", "")

    alone = Watch(tmp_path / "alone-notes")
    parts["students"] = [student(alone)]
    run(Experiment.model_validate(parts), tmp_path / "alone", alone)
    (one,), (several,) = (ResultStore(tmp_path / name).scan(role="final") for name in ("alone", "three"))
    assert (several.worker_counts, several.world_size, one.worker_counts) == ([3, 2, 3], 3, [1])
    assert several.metrics == pytest.approx(one.metrics)
    assert [row["epoch"] for row in several.curve] == [*range(1, 16)]
    assert [row["train_total"] for row in several.curve] == pytest.approx([row["train_total"] for row in one.curve])
    expected = weights_of(tmp_path / "alone")
    for name, found in weights_of(tmp_path / "three").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-11)


# --- searches --------------------------------------------------------------------------------------------------------


PLACED = {  # each task's network that leaves notes
    "classification": "placed",
    "segmentation": "placed_pixels",
    "detection": "placed_detector",
    "instance_masks": "placed_masks",
    "multi_label": "placed_answers",
    "image_text": "placed_pairs",
}


def search(folder: Path, watch: Watch, of: str = "classification", **runtime: Any) -> dict[str, Any]:
    """Six trials on a task, a teacher whose outputs are cached, one final."""
    weights, tiny = folder / "teacher.safetensors", EACH_TASK[of]
    task, teacher, recipe = (TASK, TEACHER, RECIPE) if of == "classification" else (tiny.task, tiny.teacher, RECIPE | {"batch_size": 9})
    found = str(weights if weights.exists() else saved_teacher(folder, model=teacher, of_task=task).weights)
    return {
        "name": "search",
        "task": task,
        "teacher": {"model": teacher, "weights": found},
        "students": [student(watch) | {"name": f"tests.distributed.models:{PLACED[of]}"}],
        "methods": ["kd"],
        "recipe": recipe | {"precision": "fp32", "views": 1},
        "search": {"trials": 6, "sampler": "random", "scheduler": "none", "top_k": 1, "also": {"recipe.lr": {"low": 0.01, "high": 0.3}}},
        "seeds": 1,
        "runtime": {"checkpoint_seconds": 0} | runtime,
    }


def trials_of(results: Path) -> list[tuple[int, dict[str, Any], float | None, str]]:
    (journal,) = (results / "studies").glob("*.journal")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    trials = optuna.load_study(study_name=None, storage=storage).trials
    return [(trial.number, trial.params, trial.value, trial.state.name) for trial in trials]


def records_of(results: Path) -> list[tuple[Any, ...]]:
    records = sorted(ResultStore(results).scan(), key=lambda record: record.unit_key)
    return [(r.unit_key, r.role, r.params, r.metrics, r.val_metric, r.agreement, r.recipe, r.trials, r.status) for r in records]


class Searched(NamedTuple):
    task: str
    folder: Path
    watch: Watch

    @property
    def results(self) -> Path:
        return self.folder / "one"


@pytest.fixture(scope="module", params=["classification"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The search in one process, without Ray and without a fault."""
    folder = tmp_path_factory.mktemp("search")
    searched = Searched(request.param, folder, Watch(folder / "notes"))
    with pytest.MonkeyPatch.context() as here:
        here.setattr(emptying, "needs_ray", lambda *_: False)
        run(Experiment.model_validate(search(folder, searched.watch, searched.task)), searched.results, searched.watch)
    return searched


@pytest.mark.parametrize("undisturbed", EACH_TASK, indirect=True)
def test_a_search_uses_all_nodes_and_loses_nothing_when_two_of_them_are_lost(
    nodes: Nodes, undisturbed: Searched, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(undisturbed.folder / "notes")
    before = set(watch.trained())
    lost: list[str] = []

    def in_cache(done: bool) -> None:
        if not lost:
            lost.append("in cache")
            nodes.kill()  # one that holds a process which writes the teacher's outputs
        if done:
            nodes.add(3 - len(nodes.cluster.worker_nodes))

    def kill_a_trial(trained: list[Note]) -> None:
        nodes.kill((set(trained) - before).pop().node)

    watch.in_cache, watch.at_epoch = in_cache, {2: kill_a_trial}
    nodes.add(3 - len(nodes.cluster.worker_nodes))
    of = Experiment.model_validate(search(undisturbed.folder, watch, undisturbed.task, address=nodes.address))
    assert run(of, undisturbed.folder / "three", watch).failures == ()
    assert len({note.node for note in set(watch.trained()) - before}) == 3
    assert [message.split(":")[1] for message in caplog.messages] == [" its process died; another one goes on with it"]
    assert len([text for text in watch.said if "goes on from epoch" in text]) == 1
    assert trials_of(undisturbed.folder / "three") == trials_of(undisturbed.results)
    assert records_of(undisturbed.folder / "three") == records_of(undisturbed.results)
    ran = [unit.title for unit, _ in watch.ran if unit.role != "teacher"]
    assert sorted(ran) == ["kd seed 0", *(f"kd trial {number}" for number in range(6))]


def test_a_node_that_is_stopped_until_it_is_given_up_and_goes_on_then_changes_nothing(
    nodes: Nodes, undisturbed: Searched, caplog: pytest.LogCaptureFixture
) -> None:
    """Its trainings are in two processes then, until Ray ends those of the node that it gave up."""
    watch, results = Watch(undisturbed.folder / "notes"), undisturbed.folder / "stopped"
    before = set(watch.trained())
    stopped: list[str] = []

    def stop_a_trial(trained: list[Note]) -> None:
        stopped.append((set(trained) - before).pop().node)
        nodes.signal(stopped[0], signal.SIGSTOP)

    def go_on(text: str) -> None:
        if "goes on from epoch" in text and len(stopped) == 1:
            nodes.signal(stopped[0], signal.SIGCONT)
            stopped.append("goes on")

    watch.at_epoch, watch.at_note = {2: stop_a_trial}, go_on
    nodes.add(2 - len(nodes.cluster.worker_nodes))
    try:
        assert run(Experiment.model_validate(search(undisturbed.folder, watch, address=nodes.address)), results, watch).failures == ()
        assert len(stopped) == 2
    finally:
        nodes.kill(stopped[0])
    assert [message.split(":")[1] for message in caplog.messages] == [" its process died; another one goes on with it"]
    assert trials_of(results) == trials_of(undisturbed.results)
    assert records_of(results) == records_of(undisturbed.results)
    ran = [unit.title for unit, _ in watch.ran if unit.role != "teacher"]
    assert sorted(ran) == ["kd seed 0", *(f"kd trial {number}" for number in range(6))]
    assert verify(results).problems == ()


def test_a_search_goes_on_on_another_cluster_when_the_head_is_killed(nodes: Nodes, undisturbed: Searched) -> None:
    watch, results = Watch(undisturbed.folder / "notes"), undisturbed.folder / "headless"
    parts = search(undisturbed.folder, watch)
    file = undisturbed.folder / "search.yaml"
    file.write_text(yaml.safe_dump(parts))
    command = [sys.executable, "-m", "kdbench.cli", "run", str(file), "--results", str(results), "--no-mlflow"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_gcs_rpc_server_reconnect_timeout_s": "8"}
    driver = subprocess.Popen(
        [*command, "--set", f"runtime.address={nodes.address}"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    while '"epochs"' not in "".join(path.read_text() for path in (results / "studies").glob("*.journal")):  # which each ended trial adds
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    nodes.kill_head()
    _, error = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert f"the head of the Ray cluster at {nodes.address} does not answer" in error
    ended = [number for number, _, _, state in trials_of(results) if state == "COMPLETE"]
    assert 1 <= len(ended) < 6

    others = Nodes(2)
    try:
        of = Experiment.model_validate(parts | {"runtime": parts["runtime"] | {"address": others.address}})
        assert run(of, results, watch).failures == ()
    finally:
        others.cluster.shutdown()
    assert not {f"kd trial {number}" for number in ended} & {unit.title for unit, _ in watch.ran}
    assert not list(results.glob(".ray-*")), "what Tune noted down for the driver that died is left"
    assert trials_of(results) == trials_of(undisturbed.results)
    assert records_of(results) == records_of(undisturbed.results)
