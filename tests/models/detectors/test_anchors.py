"""Anchors, offsets and scores against torchvision's own code and against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from kdbench.models.detectors.anchors import (
    PLAIN,
    AnchorReading,
    DefaultBoxReading,
    anchor_sizes,
    decode,
    encode,
    log_odds,
)

RETINA = AnchorReading(3, (8, 16, 32, 64, 128), sizes=anchor_sizes(32, 5))
SCALES = tuple(0.2 + 0.75 * k / 5 for k in range(6))
SSD = DefaultBoxReading(3, (16, 32, 64, 128, 256, 512), scales=(*SCALES, 1.0), ratios=((2.0, 3.0),) * 6)


def images(size: tuple[int, int]) -> ImageList:
    return ImageList(torch.zeros(1, 3, *size), [size])


def maps(reading: AnchorReading | DefaultBoxReading, size: tuple[int, int]) -> list[Tensor]:
    return [torch.zeros(1, *shape) for shape in reading.shapes(size).values()]


@pytest.mark.parametrize("size", [(128, 256), (64, 64), (96, 160)])
def test_anchors_are_torchvisions_at_any_size(size: tuple[int, int]) -> None:
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    theirs = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(images(size), maps(RETINA, size))[0]
    assert RETINA.sizes == sizes
    assert RETINA.per_cell == (9,) * 5
    torch.testing.assert_close(RETINA.anchors(size), theirs)
    assert sum(RETINA.places_of_levels(size)) == len(theirs)


@pytest.mark.parametrize("size", [(320, 320), (64, 64), (96, 160)])
def test_default_boxes_are_torchvisions_at_any_size(size: tuple[int, int]) -> None:
    theirs = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)(images(size), maps(SSD, size))[0]
    torch.testing.assert_close(SSD.anchors(size), theirs, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("weights", [PLAIN, (10.0, 10.0, 5.0, 5.0)])
def test_offsets_are_torchvisions_and_decoding_is_their_inverse(weights: tuple[float, float, float, float]) -> None:
    low, sides = torch.rand(50, 4) * 40, torch.rand(50, 4) * 30 + 1
    boxes, anchors = (torch.cat([low[:, i : i + 2], low[:, i : i + 2] + sides[:, i : i + 2]], dim=1) for i in (0, 2))
    coder = BoxCoder(weights)
    torch.testing.assert_close(encode(boxes, anchors, weights), coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(encode(boxes, anchors, weights), anchors, weights), boxes, rtol=1e-5, atol=1e-4)
    wild = torch.randn(50, 4) * 20
    torch.testing.assert_close(decode(wild, anchors, weights), coder.decode_single(wild, anchors), rtol=1e-5, atol=1e-3)


def test_offsets_by_hand() -> None:
    anchor, box = torch.tensor([0.0, 0.0, 10.0, 20.0]), torch.tensor([5.0, 10.0, 25.0, 20.0])
    assert encode(box, anchor).tolist() == pytest.approx([1.0, 0.25, math.log(2), math.log(0.5)])
    assert decode(torch.full((1, 4), 1e4), anchor[None]).isfinite().all()


def test_an_anchor_is_read_where_it_stands() -> None:
    """The channels of a cell's second anchor, at a row and column, are those of the anchor that lies there."""
    reading = AnchorReading(2, (8,), sizes=((16, 32),), ratios=(1.0,))
    prediction = {"level:0": torch.zeros(1, 12, 2, 3)}
    prediction["level:0"][0, 6 + 1, 1, 2] = 4.0  # the second anchor's second class, row 1, column 2
    prediction["level:0"][0, 6 + 2 :, 1, 2] = torch.tensor([0.5, 0.0, 0.0, math.log(2)])
    logits, boxes = reading.dense(prediction, (16, 24))
    (place,) = logits[0, :, 1].nonzero().flatten().tolist()
    assert place == (1 * 3 + 2) * 2 + 1
    # The anchor is 32 pixels wide around (16, 8); it moves by half its width and doubles its height.
    assert boxes[0, place].tolist() == [16 - 16 + 16, 8 - 32, 16 + 16 + 16, 8 + 32]
    assert boxes[0, 0].tolist() == [-8, -8, 8, 8]


def test_the_sigmoid_of_log_odds_is_the_softmax() -> None:
    logits = torch.randn(4, 7, 5, dtype=torch.float64) * 5
    torch.testing.assert_close(log_odds(logits).sigmoid(), logits.softmax(-1))
    assert torch.autograd.gradcheck(log_odds, logits[:1, :2].requires_grad_())


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_log_odds_are_finite_in_value_and_gradient(size: float) -> None:
    logits = torch.tensor([[size, 0.0, -size], [size, size, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    odds = log_odds(logits)
    odds.square().sum().backward()
    assert odds.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert odds[0, 0] == size


def test_ssd_scores_exclude_each_other_and_the_background_is_no_class() -> None:
    reading = DefaultBoxReading(2, (8,), scales=(0.5, 0.9), ratios=((),))
    prediction = {"level:0": torch.zeros(1, 2 * 7, 1, 1)}
    prediction["level:0"][0, :3, 0, 0] = torch.tensor([0.0, math.log(6), math.log(3)])
    prediction["level:0"][0, 7:10, 0, 0] = torch.tensor([9.0, -9.0, -9.0])
    kept = reading.detections(prediction, (8, 8), 4)
    assert kept["scores"][0].tolist() == pytest.approx([0.6, 0.3, 0, 0], abs=1e-6)
    assert kept["classes"][0].tolist() == [0, 1, 0, 0]
    assert kept["boxes"][0, 0].tolist() == [2, 2, 6, 6]
    torch.testing.assert_close(reading.dense(prediction, (8, 8)).logits[0, 0].sigmoid(), torch.tensor([0.6, 0.3]))


def test_each_class_has_so_many_candidates_in_ssd() -> None:
    reading = DefaultBoxReading(2, (4,), scales=(0.2, 0.2), ratios=((),), most=1)
    prediction = {"level:0": torch.zeros(1, 14, 2, 2)}
    prediction["level:0"][0, 1] = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    kept = reading.detections(prediction, (8, 8), 4)
    assert (kept["scores"] > 0).sum() == 2  # one of each class
    assert kept["classes"][0, :2].tolist() == [0, 1]


def test_readings_say_what_must_agree_to_compare_them() -> None:
    assert RETINA.places == ("9 anchors a cell from 32, 64, 128, 256, 512 pixels on", (8, 16, 32, 64, 128))
    assert SSD.of_places == "6 anchors a cell"
