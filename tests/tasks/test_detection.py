"""Detection through the frame: what decides a step, what is cached, stored, exported and measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.data.batch import Batch, Part
from kdbench.data.columns import several
from kdbench.data.kinds import has_box
from kdbench.data.loader import Loader
from kdbench.data.sources import DataSpec
from kdbench.data.views import Augment
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.readings import Reading
from kdbench.models.outputs import Outputs, predicted, reading_of
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.cell_losses import CellLosses
from kdbench.tasks.detection import Detection
from kdbench.tasks.detector_losses import losses_of
from kdbench.training.assembly import assemble
from kdbench.training.cache.outputs import open_cache
from kdbench.training.checkpoint import unpack_predictions
from kdbench.training.loop import fit, train_step
from kdbench.training.outcome import rederive
from kdbench.training.session import LocalSession
from kdbench.training.teacher import LiveTeacher, load_teacher
from tests.training.alike import losses_of_workers
from tests.training.units import layout, saved_teacher, unit, with_cache

CPU = torch.device("cpu")
DATA = {"name": "shapes", "target": "boxes", "size": 32, "train": 40, "test": 10}
TASK: dict[str, Any] = {"name": "detection", "data": DATA, "val_size": 10, "transfer_size": 24}
STUDENT = {"name": "tiny_fcos", "width": 4}
PLAIN = {"name": "tests.training.units:PlainDetector"}  # without batch statistics
TWO_STAGES = {
    "name": "faster_rcnn",
    "backbone": "resnet18",
    "width": 8,
    "levels": 2,
    "anchor": 16,
    "hidden": 8,
    "proposals": 9,
    "learned": 7,
}
RECIPE = {"epochs": 1, "batch_size": 12, "lr": 0.01, "precision": "fp64", "augment": {"crop": 2, "flip": True}, "views": 2}


def detector(method: Any, folder: Path, **changes: Any) -> Any:
    teacher = saved_teacher(folder, "fp64", {"name": "tiny_fcos", "width": 6}, TASK)
    recipe = RECIPE | changes.pop("recipe", {})
    return unit(method, teacher, recipe=recipe, **({"task": TASK, "student": STUDENT} | changes))


def test_views_move_boxes_with_their_images_and_labels_stay() -> None:
    part = build_task(TaskSpec.model_validate(TASK)).splits().train
    loader = Loader(part, 12, augment=Augment(flip=True), views=None, data_seed=0, order_seed=0)
    batch = next(iter(loader.batches(0)))
    rows = torch.tensor([int((part.index == index).nonzero()) for index in batch.index])
    before, after = several(part.select(rows).target), several(batch.target)
    assert torch.equal(after["labels"], before["labels"])
    mirrored = before["boxes"][..., [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([32.0, 0, 32, 0])
    mirrored = mirrored.where(has_box(before["boxes"])[..., None], 0)
    same = (after["boxes"] == before["boxes"]).flatten(1).all(1)
    assert torch.equal(after["boxes"][~same], mirrored[~same])
    assert 0 < int(same.sum()) < 12


@pytest.mark.parametrize("method", ["none", "kd"])
@pytest.mark.parametrize("bare", [[], [0, 1, 2, 3], list(range(12))])
def test_micro_batches_and_workers_give_one_loss_where_images_have_no_box(tmp_path: Path, method: str, bare: list[int]) -> None:
    """The positive cells count, of all micro-batches and workers together; an image without a box keeps the loss of its background."""

    def without(batch: Batch) -> Batch:
        boxes = several(batch.target)
        gone = torch.isin(batch.index, everything.index[bare])
        labels = boxes["labels"].masked_fill(gone[:, None], -1)
        return replace(batch, target={**boxes, "labels": labels})

    alone = assemble(detector(method, tmp_path, student=PLAIN), LocalSession())
    everything = next(iter(alone.loader.batches(0)))
    whole = train_step(alone, without(everything))
    weights = dict(alone.distiller.student.named_parameters())
    assert torch.isfinite(whole).all()
    assert whole[0] > 0  # the background of every image counts
    for pieces in (2, 4):
        run = assemble(detector(method, tmp_path, student=PLAIN, recipe={"accumulate": pieces}), LocalSession())
        torch.testing.assert_close(train_step(run, without(next(iter(run.loader.batches(0))))), whole, rtol=1e-10, atol=1e-12)
        for name, weight in run.distiller.student.named_parameters():
            torch.testing.assert_close(weight, weights[name], rtol=1e-9, atol=1e-11)
    for workers in (2, 3):
        losses = losses_of_workers(detector(method, tmp_path, student=PLAIN, workers={"max": workers}), workers, without)
        torch.testing.assert_close(losses, whole, rtol=1e-10, atol=1e-12)


def test_a_cached_teacher_says_what_a_live_one_says(tmp_path: Path) -> None:
    each = detector("kd", tmp_path)
    ref = with_cache(each.teacher, each, tmp_path / "cache", ("level:0",), {"precision": "fp32"})
    run = assemble(each, LocalSession())
    batch = next(iter(run.loader.batches(0)))
    task = build_task(each.task)
    live = LiveTeacher(load_teacher(ref, task, CPU), task, ("level:0",), "fp64")(batch)
    assert ref.cache is not None
    cache = open_cache(ref.cache, ("level:0",))
    assert cache is not None
    cached = cache(batch)
    assert task.reading(ref.model) == live.reading == CellReading(5, (4, 8))
    assert cache.shapes.prediction == {"level:0": (9, 8, 8), "level:1": (9, 4, 4)}
    for name, tensor in several(live.prediction).items():
        torch.testing.assert_close(several(cached.prediction)[name].double(), tensor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.maps["level:0"].double(), live.maps["level:0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["none", "kd", {"name": "mgd", "student_taps": ["level:0"], "teacher_taps": ["level:0"]}])
def test_a_training_keeps_its_best_boxes_and_its_metrics_are_theirs(tmp_path: Path, method: Any) -> None:
    each = detector(method, tmp_path, recipe={"precision": "fp32"})
    record = fit(each, LocalSession(), layout(tmp_path))
    assert record.primary == "ap"
    assert record.predictions_uri is not None
    stored = (tmp_path / record.predictions_uri).read_bytes()
    assert rederive(record, build_task(each.task), stored) == record.metrics
    assert record.metrics.keys() >= {"ap", "ap50", "ap75", "ap_small", "ap/circle"}
    assert {tensor.dtype for tensor in several(unpack_predictions(stored)[0]).values()} == {torch.float32, torch.int64}


def test_data_without_boxes_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"needs images with `boxes` .* gives uint8 \[16, 16\]; use target: boxes"):
        Detection(Detection.Options(data=DataSpec.model_validate({"name": "shapes", "train": 5, "test": 2, "size": 16})))


def test_a_network_that_says_no_reading_is_refused_with_the_way_out() -> None:
    task = build_task(TaskSpec.model_validate(TASK))
    with pytest.raises(UserError, match=r"model 'tiny_cnn' has no `reading`, which says what the raw levels of a detector hold"):
        task.build_model(ModelSpec(name="tiny_cnn"))


def test_networks_of_other_levels_train_beside_each_other_and_kd_refuses_to_compare_them(tmp_path: Path) -> None:
    each = detector("none", tmp_path, student={**STUDENT, "levels": 3})
    fit(each, LocalSession(), layout(tmp_path))
    with pytest.raises(UserError, match="the student has one cell at strides 4, 8, 16, the teacher one cell at strides 4, 8"):
        fit(detector("kd", tmp_path, student={**STUDENT, "levels": 3}), LocalSession(), layout(tmp_path))


def test_a_reading_of_no_family_is_refused_in_one_line() -> None:
    class Odd(Reading):
        of_places = "one thing"  # type: ignore[assignment]

        def shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
            return {}

        dense = detections = None  # type: ignore[assignment]

    with pytest.raises(UserError, match="a network's reading is a Odd, of which nobody knows what it learns; use one of CellReading"):
        losses_of(Odd(3, (4,)))

    class Mine(CellReading):
        pass

    assert isinstance(losses_of(Mine(3, (4,))), CellLosses)


def test_kd_needs_no_boxes_to_imitate_a_teacher(tmp_path: Path) -> None:
    record = fit(detector("kd", tmp_path, task={**TASK, "transfer": "noise"}), LocalSession(), layout(tmp_path))
    assert {name for name in record.curve[0] if name.startswith("train_")} == {"train_kd", "train_total"}
    assert record.curve[0]["train_kd"] > 0


def test_the_content_hash_knows_names_and_values_of_columns() -> None:
    images, boxes = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 4)
    named = Part(images, {"boxes": boxes, "labels": torch.zeros(2, 1)}, torch.arange(2))
    other = Part(images, {"labels": torch.zeros(2, 1), "boxes": boxes + 1}, torch.arange(2))
    renamed = Part(images, {"places": boxes, "labels": torch.zeros(2, 1)}, torch.arange(2))
    assert len({part.sha256() for part in (named, other, renamed)}) == 3


def test_a_network_of_two_stages_is_handed_the_true_boxes_and_no_other_is() -> None:
    task = build_task(TaskSpec.model_validate(TASK))
    assert isinstance(task, Detection)
    loader = Loader(task.splits().train, 6, augment=Augment(), views=1, data_seed=0, order_seed=0)
    batch = next(iter(loader.batches(0)))
    target = several(batch.target) | {"crowd": several(batch.target)["labels"] == 2}
    crowded = replace(batch, target=target)
    two = task.build_model(ModelSpec.model_validate(TWO_STAGES))
    given = task.learned_by(two).truth(crowded)
    assert torch.equal(given["boxes"], target["boxes"])
    assert torch.equal(given["labels"], target["labels"].masked_fill(target["crowd"], -1))
    assert (given["labels"] != target["labels"]).any()
    assert task.learned_by(task.build_model(ModelSpec.model_validate(STUDENT))).truth(batch) == {}
    assert task.learned_by(two).truth(replace(batch, target=None)) == {}
    assert task.truth(batch) == {}


def test_which_anchors_are_learned_follows_from_sample_and_view_and_not_from_the_batch() -> None:
    task = build_task(TaskSpec.model_validate(TASK | {"data": DATA | {"size": 64}}))  # of 960 anchors, 256 are learned
    assert isinstance(task, Detection)
    network = task.build_model(ModelSpec.model_validate(TWO_STAGES)).eval()
    bound = task.learned_by(network)
    loader = Loader(task.splits().train, 6, augment=Augment(), views=1, data_seed=0, order_seed=0)
    batch = next(iter(loader.batches(0)))

    def objectness(rows: list[int], view: int) -> torch.Tensor:
        some = replace(batch, inputs=batch.inputs[rows], target={k: v[rows] for k, v in several(batch.target).items()})
        some = replace(some, index=batch.index[rows], view=view)
        prediction = {name: values[rows] for name, values in several(given).items()}
        return bound.loss(Outputs(prediction, reading=reading_of(network)), some)["objectness"]

    with torch.no_grad():
        given = predicted(network, batch.inputs)
        one = torch.stack([objectness([row], 0) for row in range(6)])
        torch.testing.assert_close(objectness([4, 1, 5], 0), one[[4, 1, 5]].mean())
        assert not torch.equal(torch.stack([objectness([row], 1) for row in range(6)]), one)
