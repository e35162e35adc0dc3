"""Masks of objects: what is learned of bit planes, what is measured in the original picture, one training on COCO's files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import masks_to_boxes

from kdbench.data.columns import several
from kdbench.data.sources import DataSpec, open_source
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.detectors.mask_rcnn import MaskReading
from kdbench.tasks.average_precision import measured
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.instance_masks import InstanceMasks, _found, _in_picture, _objects
from kdbench.tasks.mask_losses import MaskLosses, cut_masks, mask_of
from kdbench.training.loop import fit
from kdbench.training.outcome import rederive
from kdbench.training.session import LocalSession
from tests.data.test_coco import write
from tests.tasks.scenes import noise, target
from tests.training.units import layout, saved_teacher, unit

NETWORK = {"name": "mask_rcnn", "backbone": "resnet18", "preset": "coco_v1", "width": 8, "levels": 2, "anchor": 16}
NETWORK |= {"hidden": 8, "proposals": 20, "learned": 20, "drawn": 6}
READING = MaskReading(2, (4,), sizes=((16,),), proposals=3, drawn=3)


def planes_of(masks: torch.Tensor) -> torch.Tensor:
    """Bit planes [1, G, H, W] of masks [N, H, W]."""
    groups = masks.split(63)
    return torch.stack([sum(mask.long() << bit for bit, mask in enumerate(group)) for group in groups])[None]


def test_the_masks_of_drawn_shapes_are_their_pixels_and_their_boxes_are_theirs() -> None:
    """A view moves masks and boxes alike, and each mask's pixels have its object's class."""
    of = {"name": "shapes", "size": 32, "train": 20, "test": 2}
    masks, pixels = (open_source(DataSpec.model_validate({**of, "target": name})).train for name in ("masks", "mask"))
    wanted = several(masks.target)
    for image in range(20):
        rows = (wanted["labels"][image] >= 0).nonzero().flatten()
        drawn = mask_of(wanted["masks"][image], rows)
        assert torch.equal(masks_to_boxes(drawn) + torch.tensor([0, 0, 1, 1]), wanted["boxes"][image, rows])
        for row, mask in zip(rows.tolist(), drawn, strict=True):
            assert (pixels.labels[image][mask] == wanted["labels"][image, row] + 1).all()
        assert int(drawn.sum()) == int((pixels.labels[image] > 0).sum())


def test_a_mask_is_read_from_its_bit_of_its_plane() -> None:
    masks = torch.rand(70, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    planes = planes_of(masks)
    assert planes.shape == (1, 2, 4, 5)
    objects = torch.tensor([0, 62, 63, 69, 5])
    assert torch.equal(mask_of(planes[0], objects), masks[objects])


def test_the_loss_of_masks_is_torchvisions() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 4:20, 3:15], masks[1, 10:30, 12:22] = True, True
    objects = target(((3.0, 4.0, 15.0, 20.0), 1), ((12.0, 10.0, 22.0, 30.0), 0), rows=3) | {"masks": planes_of(masks)}
    boxes = torch.tensor([[[3.5, 4.0, 15.0, 19.0], [12.0, 11.0, 23.0, 30.0], [25.0, 0.0, 31.0, 6.0]]], dtype=torch.float64)
    logits = noise(1, 3, 28, 28)
    prediction = {"masks": logits, "mask_boxes": boxes, "mask_classes": torch.tensor([[1.0, 0.0, -1.0]])}
    ours = MaskLosses(READING)._drawn(prediction, objects)
    by_class = torch.stack([logits[0, :2]] * 2, dim=1)
    theirs = maskrcnn_loss(by_class, [boxes[0, :2]], [masks.to(torch.uint8)], [torch.tensor([1, 0])], [torch.tensor([0, 1])])
    torch.testing.assert_close(ours, theirs)
    none = {**prediction, "mask_classes": torch.full((1, 3), -1.0), "masks": logits.clone().requires_grad_()}
    loss = MaskLosses(READING)._drawn(none, objects)
    loss.backward()
    assert loss == 0
    assert not none["masks"].grad.any()


def test_a_mask_that_fills_half_of_its_box_is_cut_so() -> None:
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, :, :10] = True
    cut = cut_masks(planes_of(mask)[0], torch.tensor([0]), torch.tensor([[0.0, 0.0, 20.0, 20.0]]))
    torch.testing.assert_close(cut[0, :, :13], torch.ones(28, 13))
    torch.testing.assert_close(cut[0, :, 16:], torch.zeros(28, 12))


def scene() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:25, 10:30] = True
    masks[1, 20:36, 30:50] = True
    return target(((10.0, 5.0, 30.0, 25.0), 1), ((30.0, 20.0, 50.0, 36.0), 0), rows=3) | {"masks": planes_of(masks)}, masks


@pytest.mark.parametrize("filled", [28, 14])
def test_masks_are_measured_and_not_boxes(filled: int) -> None:
    """Full masks in the right boxes are right; masks that fill the left half of them overlap by half."""
    objects, _ = scene()
    masks = torch.zeros(1, 2, 28, 28, dtype=torch.uint8)
    masks[..., :filled] = 255
    kept = {"boxes": objects["boxes"][:, :2], "scores": torch.tensor([[0.9, 0.8]]), "classes": torch.tensor([[1, 0]]), "masks": masks}
    numbers = measured(_found(kept, objects, (40, 60)), _objects(objects, (40, 60)), 1, ("a", "b"), "segm", [(40, 60)])
    if filled == 28:
        assert numbers["ap"] > 79  # pasted edges are smooth, so overlaps are a little below 1
        assert numbers["ap75"] == 100
    else:
        assert numbers["ap75"] == 0
        assert numbers["ap"] < 25


def test_masks_go_back_to_the_size_of_the_original_picture() -> None:
    _, masks = scene()
    letterbox = {"scale": torch.tensor([[0.5, 0.5]]), "shift": torch.tensor([[0.0, 4.0]]), "size": torch.tensor([[64, 120]])}
    moved = _in_picture(masks, letterbox, 0, (40, 60))
    assert moved.shape == (2, 64, 120)
    assert int(moved[0].sum()) == 4 * 400
    assert moved[0].nonzero().amin(0).tolist() == [2, 20]  # row (5 - 4) / 0.5, column 10 / 0.5
    assert math.isclose(float(moved[1].sum()), 4 * 320)


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    for part in ("train2017", "val2017"):
        write(tmp_path, part)
    data = {"name": "coco", "path": str(tmp_path), "target": "masks", "size": 64}
    return {"name": "kdbench.tasks.instance_masks:InstanceMasks", "data": data, "val_size": 1}


def test_it_trains_on_cocos_files_with_kd(task: dict[str, Any], tmp_path: Path) -> None:
    teacher = saved_teacher(tmp_path, "fp32", NETWORK, task)
    recipe = {"epochs": 1, "batch_size": 2, "lr": 0.001, "augment": {"flip": True}}
    each = unit("kd", teacher, task=task, student=NETWORK, recipe=recipe)
    record = fit(each, LocalSession(), layout(tmp_path))
    assert record.metrics.keys() >= {"ap", "ap50", "box_ap", "box_ap50"}
    assert record.predictions_uri is not None
    assert rederive(record, build_task(each.task), (tmp_path / record.predictions_uri).read_bytes()) == record.metrics


def test_detection_keeps_boxes_alone_of_a_network_that_draws_masks(task: dict[str, Any]) -> None:
    boxes = build_task(TaskSpec.model_validate({**task, "name": "detection"}))
    masks = build_task(TaskSpec.model_validate(task))
    network = masks.build_model(ModelSpec.model_validate(NETWORK)).eval()
    assert several(boxes.predict(network, torch.rand(1, 3, 64, 64))).keys() == {"boxes", "scores", "classes"}
    kept = several(masks.predict(network, torch.rand(1, 3, 64, 64)))
    assert (kept["masks"].dtype, tuple(kept["masks"].shape)) == (torch.uint8, (1, 100, 28, 28))


def test_perfect_masks_of_cocos_files_have_full_precision(task: dict[str, Any]) -> None:
    """The masks that the data give, moved back to the pictures, are measured against themselves."""
    built = build_task(TaskSpec.model_validate(task))
    assert isinstance(built, InstanceMasks)
    wanted = several(built.splits().test.target)
    objects = _objects(wanted, built.size)
    assert len(objects) == 4
    found = [{**one, "score": 0.9} for one in objects if not one["iscrowd"]]
    sizes = [(int(height), int(width)) for height, width in wanted["size"].tolist()]
    assert measured(found, objects, len(sizes), built.source.class_names, "segm", sizes)["ap"] == pytest.approx(100)


def test_networks_without_masks_and_data_without_masks_are_refused(task: dict[str, Any]) -> None:
    built = build_task(TaskSpec.model_validate(task))
    with pytest.raises(UserError, match="model 'tiny_fcos' draws no masks; name one that does, such as mask_rcnn"):
        built.build_model(ModelSpec(name="tiny_fcos"))
    boxes = {**task, "data": {**task["data"], "target": "boxes"}}
    with pytest.raises(UserError, match=r"needs `masks` \[N, G, H, W\] of the objects; data 'coco' gives .*; use target: masks"):
        build_task(TaskSpec.model_validate(boxes))
    with pytest.raises(UserError, match="learns from `masks` of the objects, and these data have none"):
        MaskLosses(READING).losses({}, target(rows=1), (32, 32))
