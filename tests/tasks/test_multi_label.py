"""Several labels an image: average precision and F1 against scikit-learn, plain distillation, and the task through the frame."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor
from torch.autograd import gradcheck

from kdbench.data.batch import Batch, Part
from kdbench.data.sources import DataSpec, Source
from kdbench.errors import UserError
from kdbench.models.outputs import Outputs
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.multi_label import MultiLabel, mean_average_precision
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit
from kdbench.training.outcome import rederive
from kdbench.training.session import LocalSession
from tests.training.units import layout, saved_teacher, unit

DATA = {"name": "shapes", "target": "present", "size": 32, "train": 60, "test": 24}
TASK: dict[str, Any] = {"name": "multi_label", "data": DATA, "val_size": 12, "transfer_size": 40}
RECIPE = {"epochs": 1, "batch_size": 10, "lr": 0.05, "augment": {"crop": 2, "flip": True}, "views": 2}
FITNET = {"name": "fitnet", "student_taps": ["stage:-1"], "teacher_taps": ["stage:-1"]}


def task(**options: Any) -> MultiLabel:
    built = build_task(TaskSpec.model_validate({**TASK, **options}))
    assert isinstance(built, MultiLabel)
    return built


def drawn(samples: int, classes: int, seed: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores, of a few levels only where asked, and which classes are there."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    if levels is not None:
        scores = (scores * levels).round() / levels
    return scores, torch.rand(samples, classes, generator=generator) < 0.3


# metrics


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 2]))
def test_average_precision_is_that_of_scikit_learn_over_the_classes_that_occur(
    samples: int, classes: int, seed: int, levels: int | None
) -> None:
    scores, present = drawn(samples, classes, seed, levels)
    there = present.any(0)
    found = mean_average_precision(scores, present)
    if not there.any():
        assert found == 0
        return
    wanted = average_precision_score(present[:, there].numpy(), scores[:, there].numpy(), average="macro")
    assert found == pytest.approx(100 * wanted, rel=1e-9)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    assert mean_average_precision(scores[order], present[order]) == pytest.approx(found, rel=1e-12)


def test_average_precision_of_a_ranking_done_by_hand() -> None:
    """Hits at ranks 1 and 3 of four: (1 / 1 + 2 / 3) / 2. The second class is shown by nobody, the third ranked perfectly."""
    scores = torch.tensor([[4.0, 1, 9], [3, 2, 1], [2, 3, 8], [1, 4, 0]])
    present = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    assert mean_average_precision(scores, present) == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    assert mean_average_precision(torch.zeros(4, 3), present) == pytest.approx(50)  # equal scores: the share of samples


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(3, 6), st.integers(0, 2**32 - 1))
def test_f1_is_that_of_scikit_learn(samples: int, classes: int, seed: int) -> None:
    logits, present = drawn(samples, classes, seed)
    found = MULTI.metrics(logits, present.to(torch.uint8))
    there = present.any(0)
    best = np.zeros((samples, classes), bool)
    np.put_along_axis(best, np.argsort(-logits.numpy(), 1)[:, :2], True, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for answers, suffix in ((logits.numpy() > 0, ""), (best, "_top2")):
            micro = f1_score(present.numpy(), answers, average="micro", zero_division=0)
            macro = f1_score(present[:, there].numpy(), answers[:, there.numpy()], average="macro", zero_division=0) if there.any() else 0
            assert found[f"micro_f1{suffix}"] == pytest.approx(100 * micro)
            assert found[f"macro_f1{suffix}"] == pytest.approx(100 * macro)


MULTI = task(top=2)


def test_numbers_of_the_best_classes_are_there_only_where_they_are_asked_for() -> None:
    logits, present = drawn(12, 5, 0)
    assert task().metrics(logits, present).keys() == {"map", "micro_f1", "macro_f1"}
    assert task(top=3).metrics(logits, present).keys() == {"map", "micro_f1", "macro_f1", "micro_f1_top3", "macro_f1_top3"}
    assert task(top=5).metrics(logits, torch.ones(12, 5))["micro_f1_top5"] == 100
    with pytest.raises(UserError, match="top: 6 is more than the 5 classes of data 'shapes'; lower it"):
        task(top=6)


def test_nothing_named_and_nothing_there_is_0_and_a_perfect_answer_100() -> None:
    nothing = torch.zeros(3, 5, dtype=torch.uint8)
    assert task().metrics(torch.full((3, 5), -1.0), nothing) == {"map": 0.0, "micro_f1": 0.0, "macro_f1": 0.0}
    _, present = drawn(20, 5, 1)
    assert set(task().metrics(2.0 * present - 1, present.float()).values()) == {100.0}


def test_chance_is_the_average_precision_of_a_network_that_sees_nothing() -> None:
    _, present = drawn(50, 5, 2)
    chance = task().chance(present.to(torch.uint8))
    assert chance == pytest.approx(mean_average_precision(torch.ones(50, 5), present))
    assert task().chance(torch.zeros(4, 5)) == 0


def test_agreement_counts_answers_and_diverges_as_bernoulli_distributions_do() -> None:
    student, teacher = (drawn(30, 4, seed)[0] for seed in (3, 4))
    found = task().agreement(student, teacher)
    assert found["agreement"] == ((student > 0) == (teacher > 0)).double().mean().item()
    p, q = teacher.sigmoid(), student.sigmoid()
    wanted = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert found["teacher_kl"] == pytest.approx(wanted.mean().item(), rel=1e-9)
    same = task().agreement(teacher, teacher)
    assert (same["agreement"], same["teacher_kl"]) == (1, pytest.approx(0, abs=1e-12))


def test_rounding_of_a_teacher_moves_agreement_no_further_than_is_allowed() -> None:
    student, teacher = (4 * drawn(200, 4, seed)[0].float() for seed in (5, 6))
    teacher[0] = 2.0**-25  # next to the boundary between yes and no
    exact, rounded = task().agreement(student, teacher), task().agreement(student, teacher.half().float())
    allowed = task().agreement_tolerance(exact, teacher)
    assert all(abs(exact[name] - rounded[name]) <= allowed[name] for name in exact)
    assert exact["agreement"] != rounded["agreement"]


# losses


def batch(target: Tensor) -> Batch:
    return Batch(torch.zeros(len(target), 3, 8, 8), target, torch.arange(len(target)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_loss_is_binary_cross_entropy(dtype: torch.dtype) -> None:
    logits, present = drawn(6, 5, 7)
    (loss,) = task().loss(Outputs(logits), batch(present.to(dtype))).values()
    p = logits.sigmoid()
    assert loss.item() == pytest.approx(-torch.where(present, p.log(), (1 - p).log()).mean().item())
    half = task().loss(Outputs(logits.half()), batch(present.to(dtype)))["binary_cross_entropy"]
    assert half.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_imitation_is_binary_cross_entropy_with_the_softened_teacher(temperature: float) -> None:
    imitation = task().info.imitation
    assert imitation is not None
    (student, _), (teacher, present) = drawn(6, 5, 8), drawn(6, 5, 9)
    found = imitation(Outputs(student), Outputs(teacher), batch(present), temperature)
    wanted = temperature**2 * F.binary_cross_entropy((student / temperature).sigmoid(), (teacher / temperature).sigmoid())
    if temperature > 0.1:  # where the reference is exact
        assert found.item() == pytest.approx(wanted.item())
    assert gradcheck(lambda s: imitation(Outputs(s), Outputs(teacher), batch(present), temperature), student.clone().requires_grad_())
    same = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(imitation(Outputs(same), Outputs(teacher), batch(present), temperature), same)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_finite_at_the_limits(dtype: torch.dtype) -> None:
    imitation = task().info.imitation
    assert imitation is not None
    logits, present = drawn(4, 5, 10)
    student, teacher = (1e3 * logits).to(dtype).requires_grad_(), (-1e3 * logits).to(dtype)
    loss = imitation(Outputs(student), Outputs(teacher), batch(present), 0.05) + sum(task().loss(Outputs(student), batch(present)).values())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# the frame


@pytest.mark.parametrize(
    ("method", "student"),
    [*((method, {"name": "tiny_cnn", "width": 4}) for method in ("none", "kd", FITNET, "pkd")), ("kd", {"name": "resnet10t"})],
)
def test_any_network_of_classification_trains_and_its_metrics_follow_from_what_is_stored(tmp_path: Path, method: Any, student: Any) -> None:
    teacher = saved_teacher(tmp_path, model={"name": "tiny_cnn", "width": 6}, of_task=TASK)
    of = unit(method, teacher, task={**TASK, "top": 3}, student=student, recipe=RECIPE)
    record = fit(of, LocalSession(), layout(tmp_path))
    assert record.primary == "map"
    assert record.predictions_uri is not None
    assert rederive(record, build_task(of.task), (tmp_path / record.predictions_uri).read_bytes()) == record.metrics
    assert record.metrics.keys() == {"map", "micro_f1", "macro_f1", "micro_f1_top3", "macro_f1_top3"}
    assert record.chance_metric is not None
    assert 0 < record.chance_metric < 100


def test_a_network_learns_more_than_chance(tmp_path: Path) -> None:
    larger = {**TASK, "data": {**DATA, "train": 600, "test": 100}, "transfer_size": None}
    recipe = {"epochs": 6, "batch_size": 32, "optimizer": "adamw", "lr": 0.01}
    record = fit(unit("none", task=larger, student={"name": "tiny_cnn", "width": 12}, recipe=recipe), LocalSession(), layout(tmp_path))
    assert record.test_metric is not None
    assert record.chance_metric is not None
    assert record.test_metric > record.chance_metric + 10


@pytest.mark.parametrize("method", ["nkd", "dkd", "fgd"])
def test_methods_for_classes_that_exclude_each_other_refuse_it(method: str) -> None:
    from kdbench.methods.build import MethodSpec, method_class

    assert not method_class(MethodSpec(name=method)).supports(MultiLabel.gives)
    assert method_class(MethodSpec(name="kd")).supports(MultiLabel.gives)


def test_samples_without_labels_are_imitated(tmp_path: Path) -> None:
    teacher = saved_teacher(tmp_path, model={"name": "tiny_cnn", "width": 6}, of_task=TASK)
    noise = {**TASK, "transfer": "noise"}
    run = assemble(unit("kd", teacher, task=noise, student={"name": "tiny_cnn", "width": 4}, recipe=RECIPE), LocalSession())
    assert next(iter(run.loader.batches(0))).target is None
    assert fit(run.unit, LocalSession(), layout(tmp_path)).status == "ok"


@pytest.mark.parametrize(
    ("data", "given"),
    [
        ({"name": "shapes", "target": "class"}, "int64; use target: present"),
        ("fashion_mnist", "int64"),
        ({"name": "shapes"}, "uint8 [16, 16]"),
    ],
)
def test_data_of_another_kind_are_refused_with_the_way_out(data: Any, given: str) -> None:
    spec = data if isinstance(data, str) else {**data, "train": 5, "test": 2, "size": 16}
    with pytest.raises(UserError) as caught:
        MultiLabel(MultiLabel.Options(data=DataSpec.model_validate(spec)))
    assert given in str(caught.value)
    assert "needs a 0 or 1 for each of" in str(caught.value)


def test_an_answer_that_is_neither_0_nor_1_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs a 0 or 1 for each of 3 classes, .*; data 'odd' gives float32 \[3\]"):
        MultiLabel(MultiLabel.Options(data=DataSpec(name="tests.tasks.test_multi_label:odd")))


def odd() -> Source:
    """Half an answer."""

    def part(first: int) -> Part:
        return Part(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.full((4, 3), 0.5), torch.arange(first, first + 4))

    return Source("odd", part(0), part(4), 3, ("a", "b", "c"), (0.5,) * 3, (0.5,) * 3)
