"""`verify` derives every figure again from what is stored, and names whatever does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdbench.experiment import Experiment, to_yaml
from kdbench.results.layout import Layout
from kdbench.results.record import CHECKSUM, RunRecord, from_table, row_checksum, to_table
from kdbench.results.store import ResultStore
from kdbench.tasks.build import build_task
from kdbench.training.checkpoint import pack_predictions, save_weights
from kdbench.training.outcome import base_record
from kdbench.training.verification import Verification, verify
from tests.training import units

TASK = {"name": "classification", "data": "fashion_mnist", "transfer_size": 300}
CONFIG = to_yaml(
    Experiment.model_validate(
        {"name": "verified", "task": TASK, "teacher": {"model": "tiny_cnn"}, "students": ["tiny_cnn"], "methods": ["kd"]}
    )
)


def predicted(seed: int) -> torch.Tensor:
    """Logits [N, 10] that are right for half of the test images, as they are kept: in half precision."""
    target = build_task(units.unit().task).splits().test.target
    noise = torch.randn(len(target), 10, generator=torch.Generator().manual_seed(seed))
    return (noise + 2.0 * torch.nn.functional.one_hot(target, 10)).half()


def measured(store: ResultStore, prediction: torch.Tensor, teacher: torch.Tensor | None, **fields: Any) -> RunRecord:
    """A record and its predictions, as a training leaves them."""
    unit = units.unit(role="teacher" if teacher is None else "final", seed=fields.pop("seed", 0))
    task = build_task(unit.task)
    splits = task.splits()
    uri = Layout(Path(store.location)).predictions(unit.key, splits.test_hash)
    quality = task.metrics(prediction.float(), splits.test.target)
    alike = {} if teacher is None else task.agreement(prediction.float(), teacher.float())
    facts = {
        "config": CONFIG,
        "predictions_uri": uri,
        "predictions_sha256": store.write_bytes(uri, pack_predictions(prediction, splits.test.index)),
        "metrics": quality,
        "test_metric": quality["accuracy"],
        **{name: quality[name] for name in ("nll", "ece")},
        **alike,
        **fields,
    }
    return base_record(unit, task, splits).model_copy(update=facts)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and two finals."""
    root = tmp_path_factory.mktemp("clean")
    store = ResultStore(root)
    weights = root / "teachers" / "t" / "model.safetensors"
    sha = save_weights({"w": torch.ones(3)}, weights)
    teacher = predicted(9)
    of_teacher = {"teacher_sha": sha, "artifacts_uri": "teachers/t/model.safetensors"}
    record = measured(store, teacher, None, **of_teacher)
    store.append(record)
    for seed in (0, 1):
        store.append(measured(store, predicted(seed), teacher, seed=seed, teacher_sha=sha, teacher_metric=record.test_metric))
    return root


@pytest.fixture
def results(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "results"))


def record_file(results: Path, seed: int, role: str = "final") -> Path:
    [found] = [path for path in results.rglob("v1/**/*.parquet") if _matches(path, seed, role)]
    return found


def _matches(path: Path, seed: int, role: str) -> bool:
    record = from_table(pq.read_table(path), str(path))
    return (record.seed, record.role) == (seed, role)


def edit(path: Path, forge: bool = False, **values: Any) -> None:
    """Change values in a Parquet file by hand; `forge`: with a new checksum too, as someone does who read the code."""
    table = pq.read_table(path)
    [row] = table.to_pylist()
    row |= values
    if forge:
        row[CHECKSUM] = row_checksum(row)
    pq.write_table(pa.Table.from_pylist([row], schema=table.schema), path)


def only_problem(found: Verification) -> str:
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def test_an_untouched_folder_has_no_problem(results) -> None:
    told: list[tuple[int, int]] = []

    assert verify(results, lambda done, total: told.append((done, total))) == Verification(records=3, derived=3, compared=2, problems=())
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_empty_folder_has_none_either(tmp_path) -> None:
    assert verify(tmp_path / "nothing") == Verification(0, 0, 0, ())


@pytest.mark.parametrize("values", [{"device_hours": 0.001}, {"label": "ours"}, {"latency_ms_p50": 0.1}, {"seed": 7}, {"failure": "x"}])
def test_a_value_edited_by_hand_breaks_the_checksum_whatever_it_is(results, values) -> None:
    path = record_file(results, 1)
    edit(path, **values)

    problem = only_problem(verify(results))
    assert str(path.relative_to(results)) in problem
    assert "was changed after it was written" in problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"test_metric": 99.0}, "test_metric is 99.0, its predictions give "),
        ({"nll": 0.1}, "nll is 0.1, its predictions give "),
        ({"ece": None}, "ece is None, its predictions give "),
        ({"metrics": "{}"}, "metrics.accuracy is None, its predictions give "),
        ({"agreement": 0.999}, "agreement is 0.999, the predictions give "),
        ({"teacher_kl": 0.001}, "teacher_kl is 0.001, the predictions give "),
        ({"teacher_metric": 99.0}, "teacher_metric is 99.0, the teacher's own record has "),
        ({"predictions_uri": None}, "it has a test metric and no predictions that it was measured on"),
        ({"data_hash": "other"}, "the data set fashion_mnist here is not the one that it was measured on"),
        ({"predictions_sha256": "0" * 64}, "not the predictions that run"),
        ({"config": None}, "doesn't hold the experiment"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_figure_with_a_forged_checksum_still_has_to_follow_from_the_predictions(results, values, words) -> None:
    edit(record_file(results, 1), forge=True, **values)

    assert any(words in problem and "seed 1" in problem for problem in verify(results).problems)


def test_a_figure_a_millionth_off_is_found(results) -> None:
    record = from_table(pq.read_table(record_file(results, 0)), "")
    edit(record_file(results, 0), forge=True, nll=record.nll * (1 + 1e-6))

    assert "nll is" in only_problem(verify(results))


def test_a_checksum_that_was_taken_out_is_missed(results) -> None:
    path = record_file(results, 0)
    pq.write_table(pq.read_table(path).drop_columns([CHECKSUM]), path)

    assert "has no checksum" in only_problem(verify(results))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncated, _emptied])
def test_a_damaged_record_is_one_line_and_the_others_are_still_checked(results, damage: Callable[[Path], None]) -> None:
    path = record_file(results, 1)
    damage(path)

    found = verify(results)
    assert "is not a readable Parquet file" in only_problem(found)
    assert str(path.relative_to(results)) in found.problems[0]
    assert (found.records, found.derived) == (3, 2)


@pytest.mark.parametrize("damage", [_truncated, Path.unlink])
def test_predictions_that_are_damaged_or_gone_are_named(results, damage) -> None:
    record = from_table(pq.read_table(record_file(results, 1)), "")
    damage(results / record.predictions_uri)

    problem = only_problem(verify(results))
    assert record.run_id in problem
    assert record.predictions_uri in problem


def test_a_teachers_weights_that_are_others_are_named(results) -> None:
    save_weights({"w": torch.zeros(3)}, results / "teachers" / "t" / "model.safetensors")

    assert "is not the weights file that its students learned from" in only_problem(verify(results))


def test_two_records_of_one_run_that_differ_are_named(results) -> None:
    path = record_file(results, 1)
    record = from_table(pq.read_table(path), "").model_copy(update={"device_hours": 0.1})
    pq.write_table(to_table(record), path.with_name("copy.parquet"))

    assert f"run {record.run_id} stands in two records that differ" in only_problem(verify(results))


def test_of_two_records_of_one_training_that_of_the_lower_lease_is_named_and_is_no_mismatch(results) -> None:
    store, path = ResultStore(results), record_file(results, 1)
    lower = from_table(pq.read_table(path), "").model_copy(update={"run_id": "01LOWER", "lease": 3})
    higher = lower.model_copy(update={"run_id": "01HIGHER", "lease": 4})
    path.unlink()
    for record in (higher, lower):
        store.append(record)
    found = verify(results)

    assert found.problems == ()
    [note] = found.notes
    assert note.startswith("run 01LOWER (none, seed 1) was written under lease 3, and run 01HIGHER of the same training under lease 4")


def test_predictions_of_another_run_do_not_pass_for_its_own(results) -> None:
    records = [from_table(pq.read_table(record_file(results, seed)), "") for seed in (0, 1)]
    shutil.copy(results / records[0].predictions_uri, results / records[1].predictions_uri)

    assert "its SHA-256 differs" in only_problem(verify(results))


def test_what_rounding_may_move_is_not_called_a_mismatch(results) -> None:
    """The teacher's cached predictions may differ from those it was tested with in the last bit of half precision."""
    teacher = from_table(pq.read_table(record_file(results, 0, "teacher")), "")
    splits = build_task(units.unit().task).splits()
    store = ResultStore(results)
    kept = predicted(9)
    nudged = torch.from_numpy(kept.numpy().view("int16") + 1).view(torch.float16)  # the next number that half precision has
    sha = store.write_bytes(teacher.predictions_uri, pack_predictions(nudged, splits.test.index))
    quality = build_task(units.unit().task).metrics(nudged.float(), splits.test.target)
    again = {name: quality[name] for name in ("nll", "ece")} | {"test_metric": quality["accuracy"]}
    path = record_file(results, 0, "teacher")
    record = teacher.model_copy(update={"predictions_sha256": sha, "metrics": quality, **again})
    pq.write_table(to_table(record), path)
    for seed in (0, 1):
        edit(record_file(results, seed), forge=True, teacher_metric=record.test_metric)

    assert verify(results).problems == ()
