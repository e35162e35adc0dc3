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
import yaml
from torch import nn

from kdbench.benchmark import emptying
from kdbench.benchmark import run as running
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.deploy.export import export
from kdbench.deploy.verification import Verification, counted_parameters, states_of, verify
from kdbench.errors import TooMuch
from kdbench.experiment import Experiment
from kdbench.records.record import CHECKSUM, from_table, row_checksum, to_table
from kdbench.records.store import ResultStore
from kdbench.tasks.build import build_task
from kdbench.training.checkpoint import pack_predictions, save_weights, unpack_predictions
from kdbench.training.keys import _readings
from kdbench.training.recorded import experiment_of
from tests.peak_memory import measured

ASKED: dict[str, Any] = {
    "name": "verified",
    "task": {"name": "classification", "data": {"name": "shapes", "train": 80, "test": 40, "target": "class"}, "val_size": 20},
    "teacher": {"model": {"name": "tiny_cnn", "width": 4}},
    "students": [{"name": "tiny_cnn", "width": 2}],
    "methods": ["kd"],
    "recipe": {"epochs": 1, "batch_size": 20, "lr": 0.05, "precision": "fp32", "memory_format": "contiguous", "compile": False},
    "seeds": 2,
}


def trained(folder: Path, **changes: Any) -> Path:
    """The results of an experiment."""
    run(Experiment.model_validate({**ASKED, "control_seeds": changes.get("seeds", 2), **changes}), folder, Unwatched())
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and two finals."""
    return trained(tmp_path_factory.mktemp("finished") / "results")


@pytest.fixture
def sealed(finished: Path, tmp_path: Path) -> Path:
    """As `kdbench run` leaves it."""
    return Path(shutil.copytree(finished, tmp_path / "sealed"))


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """Without seals, so that everything has to follow from records, predictions and weights."""
    return Path(shutil.copytree(finished, tmp_path / "results", ignore=shutil.ignore_patterns("seals")))


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


def test_an_untouched_folder_has_no_problem(sealed) -> None:
    told: list[tuple[int, int]] = []

    found = verify(sealed, lambda done, total: told.append((done, total)))
    assert found == Verification(records=3, derived=3, compared=2, problems=(), keyed=3, counted=3, sealed=3)
    assert told == [(1, 3), (2, 3), (3, 3)]


def with_config(path: Path, key: str, value: Any) -> None:
    """Change a record's experiment, and make its checksum again."""
    [row] = pq.read_table(path).to_pylist()
    config = yaml.safe_load(row["config"])
    if key == "student":
        config["students"] = [value | {"label": row["student"]}]
    else:
        config["task"]["data"] = value
    edit(path, forge=True, config=yaml.safe_dump(config))


@pytest.mark.parametrize(
    "student",
    [
        pytest.param({"name": "vit_tiny_patch16_224", "depth": 100_000}, marks=pytest.mark.slow),
        pytest.param({"name": "vit_tiny_patch16_224", "embed_dim": 24_000}, marks=pytest.mark.slow),
        {"name": "torchvision.models:resnet50", "width_per_group": 20_000},
    ],
    ids=lambda student: list(student)[-1],
)
def test_a_network_that_a_record_describes_takes_no_memory(results, student) -> None:
    path = record_file(results, 1)
    with_config(path, "student", student)
    imports = f"from kdbench.deploy.verification import verify; from pathlib import Path; verify(Path({str(results)!r}))"
    taken = measured(imports, f"verify(Path({str(results)!r}))")
    assert taken.kilobytes < 300_000
    found = verify(results)
    assert "its unit_key is" in only_problem(found)
    assert (found.counted, found.uncounted) == (2, 1)
    record = from_table(pq.read_table(path), str(path))
    with pytest.raises(TooMuch, match="with these options"):
        export(record, results, "safetensors", results / "net")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "shapes", "train": 7000, "test": 20, "size": 1024, "target": "class"}, "to at most 0.3 GB"),
        ({"name": "cifar100"}, "verify downloads nothing"),
    ],
)
def test_data_that_a_record_asks_for_are_neither_made_nor_fetched(results, monkeypatch, data, said) -> None:
    monkeypatch.setattr("kdbench.data.download.urlopen", lambda *_, **__: pytest.fail("the network was used"))
    with_config(record_file(results, 1), "data", data)
    found = verify(results)
    [line] = found.left_out
    assert "its metrics were not derived again" in line
    assert said in line


def test_an_empty_folder_has_none_either(tmp_path) -> None:
    assert verify(tmp_path / "nothing") == Verification(0, 0, 0, ())


@pytest.mark.parametrize("values", [{"device_hours": 0.001}, {"label": "ours"}, {"latency_ms_p50": 0.1}, {"seed": 7}, {"failure": "x"}])
def test_a_value_edited_by_hand_breaks_the_checksum_whatever_it_is(results, values) -> None:
    path = record_file(results, 1)
    edit(path, **values)

    problem = verify(results).problems[0]  # of a label and a seed the key tells too
    assert str(path.relative_to(results)) in problem
    assert "was changed after it was written" in problem


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"test_metric": 99.0}, "test_metric is 99.0, its predictions give "),
        ({"nll": 0.1}, "nll is 0.1, its predictions give "),
        ({"ece": None}, "ece is None, its predictions give "),
        ({"samples_right": "8:/w=="}, "samples_right names other samples than its predictions do"),
        ({"metrics": "{}"}, "metrics.accuracy is None, its predictions give "),
        ({"agreement": 0.999}, "agreement is 0.999, the predictions give "),
        ({"teacher_kl": 0.001}, "teacher_kl is 0.001, the predictions give "),
        ({"teacher_metric": 99.0}, "teacher_metric is 99.0, the teacher's own record has "),
        ({"predictions_uri": None}, "it has a test metric and no predictions that it was measured on"),
        ({"data_hash": "other"}, "the data set shapes here is not the one that it was measured on"),
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
    [weights] = results.glob("teachers/*/model.safetensors")
    save_weights({"w": torch.zeros(3)}, weights)

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
    note = found.notes[0]
    assert note.startswith("run 01LOWER (kd, seed 1) was written under lease 3, and run 01HIGHER of the same training under lease 4")


def test_predictions_of_another_run_do_not_pass_for_its_own(results) -> None:
    records = [from_table(pq.read_table(record_file(results, seed)), "") for seed in (0, 1)]
    shutil.copy(results / records[0].predictions_uri, results / records[1].predictions_uri)

    assert "its SHA-256 differs" in only_problem(verify(results))


def test_what_rounding_may_move_is_not_called_a_mismatch(results) -> None:
    """The teacher's cached predictions may differ from those it was tested with in the last bit of half precision."""
    teacher = from_table(pq.read_table(record_file(results, 0, "teacher")), "")
    task = build_task(experiment_of(teacher).task)
    splits = task.splits()
    store = ResultStore(results)
    kept, _ = unpack_predictions(store.read_bytes(teacher.predictions_uri))
    nudged = torch.from_numpy(kept.numpy().view("int16") + 1).view(torch.float16)  # the next number that half precision has
    sha = store.write_bytes(teacher.predictions_uri, pack_predictions(nudged, splits.test.index))
    quality = task.metrics(nudged.float(), splits.test.target)
    again = {name: quality[name] for name in ("nll", "ece")} | {"test_metric": quality["accuracy"]}
    path = record_file(results, 0, "teacher")
    record = teacher.model_copy(update={"predictions_sha256": sha, "metrics": quality, **again})
    pq.write_table(to_table(record), path)
    for seed in (0, 1):
        edit(record_file(results, seed), forge=True, teacher_metric=record.test_metric)

    assert verify(results).problems == ()


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"label": "ours"},
        {"method": "nkd"},
        {"label": "none", "method": "none"},
        {"seed": 7},
        {"data_seed": 1},
        {"params": '{"temperature": 1.0}'},
        {"recipe": '{"epochs": 500}'},
        {"role": "candidate"},
        {"method_version": 2},
        {"task_version": 2},
        {"learned_hash": "other"},
        {"teacher_id": "other"},
        {"teacher_sha": None},
        {"student_init": "other"},
        {"unit_key": "0" * 16},
    ],
    ids=lambda values: "-".join(values),
)
def test_a_unit_key_has_to_follow_from_the_records_own_fields(results: Path, values: dict[str, Any]) -> None:
    path = record_file(results, 1)
    edit(path, forge=True, **values)

    assert any("its unit_key is " in problem and path.stem in problem for problem in verify(results).problems)


def test_the_hash_of_a_board_has_to_follow_from_the_records_own_fields(results: Path) -> None:
    edit(record_file(results, 1), forge=True, protocol_hash="other")

    assert "its protocol_hash is 'other', its own fields and its experiment give '" in only_problem(verify(results))


def test_a_student_that_the_experiment_does_not_have_is_named(results: Path) -> None:
    edit(record_file(results, 1), forge=True, student="resnet8x4")

    assert "its experiment describes 0 models called 'resnet8x4'" in only_problem(verify(results))


def test_a_record_that_holds_too_little_is_counted_and_not_accused(results: Path) -> None:
    """As a failed one that an older kdbench wrote: no predictions, and an experiment that can't be read any more."""
    gone = {"status": "failed", "test_metric": None, "predictions_uri": None, "artifacts_uri": None, "params_count": None}
    edit(record_file(results, 1), forge=True, config="name: of another time\nlosses: [kd]", **gone)
    edit(record_file(results, 0), forge=True, recipe='{"epochs": 1, "of_another_time": 2}')

    found = verify(results)
    assert (found.problems, found.keyed, found.unkeyed) == ((), 1, 2)


def test_keys_of_searches_combinations_and_given_teachers_are_derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search varies the recipe too, which is then another one than the board's."""
    monkeypatch.setattr(emptying, "needs_ray", lambda *_: False)
    folder = tmp_path / "results"
    trained(folder, seeds=1)
    [weights] = folder.glob("teachers/*/model.safetensors")
    teacher = {**ASKED["teacher"], "weights": str(weights)}
    methods = ["none", {"name": "kd+fitnet", "label": "both"}, {"name": "norm", "label": "wide"}]
    search = {"trials": 2, "sampler": "random", "scheduler": "none", "also": {"recipe.lr": {"low": 0.01, "high": 0.1, "log": True}}}
    trained(
        folder, name="more", teacher=teacher, methods=methods, search=search, seeds=1, recipe={**ASKED["recipe"], "views": 2, "epochs": 2}
    )

    found = verify(folder)
    assert found.problems == ()
    assert {record.role for record in ResultStore(folder).scan()} == {"teacher", "candidate", "final"}
    assert (found.keyed, found.unkeyed, found.sealed) == (found.records, 0, found.records)


def test_what_an_experiment_says_with_null_is_in_its_records(tmp_path: Path) -> None:
    """`views: null` is another recipe than none, and `teacher: null` says nothing; an option of a model may be null too."""
    student = {"name": "resnet10t", "drop_path_rate": None}
    recipe = {**ASKED["recipe"], "views": None, "augment": {"flip": True}}
    folder = trained(tmp_path / "results", teacher=None, methods=["none"], students=[student], seeds=1, recipe=recipe)

    [record] = ResultStore(folder).scan()
    assert experiment_of(record).recipe.views is None
    assert experiment_of(record).students[0].options == {"drop_path_rate": None}
    assert "teacher" not in str(record.config)
    found = verify(folder)
    assert (found.problems, found.keyed, found.counted) == ((), 1, 1)


def test_parameters_of_a_record_are_read_as_the_method_has_them() -> None:
    def first(method: str, **params: Any) -> dict[str, Any]:
        return next(iter(_readings(method, params)))

    assert first("kd", temperature=2.0) == {"temperature": 2.0}
    assert first("kd+my.code:Mine", **{"kd.temperature": 2.0, "my.code:Mine.shape.low": 1, "task_weight": 1.0}) == {
        "kd": {"temperature": 2.0},
        "my.code:Mine": {"shape": {"low": 1}},
        "task_weight": 1.0,
    }
    assert list(_readings("mine:Mine", {"shape.low": 1})) == [{"shape": {"low": 1}}, {"shape.low": 1}]


def test_a_folder_stays_clean_when_seeds_are_added_and_names_and_labels_of_the_teacher_change(sealed: Path) -> None:
    teacher = {"model": {**ASKED["teacher"]["model"], "label": "big"}}
    trained(sealed, name="renamed", seeds=3, methods=["kd", "none"], teacher=teacher, cache={"budget_gb": 1})

    found = verify(sealed)
    assert (found.problems, found.notes) == ((), ())
    assert found.keyed == found.sealed == found.records > 3


# --- parameters ------------------------------------------------------------------------------------------------------


def test_a_number_of_parameters_that_the_weights_do_not_have_is_named(results: Path) -> None:
    path = record_file(results, 1)
    record = from_table(pq.read_table(path), "")
    edit(path, forge=True, params_count=10)

    assert f"params_count is 10, {record.artifacts_uri} has {record.params_count} parameters" in only_problem(verify(results))


def test_where_weights_are_not_kept_parameters_are_counted_as_not_checked(results: Path) -> None:
    shutil.rmtree(results / "students")

    found = verify(results)
    assert (found.problems, found.counted, found.uncounted) == ((), 1, 2)


def test_a_path_of_weights_that_leads_out_of_the_folder_is_not_followed(results: Path) -> None:
    path = record_file(results, 1)
    edit(path, forge=True, artifacts_uri=f"../{results.name}/{from_table(pq.read_table(path), '').artifacts_uri}", params_count=10)

    found = verify(results)
    assert (found.problems, found.counted, found.uncounted) == ((), 2, 1)


class Tied(nn.Module):
    """Two names of one matrix, a normalisation with buffers, a frozen parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("table", torch.ones(100))


def test_tied_weights_count_once_and_buffers_not_at_all(tmp_path: Path) -> None:
    network = Tied()
    save_weights(network.state_dict(), tmp_path / "tied.safetensors")

    counted = counted_parameters(tmp_path / "tied.safetensors", states_of(network))
    assert counted == sum(p.numel() for p in network.parameters()) == 16 + 8 + 3
    assert counted_parameters(tmp_path / "tied.safetensors", states_of(nn.Linear(4, 4))) is None


# --- seals -----------------------------------------------------------------------------------------------------------


def test_what_no_other_file_tells_the_seal_does(sealed: Path) -> None:
    edit(record_file(sealed, 0), forge=True, latency_ms_p50=0.01)
    lost = record_file(sealed, 1)
    lost.unlink()

    changed, missing = verify(sealed).problems
    assert "(kd, seed 0, student tiny_cnn) was changed after kdbench run had sealed it" in changed
    assert f"run {lost.stem} (kd, seed 1, student tiny_cnn) is missing" in missing


def test_what_a_run_that_was_killed_before_its_seal_left_is_sealed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "results"
    with monkeypatch.context() as before_its_seal:
        before_its_seal.setattr(running, "seal", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, seeds=1)
    assert (verify(folder).problems, verify(folder).sealed) == ((), 0)

    trained(folder, seeds=1)
    found = verify(folder)
    assert (found.records, found.sealed, found.problems, found.notes) == (2, 2, (), ())


def test_a_folder_without_seals_is_said_to_have_none_and_is_not_accused(results: Path) -> None:
    found = verify(results)

    assert (found.problems, found.sealed) == ((), 0)
    assert found.notes[0].startswith(f"{results} has no seals yet")
