"""What two stages learn: by hand, against torchvision's own losses, and whatever batch an image stands in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork

from kdbench.data.kinds import has_box
from kdbench.models.detectors.anchors import encode
from kdbench.models.detectors.two_stage import ROI_WEIGHTS, TwoStageReading
from kdbench.tasks.anchor_losses import Matches, match
from kdbench.tasks.two_stage_losses import TwoStageLosses, drawn
from tests.tasks.scenes import noise, target

SIZE = (64, 64)
READING = TwoStageReading(3, (4, 8), sizes=((8,), (16,)), proposals=12)
LOSSES = TwoStageLosses(READING)
OBJECTS = (((3.2, 4.1, 13.7, 15.3), 2), ((10.3, 9.1, 29.6, 30.2), 0), ((41.5, 33.3, 56.9, 58.8), 1))


def scene(*objects: tuple[tuple[float, ...], int], seed: int = 11) -> dict[str, Tensor]:
    return target(*objects, rows=3) | {"draws": torch.tensor([seed])}


def joined(*each: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}


def predicted(images: int, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """With proposals near the objects, the objects themselves, and a row of padding."""
    given = {name: noise(images, *shape) for name, shape in READING.shapes(SIZE).items()}
    boxes = targets["boxes"].double()
    near = torch.where((targets["labels"] >= 0)[..., None], boxes + noise(images, 3, 4), 0)
    far = noise(images, 5, 2).abs() * 10
    given["proposals"] = torch.cat([boxes, near, torch.cat([far, far + 12], dim=-1), torch.zeros(images, 1, 4)], dim=1)
    assert given["proposals"].shape[1] == 12
    return given


def test_drawn_anchors_are_half_positive_at_most_and_follow_from_the_draws_alone() -> None:
    labels = torch.full((2, 2000), -1)
    labels[0, :300] = 1
    labels[1, :20] = 0
    between = torch.zeros(2, 2000, dtype=torch.bool)
    between[:, 1900:] = True
    matches = Matches(labels, torch.zeros(2, 2000, 4), between)
    learned = drawn(matches, torch.tensor([5, 6]))
    assert learned.sum(1).tolist() == [256, 256]
    assert (learned & matches.positive).sum(1).tolist() == [128, 20]
    assert not (learned & between).any()
    alone = drawn(Matches(labels[1:], torch.zeros(1, 2000, 4), between[1:]), torch.tensor([6]))
    assert torch.equal(alone[0], learned[1])
    assert not torch.equal(drawn(matches, torch.tensor([7, 6]))[0], learned[0])
    counts = torch.zeros(2000)
    for draw in range(400):
        counts += drawn(Matches(labels[:1], torch.zeros(1, 2000, 4), between[:1]), torch.tensor([draw]))[0]
    assert counts[:300].min() > 110  # 400 * 128 / 300 = 171 expected, 10 the deviation
    assert 10 < counts[300:1900].min() < counts[300:1900].max() < 60


def test_the_first_stages_losses_are_torchvisions_on_the_same_anchors() -> None:
    objects = scene(*OBJECTS)
    given = predicted(1, objects)
    ours = LOSSES.losses(given, objects, SIZE)
    logits, offsets = READING.first.split(given)
    anchors = READING.first.anchors(SIZE).double()
    matches = match(objects, anchors, above=0.7, below=0.3, best="any")
    learned = drawn(matches, objects["draws"])[0]
    positive = matches.positive[0]
    peer = RegionProposalNetwork.__new__(RegionProposalNetwork)
    torch.nn.Module.__init__(peer)
    peer.fg_bg_sampler = lambda _: ([(learned & positive).byte()], [(learned & ~positive).byte()])
    wanted = torch.zeros_like(anchors)
    wanted[positive] = encode(matches.boxes[0][positive], anchors[positive])
    objectness, boxes = peer.compute_loss(logits[0], offsets[0], [positive.double()], [wanted])
    torch.testing.assert_close(ours["objectness"], objectness)
    torch.testing.assert_close(ours["rpn_boxes"], boxes)
    assert int((learned & positive).sum()) >= 3


def test_the_second_stages_losses_are_torchvisions_on_the_same_proposals() -> None:
    objects = scene(*OBJECTS)
    given = predicted(1, objects)
    ours = LOSSES.losses(given, objects, SIZE)
    proposals = given["proposals"][0]
    matches = match(objects, proposals, above=0.5, below=0.5, best="none")
    real = has_box(proposals)
    labels = (matches.labels[0] + 1)[real]
    wanted = torch.zeros_like(proposals[real])
    wanted[labels > 0] = encode(matches.boxes[0][real][labels > 0], proposals[real][labels > 0], ROI_WEIGHTS)
    background = torch.zeros(int(real.sum()), 1, 4, dtype=torch.float64)
    offsets = torch.cat([background, given["roi_offsets"][0][real]], dim=1).flatten(1)
    classes, boxes = fastrcnn_loss(given["roi_logits"][0][real], offsets, [labels], [wanted])
    torch.testing.assert_close(ours["roi_classes"], classes)
    torch.testing.assert_close(ours["roi_boxes"], boxes)
    assert int((labels > 0).sum()) >= 3


def test_a_batch_has_the_mean_of_its_images_also_where_one_has_no_object() -> None:
    each = [scene(*OBJECTS), scene(OBJECTS[1], seed=12), scene(seed=13)]
    whole = joined(*each)
    given = predicted(3, whole)
    losses = LOSSES.losses(given, whole, SIZE)
    assert {name: int(weight) for name, weight in LOSSES.weights(whole, SIZE).items()} == dict.fromkeys(losses, 3)
    alone = [LOSSES.losses({name: values[i : i + 1] for name, values in given.items()}, one, SIZE) for i, one in enumerate(each)]
    for name, value in losses.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in alone]).mean())
    assert alone[2]["roi_boxes"] == alone[2]["rpn_boxes"] == 0
    assert alone[2]["roi_classes"] > 0


def test_the_second_stage_by_hand() -> None:
    objects = target(((0.0, 0.0, 8.0, 8.0), 1), rows=1) | {"draws": torch.tensor([0])}
    given = {name: torch.zeros(1, *shape) for name, shape in READING.shapes(SIZE).items()}
    given["proposals"] = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 6.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 0.0, 0.0]]])
    given["roi_logits"], given["roi_offsets"] = torch.zeros(1, 4, 4), torch.zeros(1, 4, 3, 4)
    losses = LOSSES.losses(given, objects, SIZE)
    assert losses["roi_classes"].item() == pytest.approx(math.log(4))
    # The second proposal moves down by 1/6 of its height and grows by 8/6: offsets 10/6 and 5 log(4/3), both beyond 1/9.
    assert losses["roi_boxes"].item() == pytest.approx((10 / 6 + 5 * math.log(4 / 3) - 2 / 18) / 3)


def test_gradients_are_those_of_the_losses_and_finite_without_objects() -> None:
    reading = TwoStageReading(2, (16,), sizes=((16,),), ratios=(1.0,), proposals=3)
    losses, shapes = TwoStageLosses(reading), reading.shapes((32, 32))
    proposals = torch.tensor([[[1.0, 2.0, 17.0, 18.0], [2.0, 2.0, 17.0, 16.0], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    names = [name for name in reading.names if name != "proposals"]
    tensors = [(noise(1, *shapes[name]) * 0.3 + 0.4).requires_grad_() for name in names]
    objects = target(((1.0, 2.0, 17.0, 18.0), 1)) | {"draws": torch.tensor([4])}

    def total(*given: Tensor) -> Tensor:
        prediction = dict(zip(names, given, strict=True)) | {"proposals": proposals}
        return torch.stack(list(losses.losses(prediction, objects, (32, 32)).values())).sum()

    assert torch.autograd.gradcheck(total, tensors)
    given = [tensor.detach().float().mul(1e3).requires_grad_() for tensor in tensors]
    prediction = dict(zip(names, given, strict=True)) | {"proposals": torch.zeros(1, 3, 4)}
    terms = losses.losses(prediction, target(rows=2) | {"draws": torch.tensor([4])}, (32, 32))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in given)
