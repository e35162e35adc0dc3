import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdbench.data.batch import Batch
from kdbench.data.sources import DataSpec
from kdbench.errors import UserError
from kdbench.models.build import ModelSpec
from kdbench.models.outputs import Outputs, predicted
from kdbench.tasks import networks
from kdbench.tasks.classification import Classification
from kdbench.tasks.segmentation import Segmentation

SHAPES = DataSpec.model_validate({"name": "shapes", "target": "class", "train": 120, "test": 20, "size": 16})


@pytest.fixture(scope="module")
def task() -> Classification:
    return Classification(Classification.Options(data=SHAPES))


def batch(target: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(target), 3, 16, 16), target, torch.arange(len(target)))


def logits(count: int, classes: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(classes)
    return scale * torch.randn(count, classes, generator=random), torch.randint(0, classes, (count,), generator=random)


def test_info_says_what_the_data_is(task):
    assert task.info.num_classes == 5
    assert task.info.example == (3, 16, 16)
    assert task.info.class_names == ("circle", "square", "triangle", "cross", "ring")


@pytest.mark.parametrize(("classes", "scale"), [(3, 1.0), (10, 3.0), (10, 0.1), (40, 8.0)])
def test_metrics_equal_those_of_torchmetrics(task, classes, scale):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    prediction, _ = logits(997, classes, scale)
    # Labels drawn from the prediction itself: bins err in both directions, or their number would not matter.
    target = prediction.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    found = task.metrics(prediction, target)
    expected = {
        "accuracy": 100 * multiclass_accuracy(prediction, target, classes, average="micro"),
        "nll": F.cross_entropy(prediction, target),
        "ece": multiclass_calibration_error(prediction.softmax(1), target, classes, n_bins=15, norm="l1"),
    }
    if classes > 5:
        expected["top5"] = 100 * multiclass_accuracy(prediction, target, classes, top_k=5, average="micro")
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


def test_metrics_of_a_case_worked_out_by_hand(task):
    prediction = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]])
    found = task.metrics(prediction, torch.tensor([0, 1, 1, 0]))
    right = [1 / (1 + math.exp(-margin)) for margin in (2, 1, -1, 3)]
    assert found["accuracy"] == 75
    assert found["nll"] == pytest.approx(sum(-math.log(p) for p in right) / 4)
    # Confidences .881, .731 twice (one of them wrong) and .953 fall into bins of a fifteenth: 13, 10 and 14.
    gaps = [1 - right[0], abs(1 - 2 * right[1]), 1 - right[3]]
    assert found["ece"] == pytest.approx(sum(gaps) / 4)
    assert "top5" not in found


def test_predictions_stored_in_half_precision_give_finite_metrics(task):
    prediction = torch.tensor([[6e4, -6e4, 0.0], [0.0, 6e4, -6e4]], dtype=torch.float16)
    found = task.metrics(prediction, torch.tensor([0, 1]))
    assert found == {"accuracy": 100, "nll": 0, "ece": 0}


def test_the_primary_metric_is_among_the_metrics(task):
    assert task.primary in task.metrics(*logits(8, 5))


def test_the_loss_is_cross_entropy_in_float32_or_wider(task):
    prediction, target = logits(16, 5)
    loss = task.loss(Outputs(prediction.bfloat16()), batch(target))["cross_entropy"]
    assert loss.dtype == torch.float32
    assert loss == F.cross_entropy(prediction.bfloat16().float(), target)
    assert task.loss(Outputs(prediction.double()), batch(target))["cross_entropy"].dtype == torch.float64


def test_soft_targets_of_one_class_equal_its_label(task):
    prediction, target = logits(16, 5)
    soft = F.one_hot(target, 5).double()
    assert torch.allclose(
        task.loss(Outputs(prediction), batch(soft))["cross_entropy"], task.loss(Outputs(prediction), batch(target))["cross_entropy"]
    )


def test_a_mixture_of_two_labels_costs_the_mixture_of_their_losses(task):
    prediction, _ = logits(1, 5)
    one, two = (task.loss(Outputs(prediction), batch(torch.tensor([label])))["cross_entropy"] for label in (0, 3))
    mixed = task.loss(Outputs(prediction), batch(torch.tensor([[0.25, 0, 0, 0.75, 0]])))["cross_entropy"]
    assert torch.allclose(mixed, 0.25 * one + 0.75 * two)


def test_a_model_agrees_with_itself(task):
    prediction, _ = logits(64, 5)
    assert task.agreement(prediction, prediction) == {"agreement": 1, "teacher_kl": 0}


def test_disagreement_is_measured_from_the_teacher(task):
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 5.0]])
    student = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    found = task.agreement(student, teacher)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    p = 1 / (1 + math.exp(-5))
    second = (2 * p - 1) * 5
    assert found["agreement"] == 0.5
    assert found["teacher_kl"] == pytest.approx((first + second) / 2)


def test_agreement_over_many_samples_equals_the_mean_over_all(task):
    (student, _), (teacher, _) = logits(700, 5), logits(700, 6)
    teacher = teacher[:, :5]
    found = task.agreement(student, teacher)
    assert found["agreement"] == pytest.approx((student.argmax(1) == teacher.argmax(1)).double().mean().item())
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
    assert found["teacher_kl"] == pytest.approx(kl.item(), rel=1e-5)


class Flat(nn.Module):
    """A linear model that notes how it was asked for."""

    def __init__(self, outputs: int, **asked) -> None:
        super().__init__()
        self.asked = asked
        self.layer = nn.Linear(3 * 16 * 16, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def test_a_model_is_built_with_the_facts_of_the_data(task, monkeypatch):
    monkeypatch.setattr(networks, "build_model", lambda spec, **facts: Flat(5, **facts))
    model = task.build_model(ModelSpec(name="flat"))
    source = task.source
    assert model.asked == {"num_classes": 5, "in_channels": 3, "image_size": 16, "mean": source.mean, "std": source.std}


def test_a_model_with_other_outputs_is_refused(task, monkeypatch):
    monkeypatch.setattr(networks, "build_model", lambda spec, **facts: Flat(100))
    with pytest.raises(UserError, match="model 'flat' gives 100 outputs, data 'shapes' has 5 classes"):
        task.build_model(ModelSpec(name="flat"))


def test_a_model_that_gives_a_map_is_refused(task, monkeypatch):
    monkeypatch.setattr(networks, "build_model", lambda spec, **facts: nn.Conv2d(3, 5, 1))
    with pytest.raises(UserError, match=r"gives \[5, 16, 16\] for an image, data 'shapes' needs \[5\]"):
        task.build_model(ModelSpec(name="conv"))


def test_a_model_that_cannot_take_the_images_is_refused(task, monkeypatch):
    monkeypatch.setattr(networks, "build_model", lambda spec, **facts: nn.Conv2d(1, 5, 1))
    with pytest.raises(UserError, match=r"model 'conv' doesn't work on images \[3, 16, 16\] of data 'shapes': .*channels"):
        task.build_model(ModelSpec(name="conv"))


def test_data_with_masks_is_refused():
    with pytest.raises(UserError, match=r"needs one label per sample, int64 .*; data 'shapes' gives one per pixel"):
        Classification(Classification.Options(data=DataSpec.model_validate({"name": "shapes", "train": 5, "test": 2, "size": 16})))


@pytest.fixture(scope="module")
def partly() -> Classification:
    return Classification(Classification.Options(data=SHAPES, labelled=20))


def test_samples_without_a_label_count_neither_in_the_loss_nor_in_its_weight(partly):
    prediction, target = logits(8, 5)
    mixed = torch.where(torch.arange(8) % 3 == 0, target, -1)
    found = partly.loss(Outputs(prediction), batch(mixed))["cross_entropy"]
    assert found.item() == pytest.approx(F.cross_entropy(prediction[::3], target[::3]).item(), rel=1e-6)
    assert {name: int(weight) for name, weight in partly.weight(batch(mixed)).items()} == {"cross_entropy": 3, "imitation": 8}
    none = torch.full((8,), -1)
    prediction.requires_grad_()
    loss = partly.loss(Outputs(prediction), batch(none))["cross_entropy"]
    loss.backward()
    assert (loss.item(), int(prediction.grad.count_nonzero()), int(partly.weight(batch(none))["cross_entropy"])) == (0.0, 0, 0)


def test_fully_labelled_samples_count_as_before(task, partly):
    target = torch.tensor([1, 4, 0])
    assert (task.counts_samples, int(task.weight(batch(target)))) == (True, 3)
    assert not partly.counts_samples
    prediction, _ = logits(3, 5)
    assert torch.equal(task.loss(Outputs(prediction), batch(target))["cross_entropy"], F.cross_entropy(prediction, target))


def test_a_teacher_of_other_pictures_sees_these_at_its_own_size_and_with_its_own_normalisation(task):
    data = {"name": "shapes", "target": "class", "train": 60, "test": 10, "size": 24, "seed": 5}
    own = Classification(Classification.Options(data=DataSpec.model_validate(data)))
    network = own.build_model(ModelSpec.model_validate({"name": "tiny_cnn", "width": 4})).eval()
    seen = networks.as_teacher(network, own, task)
    images = torch.rand(6, 3, 16, 16)
    larger = F.interpolate(images, size=(24, 24), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        assert torch.equal(predicted(seen, images), predicted(network, larger))
        assert not torch.equal(predicted(seen, images), predicted(network, images))
    assert network.input_spec.size is None
    assert {id(weight) for weight in seen.parameters()} == {id(weight) for weight in network.parameters()}


def test_a_network_of_another_number_of_classes_or_of_pixels_is_no_teacher(task):
    with pytest.raises(UserError, match=r"^teacher.task: its network gives 7 outputs, data 'shapes' has 5 classes$"):
        task.as_teacher(nn.Sequential(nn.Flatten(), nn.Linear(768, 7)))
    with pytest.raises(UserError, match=r"^teacher.task: its network gives \[5, 16, 16\] for an image, data 'shapes' needs \[5\]$"):
        task.as_teacher(nn.Conv2d(3, 5, 3, padding=1))
    with pytest.raises(
        UserError, match=r"^teacher.task: its network doesn't work on images \[3, 16, 16\] of data 'shapes': .*shapes cannot be"
    ):
        task.as_teacher(nn.Sequential(nn.Flatten(), nn.Linear(5, 5)))


def test_a_task_takes_no_teacher_of_another_by_default():
    other = Segmentation(Segmentation.Options(data=DataSpec.model_validate({"name": "shapes", "train": 20, "test": 5, "size": 16})))
    with pytest.raises(UserError, match=r"^teacher.task: task segmentation takes no teacher of another task; leave teacher.task out$"):
        other.as_teacher(nn.Identity())
