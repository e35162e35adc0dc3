import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdbench.data.batch import Batch
from kdbench.data.scenes import KINDS
from kdbench.data.sources import DataSpec
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs
from kdbench.tasks import networks
from kdbench.tasks.by_class import is_of_class
from kdbench.tasks.segmentation import Segmentation

SHAPES = DataSpec.model_validate({"name": "shapes", "train": 30, "test": 10, "size": 16})


@pytest.fixture(scope="module")
def task() -> Segmentation:
    return Segmentation(Segmentation.Options(data=SHAPES))


def batch(target: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(target), 3, *target.shape[1:]), target, torch.arange(len(target)))


def dense(count: int = 150, classes: int = 6, side: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, a fifth of which are ignored."""
    random = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (count, side, side), generator=random)
    target[torch.rand(target.shape, generator=random) < 0.2] = 255
    return 2 * torch.randn(count, classes, side, side, generator=random), target


def test_miou_is_the_mean_over_classes_of_counts_over_the_whole_set(task):
    prediction, target = dense()
    best = prediction.argmax(1)
    counts = target != 255
    shares = [
        ((best == c) & (target == c)).sum() / (((best == c) | (target == c)) & counts).sum()  # per class, all images together
        for c in range(6)
    ]
    found = task.metrics(prediction, target)
    assert found["miou"] == pytest.approx(100 * torch.stack(shares).mean().item(), rel=1e-5)
    names = ("ground", *KINDS)
    assert {name: found[f"iou/{name}"] for name in names} == pytest.approx(
        {name: 100 * share.item() for name, share in zip(names, shares, strict=True)}, rel=1e-5
    )
    assert found["pixel_accuracy"] == pytest.approx(100 * (best == target)[counts].double().mean().item())
    assert found["nll"] == pytest.approx(F.cross_entropy(prediction, target, ignore_index=255).item(), rel=1e-5)
    assert task.primary in found


def test_a_class_that_nobody_names_does_not_count(task):
    target = torch.tensor([[[0, 0], [1, 1]]])
    prediction = F.one_hot(torch.tensor([[[0, 0], [1, 0]]]), 6).permute(0, 3, 1, 2).half() * 10
    found = task.metrics(prediction, target)
    assert found["miou"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert found["pixel_accuracy"] == 75
    assert {name for name in found if is_of_class(name)} == {"iou/ground", "iou/circle"}


def test_ignored_pixels_change_nothing(task):
    prediction, target = dense()
    changed = prediction.clone()
    changed.permute(0, 2, 3, 1)[target == 255] = 99.0 * torch.arange(6)
    assert task.metrics(changed, target) == task.metrics(prediction, target)
    assert task.loss(Outputs(changed), batch(target)) == task.loss(Outputs(prediction), batch(target))


def test_targets_stored_as_bytes_give_the_same_metrics(task):
    prediction, target = dense()
    assert task.metrics(prediction, target.to(torch.uint8)) == task.metrics(prediction, target)


def test_the_loss_is_the_mean_over_the_pixels_that_count(task):
    prediction, target = dense()
    loss = task.loss(Outputs(prediction.bfloat16()), batch(target))["cross_entropy"]
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, F.cross_entropy(prediction.bfloat16().float(), target, ignore_index=255))


def test_the_loss_of_a_batch_without_a_pixel_that_counts_is_zero(task):
    prediction, target = dense(2)
    prediction.requires_grad_()
    loss = task.loss(Outputs(prediction), batch(torch.full_like(target, 255)))["cross_entropy"]
    loss.backward()
    assert loss == 0
    assert (prediction.grad == 0).all()


def test_agreement_is_measured_per_pixel(task):
    teacher = torch.zeros(1, 2, 1, 4)
    teacher[0, 0] = torch.tensor([5.0, 5.0, 5.0, -5.0])
    student = torch.zeros(1, 2, 1, 4)
    student[0, 0] = torch.tensor([5.0, 5.0, -5.0, -5.0])
    found = task.agreement(student, teacher)
    assert found["agreement"] == 0.75
    p = 1 / (1 + math.exp(-5))
    assert found["teacher_kl"] == pytest.approx((2 * p - 1) * 5 / 4)


def test_a_model_must_label_every_pixel(task, monkeypatch):
    monkeypatch.setattr(networks, "build_model", lambda spec, **facts: nn.Conv2d(3, 6, 1))
    assert isinstance(task.build_model(ModelSpec(name="conv")), nn.Conv2d)
    monkeypatch.setattr(networks, "build_model", lambda spec, **facts: nn.Conv2d(3, 6, 1, stride=2))
    with pytest.raises(UserError, match=r"model 'conv' gives \[6, 8, 8\] for an image, data 'shapes' needs \[6, 16, 16\]"):
        task.build_model(ModelSpec(name="conv"))


def test_data_without_masks_is_refused():
    with pytest.raises(UserError, match="needs one label per pixel; data 'shapes' gives one per image"):
        Segmentation(Segmentation.Options(data=DataSpec.model_validate({"name": "shapes", "target": "class", "train": 5, "test": 2})))
