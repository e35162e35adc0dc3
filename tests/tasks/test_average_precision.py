"""Average precision: COCO's numbers, in pixels of the original pictures, of all, by size and by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data.shapes import shapes
from kdbench.tasks.average_precision import average_precision, found_in_picture, original, shared_boxes
from tests.tasks.scenes import Target, target

ALL = ("ap", "ap50", "ap75")
TEN = (0.0, 0.0, 10.0, 10.0)


def kept_of(wanted: Target, count: int = 10, score: float = 0.9, moved: float = 0.0) -> dict[str, Tensor]:
    """What is kept of a detector that knows each object; its boxes lie `moved` pixels right and down."""
    real = wanted["labels"] >= 0
    columns = {"boxes": wanted["boxes"] + moved, "scores": score * real, "classes": wanted["labels"].clamp(min=0)}
    order = (~real).int().sort(dim=1, stable=True).indices
    sorted_ = {name: torch.stack([rows[o] for rows, o in zip(values, order, strict=True)]) for name, values in columns.items()}
    missing = count - real.shape[1]
    return {name: F.pad(values, (0, 0) * (values.ndim - 2) + (0, missing)) for name, values in sorted_.items()}


def overall(kept: dict[str, Tensor], wanted: Target) -> dict[str, float]:
    found = average_precision(kept, wanted)
    return {name: found[name] for name in ALL}


def wanted_of(images: int, size: int = 32) -> Target:
    boxes = shapes(train=images, test=1, size=size, target="boxes").train.target
    assert isinstance(boxes, dict)
    return boxes


def test_a_perfect_prediction_has_100() -> None:
    wanted = wanted_of(20)
    assert overall(kept_of(wanted), wanted) == pytest.approx(dict.fromkeys(ALL, 100))


def test_no_prediction_has_0_and_so_has_a_target_without_objects() -> None:
    wanted, nothing = wanted_of(3), target()
    empty = {name: torch.zeros_like(values) for name, values in kept_of(wanted).items()}
    assert overall(empty, wanted) == dict.fromkeys(ALL, 0)
    assert overall(kept_of(target((TEN, 0))), nothing) == dict.fromkeys(ALL, 0)


def test_overlap_is_counted_at_ten_thresholds() -> None:
    # Four fifths of the box: a hit at 0.50 .. 0.80, which are seven of ten.
    kept = kept_of(target(((0.0, 0.0, 10.0, 8.1), 0)))
    assert overall(kept, target((TEN, 0))) == pytest.approx({"ap": 70, "ap50": 100, "ap75": 100})


def test_a_wrong_class_and_a_missed_object_count() -> None:
    wanted = target((TEN, 0), ((20.0, 20.0, 30.0, 30.0), 1))
    assert overall(kept_of(target((TEN, 0))), wanted)["ap50"] == pytest.approx(50)
    wrong = kept_of(target((TEN, 0), ((20.0, 20.0, 30.0, 30.0), 2)))
    assert overall(wrong, wanted)["ap50"] == pytest.approx(50)


def test_a_false_box_counts_only_where_its_score_is_higher() -> None:
    wanted = target((TEN, 0))
    for false_score, expected in ((0.99, 50), (0.6, 100)):
        kept = kept_of(wanted)
        kept["boxes"][0, 5], kept["scores"][0, 5] = torch.tensor([20.0, 20.0, 30.0, 30.0]), false_score
        assert average_precision(kept, wanted)["ap50"] == pytest.approx(expected)


def test_padding_changes_nothing() -> None:
    wanted = wanted_of(10)
    few = average_precision(kept_of(wanted, 3, moved=0.7), wanted)
    padded = {"boxes": F.pad(wanted["boxes"], (0, 0, 0, 4)), "labels": F.pad(wanted["labels"], (0, 4), value=-1)}
    assert average_precision(kept_of(wanted, 150, moved=0.7), padded) == few
    assert 0 < few["ap"] < 100


def test_a_row_of_score_0_is_padding_whatever_its_box() -> None:
    wanted = target((TEN, 0), ((20.0, 20.0, 30.0, 30.0), 0))
    kept = {"boxes": wanted["boxes"], "scores": torch.tensor([[0.9, 0.0, 0.0]]), "classes": torch.zeros(1, 3, dtype=torch.int64)}
    # One of two objects: precision 1 up to a recall of one half, which are 51 of the 101 points that COCO looks at.
    assert average_precision(kept, wanted)["ap50"] == pytest.approx(100 * 51 / 101)


def test_half_precision_is_read() -> None:
    wanted = wanted_of(4)
    stored = {name: values.half() if values.is_floating_point() else values for name, values in kept_of(wanted).items()}
    assert overall(stored, wanted) == pytest.approx(dict.fromkeys(ALL, 100))


def test_each_class_that_occurs_and_each_size_that_occurs_has_its_number() -> None:
    wanted = target((TEN, 2), ((20.0, 20.0, 30.0, 30.0), 0), ((0.0, 0.0, 100.0, 100.0), 0))
    found = average_precision(kept_of(target((TEN, 2), ((0.0, 0.0, 100.0, 100.0), 0))), wanted, ("ring", "square", "cross"))
    assert found["ap/cross"] == pytest.approx(100)
    assert found["ap/ring"] == pytest.approx(100 * 51 / 101)
    assert "ap/square" not in found
    assert found["ap_large"] == pytest.approx(100)
    assert found["ap_small"] == pytest.approx((100 + 0) / 2)
    assert "ap_medium" not in found
    assert found["ap"] == pytest.approx((100 + 100 * 51 / 101) / 2)


def test_boxes_move_back_to_the_original_picture() -> None:
    placed = {"scale": torch.tensor([[0.5, 0.5]]), "shift": torch.tensor([[0.0, 8.0]]), "size": torch.tensor([[48, 64]])}
    boxes = torch.tensor([[[1.0, 9.0, 11.0, 20.0], [-3.0, 0.0, 40.0, 40.0]]])
    assert original(boxes, placed).tolist() == [[[2, 2, 22, 24], [-6, -16, 80, 64]]]
    assert found_in_picture(boxes, placed).tolist() == [[[2, 2, 22, 24], [0, 0, 64, 48]]]
    assert torch.equal(original(boxes, {}), boxes)


def test_a_true_box_that_sticks_out_of_its_picture_is_measured_as_it_is_annotated() -> None:
    """As pycocotools has it: half of the box is a pixel outside, so what is found inside overlaps it by half alone."""
    placed = {"scale": torch.ones(1, 2), "shift": torch.zeros(1, 2), "size": torch.tensor([[48, 64]])}
    wanted = target(((-1.0, 0.0, 1.0, 10.0), 0)) | placed
    found = average_precision(kept_of(target(((0.0, 0.0, 1.0, 10.0), 0))), wanted)
    assert (found["ap50"], found["ap75"]) == (100, 0)


def test_an_objects_own_area_decides_its_size() -> None:
    wanted = target(((0.0, 0.0, 40.0, 40.0), 0))
    assert "ap_medium" in average_precision(kept_of(wanted), wanted)
    assert "ap_small" in average_precision(kept_of(wanted), {**wanted, "area": torch.tensor([[900.0, 0.0, 0.0]])})


def test_all_numbers_are_those_of_pycocotools_evaluation() -> None:
    """A hundred letterboxed pictures with crowds and areas of their own, against an evaluation of the annotations themselves."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    draw = np.random.default_rng(0)
    images, rows, kept_rows, classes = 100, 8, 20, 4
    size = torch.from_numpy(draw.integers(80, 400, (images, 2)))
    # Powers of two and whole numbers: no box is rounded on its way to the input and back.
    scale = 2.0 ** torch.from_numpy(draw.integers(-3, 1, (images, 1))).repeat(1, 2).float()
    shift = torch.from_numpy(draw.integers(0, 5, (images, 2))).float()
    corners = torch.from_numpy(draw.uniform(0, 1, (images, rows, 2)))
    sides = torch.from_numpy(draw.uniform(0.05, 0.6, (images, rows, 2)))
    extent = size.flip(1)[:, None].double()
    low = corners * extent
    truth = torch.cat([low, torch.minimum(low + sides * extent, extent)], -1).float()
    labels = torch.from_numpy(draw.integers(-1, classes, (images, rows)))
    crowd = torch.from_numpy(draw.random((images, rows)) < 0.1)
    area = (truth[..., 2:] - truth[..., :2]).prod(-1) * 0.7
    picked = torch.from_numpy(draw.integers(0, rows, (images, kept_rows)))
    found = truth.gather(1, picked[..., None].expand(-1, -1, 4)) + torch.from_numpy(draw.normal(0, 6, (images, kept_rows, 4))).float()
    found = torch.minimum(found.clamp(min=0), size.flip(1).repeat(1, 2)[:, None].float())
    scores = torch.from_numpy(draw.uniform(0.05, 1, (images, kept_rows))).float()
    given = labels.gather(1, picked).clamp(min=0)

    def placed(boxes: Tensor) -> Tensor:
        return boxes * scale.repeat(1, 2)[:, None] + shift.repeat(1, 2)[:, None]

    target_ = {"boxes": placed(truth), "labels": labels, "crowd": crowd, "area": area, "scale": scale, "shift": shift, "size": size}
    names = tuple(f"kind {label}" for label in range(classes))
    numbers = average_precision({"boxes": placed(found), "scores": scores, "classes": given}, target_, names)

    annotations: list[dict[str, Any]] = []
    for image in range(images):
        for row in range(rows):
            x0, y0, x1, y1 = truth[image, row].tolist()
            if labels[image, row] >= 0:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": int(labels[image, row]),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": float(area[image, row]),
                        "iscrowd": int(crowd[image, row]),
                    }
                )
    dataset = {
        "images": [{"id": image, "height": int(h), "width": int(w)} for image, (h, w) in enumerate(size.tolist())],
        "categories": [{"id": label, "name": name} for label, name in enumerate(names)],
        "annotations": annotations,
    }
    results = [
        {"image_id": i, "category_id": int(given[i, k]), "score": float(scores[i, k]), "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for i in range(images)
        for k in range(kept_rows)
        for x0, y0, x1, y1 in [found[i, k].tolist()]
    ]
    truth_set = COCO()
    truth_set.dataset = dataset
    truth_set.createIndex()
    evaluation = COCOeval(truth_set, truth_set.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = dict(zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), 100 * evaluation.stats[:6], strict=True))
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    of_classes = evaluation.eval["precision"][:, :, :, 0, -1]
    assert {name: numbers[f"ap/{name}"] for name in names} == pytest.approx(
        {name: 100 * of_classes[:, :, label].mean() for label, name in enumerate(names)}, abs=1e-9
    )


def test_boxes_that_two_detectors_share_are_of_one_class_and_overlap_by_half() -> None:
    one = kept_of(target((TEN, 0), ((20.0, 20.0, 30.0, 30.0), 1)))
    assert shared_boxes(one, one) == 1
    other = kept_of(target((TEN, 1), ((20.0, 20.0, 30.0, 30.0), 1)))
    assert shared_boxes(one, other) == 0.5
    nothing = {name: torch.zeros_like(values) for name, values in one.items()}
    assert shared_boxes(nothing, nothing) == 1
    assert shared_boxes(one, nothing) == 0
