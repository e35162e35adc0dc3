"""Every task from its YAML to files that ship, and through what interrupts a run: killed means paused.

One run of each task that nothing disturbs is what the others are compared with, and what is verified, exported and looked at.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlflow.pyfunc
import onnxruntime
import pytest
import torch
from mlflow.tracking import MlflowClient
from optuna.trial import FrozenTrial
from ray.cluster_utils import Cluster
from torch import Tensor, nn

from kdbench.boards.leaderboard import boards
from kdbench.data.columns import Columns, named, tensors
from kdbench.data.loader import in_order
from kdbench.deploy.export import TOLERANCE
from kdbench.experiment import load_experiment
from kdbench.models.outputs import predicted, reading_of
from kdbench.records.folders import Folders
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.report.files import Report
from kdbench.storage.journals import fetch_journal
from kdbench.storage.layout import results_folder
from kdbench.tasks import TASKS
from kdbench.tasks.base import Task
from kdbench.tasks.build import build_task
from kdbench.tasks.detection import Detection
from kdbench.training.checkpoint import unpack_predictions
from tests.console import Kdbench
from tests.drivers import board, finish, in_finals, in_search, in_teacher, kill_once, kill_when, records, start, trials
from tests.each_task import EACH_TASK, experiment_file
from tests.object_storage import KEY, SECRET, ObjectStorage

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Said(NamedTuple):
    """What a task's board and its exported graph say of themselves. kept: a stored tensor that follows from the graph."""

    primary: str
    inputs: str
    outputs: str
    kept: str = ""


IMAGES = "float32 images 3x32x32, any number of them, in [0, 1], which the graph normalises"
SAID = {
    "classification": Said("accuracy", IMAGES.replace("32x32", "28x28"), "5"),
    "segmentation": Said("miou", IMAGES, "6x32x32"),
    "detection": Said("ap", IMAGES, "level:0 9x8x8, level:1 9x4x4", "scores"),
    "instance_masks": Said(
        "ap",
        IMAGES,
        "level:0 15x8x8, level:1 15x4x4, proposals 20x4, roi_logits 20x6, roi_offsets 20x5x4, "
        "mask_boxes 6x4, mask_scores 6, mask_classes 6, masks 6x28x28",
        "scores",
    ),
    "multi_label": Said("map", IMAGES, "5"),
    "image_text": Said(
        "recall_at_1", IMAGES.replace("images", "image") + "; int64 tokens 13, any number of them", "image 32, text 32", "text"
    ),
}
METHODS = 3
TRIALS = 2 * METHODS
FINALS = 2 * METHODS


class Undisturbed(NamedTuple):
    name: str
    experiment: Path
    results: Path

    @property
    def finals(self) -> list[RunRecord]:
        return ResultStore(self.results).scan(role="final")

    @property
    def looks_inside(self) -> RunRecord:
        """A final of the method that reads maps."""
        return next(record for record in self.finals if record.label not in ("none", "kd"))

    def task(self) -> Task:
        return build_task(load_experiment(self.experiment).task)


# CI has 45 minutes: it looks at one tensor in and out, and at several out; what else there is is left to `make test-nodes`.
IN_CI = ("classification", "detection")


def of_tasks(*in_ci: str) -> list[Any]:
    """All tasks; those that are not named are left to `make test-nodes`."""
    return [pytest.param(name, marks=[] if name in in_ci else [pytest.mark.nodes]) for name in EACH_TASK]


@pytest.fixture(scope="module", params=of_tasks(*IN_CI))
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp(request.param)
    run = Undisturbed(request.param, experiment_file(request.param, folder), folder / "results")
    finish(run.experiment, run.results)
    return run


def test_no_task_of_the_catalogue_is_left_out() -> None:
    assert EACH_TASK.keys() == SAID.keys() == set(TASKS)


# --- killed means paused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undisturbed", of_tasks("classification"), indirect=True)
def test_a_driver_killed_in_every_phase_ends_at_the_undisturbed_board_bit_for_bit(undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_when(undisturbed.experiment, tmp_path, in_teacher)
    kill_when(undisturbed.experiment, tmp_path, in_search)
    assert {record["role"] for record in records(tmp_path)} == {"teacher"}
    kill_when(undisturbed.experiment, tmp_path, in_finals)
    assert sum(record["role"] == "final" for record in records(tmp_path)) < FINALS
    finish(undisturbed.experiment, tmp_path)
    assert board(tmp_path) == board(undisturbed.results)

    keys = [record["unit_key"] for record in records(tmp_path)]
    assert len(keys) == len(set(keys)), "a unit ran twice"
    assert sorted(keys) == sorted(record["unit_key"] for record in records(undisturbed.results))

    mine, theirs = trials(tmp_path), trials(undisturbed.results)
    assert len(mine) == TRIALS
    assert all(trial.state.is_finished() for trial in mine)
    # A point of a space may fail for good, as a large weight on fresh masks does: killed or not, the same one.
    assert sorted(map(_told, mine)) == sorted(map(_told, theirs))
    assert not list((tmp_path / "checkpoints").rglob("*.*")), "a checkpoint of finished work is left"
    assert _runs_in_mlflow(tmp_path) == _runs_in_mlflow(undisturbed.results)


def _told(trial: FrozenTrial) -> tuple[int, str, str, str]:
    return trial.number, trial.state.name, str(trial.params), str(trial.value)


def _runs_in_mlflow(results: Path) -> list[tuple[str, str]]:
    """Name and status of every run that MLflow shows."""
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    return sorted((run.info.run_name, run.info.status) for run in runs)


@pytest.mark.parametrize("undisturbed", of_tasks("classification"), indirect=True)
def test_a_driver_killed_on_one_machine_goes_on_from_the_bucket_on_another_and_on_a_cluster_that_shares_no_disk_with_it(
    undisturbed: Undisturbed, tmp_path: Path, object_storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, one, other, nodes = object_storage.new_bucket(), tmp_path / "one", tmp_path / "other", tmp_path / "nodes"
    monkeypatch.setenv("KDBENCH_LEASE_SECONDS", "4")

    def is_in_search() -> bool:
        return b'"epochs"' in object_storage.journals(bucket)

    said = kill_once(start(undisturbed.experiment, bucket, object_storage.environment(one)), is_in_search)
    done = [path for path in object_storage.objects(bucket) if path.startswith("v1/")]
    traces = _everything(one)
    shutil.rmtree(one)
    for name, value in object_storage.environment(nodes).items():
        monkeypatch.setenv(name, value)
    with _cluster() as address:
        said += finish(undisturbed.experiment, bucket, object_storage.environment(other), "--set", f"runtime.address={address}")

    assert [path.name for path in nodes.rglob("model.safetensors")] == [], "the cached outputs were enough"
    assert list(nodes.rglob("logits.npy")), "the processes of the cluster had working copies of their own"
    assert board(bucket) == board(undisturbed.results)
    kept = object_storage.objects(bucket)
    assert not [path for path in kept if path.startswith(".ray-")], "what Tune noted down is left"
    copy = tmp_path / "downloaded"
    for path, content in kept.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(content)
    keys = [record["unit_key"] for record in records(copy)]
    assert set(done) <= kept.keys()
    assert sorted(keys) == sorted(record["unit_key"] for record in records(undisturbed.results)), "a unit ran twice, or is lost"
    for path in kept:
        if path.endswith(".journal"):
            fetch_journal(results_folder(bucket) / path)
    mine, theirs = trials(results_folder(bucket)), trials(undisturbed.results)
    assert sorted((t.number, str(t.params), t.value) for t in mine) == sorted((t.number, str(t.params), t.value) for t in theirs)
    assert not [path for path in kept if path.startswith("checkpoints/")], "a checkpoint of finished work is left"
    traces += _everything(other) + _everything(nodes) + said.encode() + b"".join(kept.values())
    assert not [secret for secret in (KEY, SECRET) if secret.encode() in traces]


@contextmanager
def _cluster() -> Iterator[str]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield str(cluster.address)
    finally:
        cluster.shutdown()


def _everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "/data/" not in str(path))


def test_a_finished_experiment_trains_nothing_again(kdbench: Kdbench, undisturbed: Undisturbed) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed.results / "v1").rglob("*.parquet")}
    asked = [(trial.number, trial.datetime_complete) for trial in trials(undisturbed.results)]
    ended = kdbench("run", undisturbed.experiment, "--results", undisturbed.results)
    assert ended.code == 0, ended.err
    told, _, shown = ended.out.partition(f"{undisturbed.name} on shapes")
    assert "trial" not in told
    assert "kd" in shown
    assert {path: path.stat().st_mtime_ns for path in (undisturbed.results / "v1").rglob("*.parquet")} == before
    assert [(trial.number, trial.datetime_complete) for trial in trials(undisturbed.results)] == asked


# --- what a finished run is good for ---------------------------------------------------------------------------------


def test_a_run_is_planned_ranked_and_verified(kdbench: Kdbench, undisturbed: Undisturbed) -> None:
    planned = kdbench("run", undisturbed.experiment, "--dry-run")
    assert planned.code == 0, planned.err
    assert len(undisturbed.finals) == FINALS
    assert [record for record in undisturbed.finals if record.agreement is None] == []
    ranked = kdbench("leaderboard", "--results", undisturbed.results)
    student = EACH_TASK[undisturbed.name].student["name"]
    assert f"{undisturbed.name} on shapes: {student} -> {student}" in ranked.out
    assert f"{SAID[undisturbed.name].primary}, higher is better" in ranked.out
    verified = kdbench("verify", "--results", undisturbed.results)
    assert verified.code == 0, verified.out + verified.err
    count = len(ResultStore(undisturbed.results).scan())
    assert (
        f"{count} records: {FINALS + 1} with metrics derived again, {FINALS} compared with their teacher, {count} with keys" in verified.out
    )
    assert f"{count} as they were sealed, no problems" in verified.out


def test_an_exported_graph_gives_what_the_network_gives_and_the_stored_predictions_follow_from_it(
    kdbench: Kdbench, undisturbed: Undisturbed
) -> None:
    record, said, task = undisturbed.looks_inside, SAID[undisturbed.name], undisturbed.task()
    assert kdbench("export", record.run_id, "--results", undisturbed.results).code == 0
    written = kdbench("export", record.run_id, "--format", "onnx", "--output", "network.onnx", "--results", undisturbed.results)
    assert written.code == 0, written.err
    assert f"input: {said.inputs}\n" in written.out
    assert f"output: {said.outputs} for each image\n" in written.out
    student = load_experiment(undisturbed.experiment).students[0]
    network = task.build_model(student.model_copy(update={"weights": undisturbed.results / str(record.artifacts_uri)})).eval()
    for samples in (12, 1, 5):
        inputs = next(in_order(task.splits().test, samples)).inputs
        with torch.no_grad():
            expected = named(predicted(network, inputs), "prediction")
        found = _of_graph(inputs)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE * float(tensor.abs().max()))
    whole = _answered(network, _of_graph(next(in_order(task.splits().test, 12)).inputs), task)
    assert record.predictions_uri is not None
    stored, _ = unpack_predictions((undisturbed.results / record.predictions_uri).read_bytes())
    kept = named(task.kept(whole if said.kept else whole["prediction"]), "")[said.kept]
    # they are stored in half precision, and a sum of float32 in another order may be rounded to the other side
    torch.testing.assert_close(kept, named(stored, "")[said.kept].float(), atol=1e-4, rtol=torch.finfo(torch.half).eps)


def _answered(network: nn.Module, given: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
    """What a network's outputs mean in evaluation: of a detector, its best boxes."""
    if not isinstance(task, Detection):
        return given
    return reading_of(network).detections(given, task.size, task.options.kept_boxes)


def _of_graph(inputs: Columns) -> dict[str, Tensor]:
    """What onnxruntime makes of samples, by the names of the predictions."""
    session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays: list[Any] = session.run(names, {name: tensor.numpy() for name, tensor in named(inputs, "images").items()})
    return {name.removesuffix("_output"): torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def test_a_registered_network_serves_what_the_network_gives(kdbench: Kdbench, undisturbed: Undisturbed) -> None:
    record, task = undisturbed.looks_inside, undisturbed.task()
    inputs = next(in_order(task.splits().test, 12)).inputs
    registered = kdbench("export", record.run_id, "--register", "network", "--results", undisturbed.results)
    assert registered.code == 0, registered.err
    student = load_experiment(undisturbed.experiment).students[0]
    network = task.build_model(student.model_copy(update={"weights": undisturbed.results / str(record.artifacts_uri)})).eval()
    mlflow.set_tracking_uri(registered.out.partition(", at ")[2].split("\n")[0])
    try:
        loaded = mlflow.pyfunc.load_model("models:/network/1")
        signature = loaded.metadata.signature
        names = [spec.name for spec in signature.inputs.inputs]
        given = [tensor.numpy() for tensor in tensors(inputs)]
        arrays = loaded.predict(given[0] if names == [None] else dict(zip(names, given, strict=True)))
    finally:
        mlflow.set_tracking_uri(None)  # it is MLflow's own for the whole process, and in its environment
    with torch.no_grad():
        expected = named(predicted(network, inputs), "")
    by_name = arrays if isinstance(arrays, dict) else {"": arrays}
    served = {name.removesuffix("_output"): torch.as_tensor(array) for name, array in by_name.items()}
    assert served.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(served[name], tensor, rtol=0, atol=TOLERANCE * float(tensor.abs().max()))


def test_a_report_of_a_real_run_works_in_the_browser(browser: Chrome, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The fixture says what went wrong in the page's scripts; here is what a reader sees."""
    browser.get(Report(Folders([undisturbed.results])).write(tmp_path / "report.html").as_uri())

    def seen(selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).map((e) => e.innerText)"
        found: list[str] = browser.execute_script(script, selector)
        return found

    primary = SAID[undisturbed.name].primary
    text = browser.execute_script("return document.body.innerText")
    assert f"{undisturbed.name} on shapes" in text
    assert any(header.split()[0] == primary for header in seen("table.board thead button"))
    labels = ["none", "kd", undisturbed.looks_inside.label]
    assert sorted(seen("section.one-board table.board tbody th")) == sorted(labels)
    means = {row["method"]: row["mean"] for row in board(undisturbed.results)[0]["rows"]}
    decimals = boards(undisturbed.finals)[0].decimals
    for row in browser.find_elements("css selector", "section.one-board table.board tbody tr"):
        label = row.find_element("css selector", "th").text
        assert f"{means[label]:.{decimals}f}" in row.text, row.text
    drawn = browser.execute_script("return [...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.mark').length)")
    assert drawn
    assert min(drawn) > 0, "a chart without a mark"
