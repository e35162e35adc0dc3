from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from kdbench.data.columns import several
from kdbench.errors import UserError
from kdbench.models.detectors.cells import CellReading
from kdbench.models.detectors.readings import Dense
from kdbench.models.outputs import Outputs
from kdbench.tasks.detector_imitation import imitation, imitation_loss
from tests.tasks.scenes import CENTRES, boxes_around, levels, noise


def said(images: int, classes: int = 3, scale: float = 2.0, shift: float = 0.0) -> Dense:
    return Dense(scale * noise(images, 80, classes) - 1, boxes_around(CENTRES, images) + shift)


def test_it_is_what_it_says_image_by_image() -> None:
    student, teacher = said(3, shift=1.5), said(3, scale=1.0)
    temperature, confident = 2.0, 0.3
    expected = []
    for image in range(3):
        z, t = student.logits[image], teacher.logits[image]
        q = t.sigmoid().amax(-1)
        scores = F.binary_cross_entropy_with_logits(z / temperature, (t / temperature).sigmoid(), reduction="sum")
        sure = q >= confident
        apart = generalized_box_iou_loss(student.boxes[image][sure], teacher.boxes[image][sure])
        expected.append(temperature**2 * scores / max(1, q.sum()) + (q[sure] * apart).sum() / max(1, q[sure].sum()))
    torch.testing.assert_close(imitation_loss(student, teacher, temperature, confident), torch.stack(expected).mean())


def test_an_image_in_which_the_teacher_sees_nothing_costs_little_and_an_empty_one_pulls_no_box() -> None:
    teacher = Dense(torch.full((1, 80, 3), -12.0), boxes_around(CENTRES, 1).float())
    student = Dense(teacher.logits.clone().requires_grad_(), (teacher.boxes + 3).requires_grad_())
    loss = imitation_loss(student, teacher)
    assert loss.item() < 240 * 13 * 6.2e-6 + 240 * 6.2e-6
    loss.backward()
    assert not student.boxes.grad.any()  # type: ignore[union-attr]


def test_equal_predictions_pull_nowhere() -> None:
    teacher = said(2)
    student = Dense(teacher.logits.clone().requires_grad_(), teacher.boxes.clone().requires_grad_())
    imitation_loss(student, teacher, temperature=2).backward()
    assert student.logits.grad.abs().max() < 1e-12  # type: ignore[union-attr]
    assert student.boxes.grad.abs().max() < 1e-6  # type: ignore[union-attr]


def test_gradients_are_those_of_the_values_and_none_reach_the_teacher() -> None:
    student, teacher = said(1, 2, shift=1.0), said(1, 2, scale=1.0)
    theirs = Dense(*(values.requires_grad_() for values in teacher))

    def loss(logits: Tensor, boxes: Tensor) -> Tensor:
        return imitation_loss(Dense(logits, boxes), theirs)

    assert torch.autograd.gradcheck(loss, (student.logits.requires_grad_(), student.boxes.requires_grad_()))
    loss(*student).backward()
    assert all(values.grad is None for values in theirs)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_extreme_logits_are_finite(temperature: float) -> None:
    logits = torch.tensor([[[1e3, -1e3, 1e3, -1e3]]], requires_grad=True)
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    loss = imitation_loss(Dense(logits, boxes), Dense(torch.tensor([[[1e3, -1e3, -1e3, 1e3]]]), boxes), temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(temperature * 2e3)
    assert gradient.isfinite().all()


def test_networks_whose_places_or_classes_differ_are_refused_in_one_line() -> None:
    def outputs(reading: CellReading, images: int = 1) -> Outputs:
        given = {name: torch.zeros(images, *shape) for name, shape in reading.shapes((32, 32)).items()}
        return Outputs(given, reading=reading)

    ours = outputs(CellReading(3, (4, 8)))
    for theirs, message in (
        (CellReading(3, (8, 16)), r"one cell at strides 4, 8, the teacher one cell at strides 8, 16"),
        (CellReading(2, (4, 8)), "3 classes and the teacher 2"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            imitation(ours, outputs(theirs), None, 1.0, (32, 32), 0.3)
        assert "\n" not in str(refused.value)
    central = CellReading(3, (4, 8), centreness=True)
    assert imitation(ours, outputs(central), None, 1.0, (32, 32), 0.3).isfinite()


def test_raw_levels_are_read_before_they_are_compared() -> None:
    reading = CellReading(3, (4, 8))
    one, other = (Outputs(levels(noise(2, 80, 3) * scale, noise(2, 80, 4) / 3), reading=reading) for scale in (1, 2))
    ours, theirs = (reading.dense(several(outputs.prediction), (32, 32)) for outputs in (one, other))
    torch.testing.assert_close(imitation(one, other, None, 2.0, (32, 32), 0.3), imitation_loss(ours, theirs, 2.0, 0.3))
