"""What anchors learn: by hand, and against torchvision's own losses on the same inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from kdbench.models.detectors.anchors import AnchorReading, DefaultBoxReading, encode
from kdbench.tasks.anchor_losses import AnchorLosses, DefaultBoxLosses, hardest, match
from tests.tasks.scenes import noise, target

RETINA = AnchorReading(3, (8, 16), sizes=((8, 12), (16, 24)))
DEFAULT = DefaultBoxReading(3, (8, 16), scales=(0.25, 0.5, 1.0), ratios=((2.0,), (2.0,)))
SIZE = (32, 32)
OBJECTS = (((3.2, 4.1, 13.7, 15.3), 2), ((10.3, 9.1, 29.6, 30.2), 0), ((21.5, 3.3, 26.9, 8.8), 1))


def predicted(reading: AnchorReading | DefaultBoxReading, images: int = 1) -> dict[str, Tensor]:
    return {name: noise(images, *shape) for name, shape in reading.shapes(SIZE).items()}


def joined(*targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in targets]) for name in targets[0]}


ANCHORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [0, 0, 4, 10], [50, 50, 60, 60]])


def test_an_anchor_learns_the_object_that_it_overlaps_enough() -> None:
    matches = match(target(((0.0, 0, 10, 10), 2)), ANCHORS, above=0.5, below=0.4, best="none")
    assert matches.labels[0].tolist() == [2, 2, -1, -1, -1]
    assert matches.between[0].tolist() == [False, False, False, True, False]
    assert matches.boxes[0, 1].tolist() == [0, 0, 10, 10]
    assert matches.counts.tolist() == [2]


def test_the_best_anchor_of_an_object_learns_it_however_little_they_overlap() -> None:
    far = target(((28.0, 28, 40, 40), 1))
    assert (match(far, ANCHORS, above=0.5, below=0.4, best="none").labels == -1).all()
    for best in ("any", "its own"):
        assert match(far, ANCHORS, above=0.5, below=0.4, best=best).labels[0].tolist() == [-1, -1, 1, -1, -1]
    nowhere = target(((100.0, 100, 110, 110), 1))
    assert (match(nowhere, ANCHORS, above=0.5, below=0.4, best="any").labels == -1).all()


def test_where_it_is_the_best_of_another_object_ssd_gives_the_anchor_to_it_and_retinanet_to_the_one_that_it_overlaps_most() -> None:
    two = target(((0.0, 0, 10, 10), 0), ((0.0, 0, 1, 1), 1))
    alone = ANCHORS[[0, 4]]
    assert match(two, alone, above=0.5, below=0.4, best="any").labels[0].tolist() == [0, -1]
    assert match(two, alone, above=0.5, below=0.4, best="its own").labels[0].tolist() == [1, -1]


@pytest.mark.parametrize("rows", [0, 4])
def test_crowds_padding_and_boxes_without_an_area_are_learned_by_no_anchor(rows: int) -> None:
    none = target(rows=rows)
    none["boxes"][:] = torch.tensor([0.0, 0, 10, 10])
    assert (match(none, ANCHORS, above=0.5, below=0.4, best="any").labels == -1).all()
    crowd = target(((0.0, 0, 10, 10), 0)) | {"crowd": torch.tensor([[True, False, False]])}
    assert (match(crowd, ANCHORS, above=0.5, below=0.4, best="any").labels == -1).all()
    flat = target(((0.0, 0, 0, 10), 0))
    assert (match(flat, ANCHORS, above=0.5, below=0.4, best="its own").labels == -1).all()


@pytest.mark.parametrize(("best", "theirs"), [("any", Matcher(0.5, 0.4, True)), ("its own", SSDMatcher(0.5))])
def test_matches_are_torchvisions(best: str, theirs: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        low = torch.rand(6, 2, generator=generator) * 20
        boxes = torch.cat([low, low + 2 + torch.rand(6, 2, generator=generator) * 20], dim=1)
        anchors = RETINA.anchors(SIZE)
        labels = torch.arange(6)
        ours = match({"boxes": boxes[None], "labels": labels[None]}, anchors, above=0.5, below=0.4 if best == "any" else 0.5, best=best)
        found = theirs(box_iou(boxes, anchors))
        assert torch.equal(ours.labels[0], torch.where(found >= 0, found, -1))
        assert torch.equal(ours.between[0], found == -2)


def test_retinanets_losses_are_torchvisions_for_one_image() -> None:
    prediction, objects = predicted(RETINA), target(*OBJECTS)
    ours = AnchorLosses(RETINA).losses(prediction, objects, SIZE)
    logits, offsets = RETINA.split(prediction)
    anchors = RETINA.anchors(SIZE).double()
    one = {"boxes": objects["boxes"][0].double(), "labels": objects["labels"][0]}
    found = Matcher(0.5, 0.4, True)(box_iou(one["boxes"], anchors))
    head = RetinaNetHead(8, RETINA.per_cell[0], 3)
    theirs = head.compute_loss([one], {"cls_logits": logits, "bbox_regression": offsets}, [anchors], [found])
    torch.testing.assert_close(ours["focal"], theirs["classification"])
    torch.testing.assert_close(ours["l1"], theirs["bbox_regression"])


def test_ssds_losses_are_torchvisions_for_several_images() -> None:
    prediction, objects = predicted(DEFAULT, 3), joined(target(*OBJECTS), target(OBJECTS[1], rows=3), target(*OBJECTS[1:]))
    ours = DefaultBoxLosses(DEFAULT).losses(prediction, objects, SIZE)
    logits, offsets = DEFAULT.split(prediction)
    anchors = DEFAULT.anchors(SIZE).double()
    each = []
    for boxes, labels in zip(objects["boxes"].double(), objects["labels"], strict=True):
        each.append({"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1})
    found = [SSDMatcher(0.5)(box_iou(one["boxes"], anchors)) for one in each]
    theirs: Any = nn.Module()
    theirs.box_coder, theirs.neg_to_pos_ratio = BoxCoder((10.0, 10.0, 5.0, 5.0)), 3.0
    expected = SSD.compute_loss(theirs, each, {"cls_logits": logits, "bbox_regression": offsets}, [anchors] * 3, found)
    torch.testing.assert_close(ours["cross_entropy"], expected["classification"])
    torch.testing.assert_close(ours["smooth_l1"], expected["bbox_regression"])


@pytest.mark.parametrize("losses", [AnchorLosses(RETINA), DefaultBoxLosses(DEFAULT)])
def test_a_batch_has_the_loss_of_its_images_weighed_by_what_counts(losses: AnchorLosses | DefaultBoxLosses) -> None:
    prediction = predicted(losses.reading, 3)
    each = [target(*OBJECTS), target(OBJECTS[2], rows=3), target(rows=3)]
    whole, weights = losses.losses(prediction, joined(*each), SIZE), losses.weights(joined(*each), SIZE)
    for name, value in whole.items():
        parts = [losses.losses({k: v[i : i + 1] for k, v in prediction.items()}, one, SIZE)[name] for i, one in enumerate(each)]
        counts = [losses.weights(one, SIZE)[name] for one in each]
        assert sum(counts) == weights[name] > 0
        total = sum(part * count.clamp(min=1) for part, count in zip(parts, counts, strict=True)) / weights[name]
        torch.testing.assert_close(value, total)


@pytest.mark.parametrize("losses", [AnchorLosses(RETINA), DefaultBoxLosses(DEFAULT)])
def test_gradients_are_those_of_the_losses_and_finite_without_objects(losses: AnchorLosses | DefaultBoxLosses) -> None:
    small: Any = type(losses)(
        AnchorReading(2, (16,), sizes=((16,),), ratios=(1.0,))
        if isinstance(losses, AnchorLosses)
        else DefaultBoxReading(2, (16,), scales=(0.5, 1.0), ratios=((),))
    )
    names = small.reading.names
    tensors = [noise(1, *shape).requires_grad_() for shape in small.reading.shapes(SIZE).values()]
    objects = target(((1.0, 2.0, 17.0, 18.0), 1))

    def total(*levels: Tensor) -> Tensor:
        return torch.stack(list(small.losses(dict(zip(names, levels, strict=True)), objects, SIZE).values())).sum()

    assert torch.autograd.gradcheck(total, tensors)
    for values in (tensors, [tensor.detach() * 1e3 for tensor in tensors]):
        given = [value.detach().float().requires_grad_() for value in values]
        terms = small.losses(dict(zip(names, given, strict=True)), target(rows=2), SIZE)
        sum(terms.values()).backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in given)
        assert all(term.isfinite() for term in terms.values())


def test_anchors_in_between_learn_nothing() -> None:
    reading = AnchorReading(1, (16,), sizes=((16,),), ratios=(1.0,))
    prediction = {"level:0": torch.zeros(1, 5, 2, 2)}
    # The anchor around (0, 0) spans -8 .. 8, that around (16, 16) 8 .. 24, each 256 pixels; the object (10, 10, 26, 24) has 224.
    objects = target(((10.0, 10.0, 26.0, 24.0), 0))
    losses = AnchorLosses(reading).losses(prediction, objects, SIZE)
    # Three anchors are background with a score of 1/2: 0.75 * 0.25 * log 2 each, the fourth 0.25 * 0.25 * log 2.
    assert losses["focal"].item() == pytest.approx((3 * 0.75 + 0.25) * 0.25 * math.log(2))
    wanted = encode(torch.tensor([[10.0, 10.0, 26.0, 24.0]]), torch.tensor([[8.0, 8.0, 24.0, 24.0]]))
    assert losses["l1"].item() == pytest.approx(wanted.abs().sum().item())
    between = target(((8.0, 8.0, 24.0, 24.0), 0), ((8.0, 0.0, 24.0, 16.0), 0))  # the second one is half of the anchor above the first
    matches = match(between, torch.tensor([[8.0, 8.0, 24.0, 24.0], [12.0, 1.0, 28.0, 14.0]]), above=0.7, below=0.4, best="none")
    assert matches.between[0].tolist() == [False, True]


def test_the_hardest_places_of_each_image() -> None:
    losses = torch.tensor([[0.1, 0.9, -math.inf, 0.5], [0.2, 0.2, 0.2, -math.inf]])
    assert hardest(losses, torch.tensor([2, 9])).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert not hardest(losses, torch.tensor([0, 0])).any()


def test_ssd_learns_three_background_boxes_for_each_object() -> None:
    reading = DefaultBoxReading(1, (8,), scales=(0.5, 0.01), ratios=((),))
    prediction = {"level:0": torch.zeros(1, 2 * 6, 2, 2)}
    cells = prediction["level:0"].view(2, 6, 2, 2)
    cells[1, 1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # the second boxes of the cells take the ground for an object
    losses = DefaultBoxLosses(reading).losses(prediction, target(((0.0, 0.0, 8.0, 8.0), 0)), (16, 16))
    hard = sum(F.cross_entropy(torch.tensor([[0.0, x]]), torch.tensor([0])).item() for x in (2.0, 3.0, 4.0))
    assert losses["cross_entropy"].item() == pytest.approx(math.log(2) + hard)
    assert losses["smooth_l1"].item() == 0
