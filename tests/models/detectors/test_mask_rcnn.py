"""Mask R-CNN on backbones by name, against torchvision's own network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdbench.models.detectors.proposals import best_of_classes
from tests.models.detectors.torchvisions import SMALL, assert_same, ours, padded, pictures, tame, theirs

NAME = "maskrcnn_resnet50_fpn"
TINY = {"backbone": "resnet10t", "width": 16, "levels": 3, "anchor": 16, "hidden": 32, "proposals": 40, "learned": 70, "drawn": 12}


@pytest.mark.nodes
def test_with_the_same_weights_boxes_and_masks_are_torchvisions_on_padded_pictures() -> None:
    peer = theirs(NAME, True, **SMALL, box_detections_per_img=100)
    head = "roi_heads.box_predictor"
    tame(peer, {"rpn.head.cls_logits": (0.0, 2.0), "rpn.head.bbox_pred": (0.0, 0.2)})
    tame(peer, {f"{head}.cls_score": (0.0, 2.0), f"{head}.bbox_pred": (0.0, 0.5), "roi_heads.mask_predictor.mask_fcn_logits": (0.0, 2.0)})
    network = ours(NAME)
    network.load_state_dict(peer.state_dict())
    batch, valid = padded()
    with torch.no_grad():
        kept = network.reading.detections(network(batch, valid=valid), (128, 256), 100, valid)
        images, _ = peer.transform(pictures())
        maps = peer.backbone(images.tensors)
        found, _ = peer.roi_heads(maps, peer.rpn(images, maps)[0], images.image_sizes)
    assert_same(kept, found, background=True)
    for row, image in enumerate(found):
        torch.testing.assert_close(kept["masks"][row, : len(image["masks"])], image["masks"][:, 0], rtol=0, atol=1e-4)
        assert image["masks"].std() > 0.1


@pytest.mark.parametrize("size", [(64, 64), (65, 100)])
def test_a_prediction_has_the_shapes_that_its_reading_says(size: tuple[int, int]) -> None:
    network = ours("mask_rcnn", **TINY)
    given = network(torch.rand(2, 3, *size))
    assert {key: tuple(value.shape[1:]) for key, value in given.items()} == network.reading.shapes(size)
    for count in (5, 12, 20):
        kept = network.reading.detections(given, size, count)
        assert {name: tuple(values.shape) for name, values in kept.items()} == {
            "boxes": (2, count, 4),
            "scores": (2, count),
            "classes": (2, count),
            "masks": (2, count, 28, 28),
        }
    assert kept["classes"].dtype == torch.int64


def test_in_training_masks_are_learned_where_proposals_overlap_the_true_boxes() -> None:
    network = ours("mask_rcnn", **TINY).train()
    boxes = torch.tensor([[[3.0, 4.0, 20.0, 30.0], [5.0, 5.0, 9.0, 9.0]], [[0.0, 0.0, 40.0, 40.0], [0.0, 0.0, 0.0, 0.0]]])
    labels = torch.tensor([[1, -1], [0, -1]])
    given = network(torch.rand(2, 3, 64, 64), boxes=boxes, labels=labels)
    assert given["mask_boxes"][:, 0].tolist() == [[3, 4, 20, 30], [0, 0, 40, 40]]  # the true boxes themselves overlap most
    assert given["mask_classes"][:, 0].tolist() == [1, 0]
    assert set(given["mask_classes"][0].tolist()) == {1, -1}
    assert given["masks"].shape == (2, 64, 28, 28)
    nothing = network(torch.rand(2, 3, 64, 64))
    assert (nothing["mask_classes"] == -1).all()
    total: Tensor = sum(values.square().sum() for name, values in given.items() if values.requires_grad)
    total.backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


def test_the_best_boxes_of_classes_are_suppressed_within_each_class() -> None:
    one = torch.tensor([0.0, 0.0, 10.0, 10.0])
    boxes = torch.stack([one, one + 0.5, one + 30])[None, :, None].expand(1, 3, 2, 4)
    scores = torch.tensor([[[0.9, 0.2], [0.8, 0.3], [0.04, 0.6]]])
    found, values, classes = best_of_classes(boxes, scores, (64, 64), None, count=5, most=10, lowest=0.05, overlap=0.5)
    assert values[0].tolist() == pytest.approx([0.9, 0.6, 0.3, 0, 0])
    assert classes[0].tolist() == [0, 1, 1, 0, 0]
    assert found[0].tolist() == [[0, 0, 10, 10], [30, 30, 40, 40], [0.5, 0.5, 10.5, 10.5], [0, 0, 0, 0], [0, 0, 0, 0]]
