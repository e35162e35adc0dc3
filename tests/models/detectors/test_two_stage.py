"""Faster R-CNN on backbones by name, against torchvision's own network; proposals of fixed number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from kdbench.errors import UserError
from kdbench.models.detectors import proposals as stage
from kdbench.models.detectors.proposals import best_proposals, pooled
from kdbench.models.detectors.two_stage import TwoStageReading
from kdbench.models.taps import probe
from tests.models.detectors.torchvisions import ALL, SMALL, assert_same, ours, padded, pictures, tame, theirs

NAME = "fasterrcnn_resnet50_fpn"
TINY = {"backbone": "resnet10t", "width": 16, "levels": 3, "anchor": 16, "hidden": 32, "proposals": 40, "learned": 24}


def test_with_the_same_weights_boxes_are_torchvisions_on_padded_pictures() -> None:
    peer = theirs(NAME, True, **SMALL, box_detections_per_img=ALL)
    head = "roi_heads.box_predictor"
    spreads = {
        "rpn.head.cls_logits": (0.0, 2.0),
        "rpn.head.bbox_pred": (0.0, 0.2),
        f"{head}.cls_score": (0.0, 2.0),
        f"{head}.bbox_pred": (0.0, 0.5),
    }
    tame(peer, spreads)
    network = ours(NAME)
    network.load_state_dict(peer.state_dict())
    batch, valid = padded()
    with torch.no_grad():
        kept = network.reading.detections(network(batch, valid=valid), (128, 256), ALL, valid)
        found = peer(pictures())
    assert_same(kept, found, background=True)


def test_a_preset_builds_what_torchvisions_weights_need() -> None:
    network = ours(NAME, preset="coco_v1")
    assert {layer.eps for layer in network.modules() if isinstance(layer, FrozenBatchNorm2d)} == {0.0}
    assert network.state_dict().keys() == {key for key in theirs(NAME, True).state_dict() if "num_batches_tracked" not in key}


@pytest.mark.parametrize("size", [(64, 64), (65, 100)])
def test_a_prediction_has_the_shapes_that_its_reading_says_at_any_size(size: tuple[int, int]) -> None:
    for levels in (2, 5):
        network = ours("faster_rcnn", **{**TINY, "levels": levels})
        given = network(torch.rand(2, 3, *size))
        assert {key: tuple(value.shape[1:]) for key, value in given.items()} == network.reading.shapes(size)
        kept = network.reading.detections(given, size, 7)
        assert kept["boxes"].shape == (2, 7, 4)
        logits, boxes = network.reading.dense(given, size)
        assert logits.shape[1:] == (boxes.shape[1], 1)  # what kd imitates: the first stage alone


def test_in_training_the_true_boxes_join_the_proposals() -> None:
    network = ours("faster_rcnn", **TINY)
    boxes = torch.tensor([[[3.0, 4.0, 20.0, 30.0], [5.0, 5.0, 9.0, 9.0]]]).expand(2, -1, -1)
    labels = torch.tensor([[1, -1], [0, 2]])
    evaluated = network(torch.rand(2, 3, 64, 64), boxes=boxes, labels=labels)
    assert evaluated["proposals"].shape == (2, 40, 4)
    learned = network.train()(torch.rand(2, 3, 64, 64), boxes=boxes, labels=labels)
    assert learned["proposals"].shape == (2, 24 + 2, 4)
    assert learned["roi_logits"].shape == (2, 26, 6)
    assert learned["proposals"][:, 24:].tolist() == [[[3, 4, 20, 30], [0, 0, 0, 0]], [[3, 4, 20, 30], [5, 5, 9, 9]]]
    assert network(torch.rand(2, 3, 64, 64))["proposals"].shape == (2, 24, 4)


def test_every_weight_learns_and_no_gradient_goes_through_the_proposals() -> None:
    network = ours("faster_rcnn", **TINY).train()
    given = network(torch.rand(2, 3, 64, 64))
    assert not given["proposals"].requires_grad
    total: Tensor = sum(values.square().sum() for name, values in given.items() if name != "proposals")
    total.backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


def test_levels_are_taps_the_coarsest_too() -> None:
    network = ours("faster_rcnn", **{**TINY, "levels": 5})
    taps = probe(network, (3, 64, 64), [f"level:{level}" for level in range(5)]).taps
    assert [tap.shape for tap in taps.values()] == [(16, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1)]


def test_one_level_is_too_few() -> None:
    with pytest.raises(UserError, match="levels must be 2 or more for a detector of two stages"):
        ours("faster_rcnn", **{**TINY, "levels": 1})


def random_boxes(images: int, count: int) -> Tensor:
    low = torch.rand(images, count, 2) * 50 - 5
    return torch.cat([low, low + torch.rand(images, count, 2) * 30], dim=-1)


def test_proposals_are_the_best_after_suppression_within_each_level() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [-5, -5, -1, 0], [20, 20, 90, 30]]])
    scores = torch.tensor([[1.0, 3.0, 2.0, 9.0, -4.0]])
    # Levels of two and of three places: the first box goes for the second; the fourth lies outside; the last is cut at the edge.
    found = best_proposals(boxes, scores, (2, 3), (40, 64), None, count=5, most=9, overlap=0.7)
    assert found[0].tolist() == [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 64, 30], [0, 0, 0, 0], [0, 0, 0, 0]]
    valid = best_proposals(boxes, scores, (2, 3), (40, 64), torch.tensor([[25, 30]]), count=3, most=9, overlap=0.7)
    assert valid[0, 2].tolist() == [20, 20, 30, 25]
    assert best_proposals(boxes, scores, (2, 3), (40, 64), None, count=1, most=9, overlap=0.7)[0].tolist() == [[0, 0, 10, 9]]
    assert best_proposals(boxes, scores, (2, 3), (40, 64), None, count=2, most=1, overlap=0.7)[0].tolist() == [[0, 0, 10, 9], [0, 0, 0, 0]]


def test_one_suppression_of_all_images_keeps_what_one_an_image_keeps() -> None:
    boxes = random_boxes(3, 60).clamp(min=0, max=40)
    scores, of_level = torch.randn(3, 60), (torch.arange(60) // 20).expand(3, -1)
    large = (boxes[..., 2:] - boxes[..., :2] >= 1e-3).all(-1)
    call: Any = (boxes, scores, of_level, large, 0.5, (40, 40))
    alone, together = stage._kept_by_image(*call), stage._kept_in_one_call(*call) & large
    assert torch.equal(alone, together)
    assert 0 < int(alone.sum()) < int(large.sum())


def test_what_boxes_hold_is_torchvisions() -> None:
    maps = [torch.rand(2, 5, 128 // stride, 128 // stride) for stride in (4, 8, 16, 32)]
    low = torch.rand(2, 30, 2) * 60
    boxes = torch.cat([low, low + torch.rand(2, 30, 1) ** 3 * 500], dim=-1)
    peer = MultiScaleRoIAlign([str(level) for level in range(4)], 7, 2)
    expected = peer({str(level): x for level, x in enumerate(maps)}, list(boxes), [(128, 128)] * 2)
    given = pooled(maps, (4, 8, 16, 32), boxes, bins=7, turn=112)
    torch.testing.assert_close(given, expected)
    assert pooled(maps, (4, 8, 16, 32), torch.zeros(2, 3, 4), bins=7, turn=112).isfinite().all()


def test_a_proposal_is_read_with_the_offsets_of_its_class() -> None:
    reading = TwoStageReading(2, (4,), sizes=((16,),), proposals=2)
    logits = torch.log(torch.tensor([[[0.1, 0.6, 0.3], [0.9, 0.05, 0.05]]]))
    offsets = torch.zeros(1, 2, 2, 4)
    offsets[0, 0, 1, 0] = 5.0  # by half a width, as offsets are tenfold
    proposals = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 0.0, 0.0]]])
    kept = reading.detections({"proposals": proposals, "roi_logits": logits, "roi_offsets": offsets}, (32, 32), 3)
    assert kept["boxes"][0].tolist() == [[0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 0, 0]]
    assert kept["classes"][0].tolist() == [0, 1, 0]
    assert kept["scores"][0].tolist() == pytest.approx([0.6, 0.3, 0])
