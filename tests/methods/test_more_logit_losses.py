"""Methods on logits that weigh, correlate, standardise, or learn their temperature: known values, identities, limits of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, build_method, method_class
from kdbench.methods.ctkd import CTKD, adversity, with_gradient_scaled
from kdbench.methods.dist import DIST, inter_class_loss, intra_class_loss
from kdbench.methods.kd import softened_divergence
from kdbench.methods.logit_std import LogitStandardisation, standardised
from kdbench.methods.wsld import WSLD, sample_weights, weighted_soft_label_loss
from kdbench.models.outputs import Outputs, Shapes
from kdbench.tasks.base import TaskInfo

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student, teacher, labels, temperature

LOSSES: dict[str, Loss] = {
    "dist_inter": lambda s, t, y, temperature: inter_class_loss(s, t, temperature),
    "dist_intra": lambda s, t, y, temperature: intra_class_loss(s, t, temperature),
    "wsld": weighted_soft_label_loss,
    "logit_std": lambda s, t, y, temperature: softened_divergence(standardised(s), standardised(t), temperature),
}
METHODS_HERE = ("dist", "wsld", "ctkd", "logit_std")
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_method = pytest.mark.parametrize("name", METHODS_HERE)


def example(samples: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (samples,), generator=generator)


def built(name: str, classes: int = 5, **params: float) -> Method:
    method = build_method(MethodSpec.model_validate({"name": name, **params}), None)
    method.build(Shapes((classes,), {}), Shapes((classes,), {}), TaskInfo("classification", classes, (3, 8, 8)))
    return method


def forward(method: Method, student: Tensor, teacher: Tensor, target: Tensor, share: float = 1.0) -> dict[str, Tensor]:
    """share: how much of the training is over."""
    index = torch.arange(len(student))
    return method(Outputs(student), Outputs(teacher), Batch(index, target, index), Progress(share, round(share * 2400), 2400))


# gradients and the limits of arithmetic


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"wsld"}))  # whose weights are deliberately constant
def test_gradient_is_the_derivative_of_the_value(name: str) -> None:
    student, teacher, labels = example()
    assert gradcheck(lambda s: LOSSES[name](s, teacher, labels, 3.0), student.requires_grad_())


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 2, 3, 4, 0]), torch.eye(5).repeat(2, 1)[:6] * 0.9 + 0.02], ids=["hard", "soft"])
def test_wsld_sends_no_gradient_through_its_weights(target: Tensor) -> None:
    student, teacher, _ = example()
    weight = sample_weights(student, teacher, target)
    weighted_soft_label_loss(student.requires_grad_(), teacher, target, 3.0).backward()
    apart = (student / 3).softmax(1) - (teacher / 3).softmax(1)
    torch.testing.assert_close(student.grad, (3 * weight[:, None] * apart / 6).detach())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("temperature", [0.05, 4.0])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (5, 2), (4, 100)])
def test_value_and_gradient_are_finite_at_the_limits(
    loss: Loss, dtype: torch.dtype, scale: float, temperature: float, samples: int, classes: int
) -> None:
    student, teacher, labels = example(samples, classes)
    student[:, 0] = -student[:, 1]  # no two equal logits alone: that is the next test
    student = (scale * student.sign()).to(dtype).requires_grad_()
    value = loss(student, (scale * teacher.sign()).to(dtype), labels, temperature)
    value.backward()
    assert value.dtype == torch.float32
    assert value.dim() == 0
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("same", ["student", "teacher", "both"])
def test_equal_logits_of_all_classes_give_a_finite_value_and_gradient(loss: Loss, same: str) -> None:
    student, teacher, labels = example()
    student, teacher = (
        torch.full_like(x, 0.3) if same in (name, "both") else x for name, x in (("student", student), ("teacher", teacher))
    )
    student = student.float().requires_grad_()
    value = loss(student, teacher.float(), labels, 0.05)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
def test_a_loss_compiles_into_one_graph(loss: Loss) -> None:
    student, teacher, labels = example()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, labels, 2.0), loss(student, teacher, labels, 2.0))


# known values


@pytest.mark.parametrize("name", ["dist_inter", "dist_intra", "logit_std"])
def test_a_loss_is_zero_where_student_and_teacher_agree(name: str) -> None:
    _, teacher, labels = example(samples=20)
    student = teacher.clone().requires_grad_()
    value = LOSSES[name](student, teacher, labels, 1.0)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_dist_of_opposite_opinions_is_twice_the_squared_temperature() -> None:
    student, labels = torch.tensor([[0.0, 3.0], [2.0, 0.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for name in ("dist_inter", "dist_intra"):
        assert LOSSES[name](student, student.flip(1), labels, 3.0).item() == pytest.approx(18, rel=1e-6)


def test_dist_is_one_less_the_mean_of_pearsons_correlations() -> None:
    student, teacher, _ = example(samples=7)
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)])
    torch.testing.assert_close(inter_class_loss(student, teacher, 2.0), 4 * (1 - rows.mean()), rtol=1e-5, atol=0)
    torch.testing.assert_close(intra_class_loss(student, teacher, 2.0), 4 * (1 - columns.mean()), rtol=1e-5, atol=0)


def test_dist_of_a_lone_sample_has_an_intra_class_loss_without_gradient() -> None:
    student, teacher, _ = example(samples=1)
    value = intra_class_loss(student.requires_grad_(), teacher, 3.0)
    value.backward()
    assert value.item() == 9
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


def test_dense_dist_is_that_of_the_labelled_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.randint(3, (2, 4, 5), generator=generator)
    target[:, 1:3] = 255
    method = built("dist", classes=3)
    dense = forward(method, student, teacher, target)
    pixels_s, pixels_t = (x.movedim(1, -1)[target != 255] for x in (student, teacher))
    torch.testing.assert_close(dense, forward(method, pixels_s, pixels_t, target[target != 255]))
    (gradient,) = torch.autograd.grad(dense["inter"] + dense["intra"], student)
    assert gradient[:, :, 1:3].count_nonzero() == 0
    assert gradient[:, :, 0].count_nonzero() > 0
    assert all(value.isfinite() for value in forward(method, student, teacher, torch.full_like(target, 255)).values())


def test_wsld_weighs_by_the_ratio_of_cross_entropies() -> None:
    sure, unsure = torch.tensor([[20.0, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    label = torch.tensor([0])
    assert sample_weights(unsure, unsure, label).item() == pytest.approx(1 - math.exp(-1), abs=1e-6)
    assert sample_weights(sure, unsure, label).item() == pytest.approx(0, abs=1e-6)
    assert sample_weights(unsure, sure, label).item() == pytest.approx(1)
    assert sample_weights(unsure, unsure + math.log(2) * torch.tensor([[1.0, 0.0]]), label).item() == pytest.approx(
        1 - math.exp(-math.log(2) / math.log(1.5)), abs=1e-6
    )


def test_standardised_logits_have_mean_0_and_deviation_1() -> None:
    student, _, _ = example()
    z = standardised(student)
    torch.testing.assert_close(z.mean(1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(z.std(1, correction=1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)


# properties


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 50), st.floats(-50, 50), st.floats(0.5, 10))
def test_logit_standardisation_ignores_scale_and_shift_of_either_side(seed: int, scale: float, shift: float, temperature: float) -> None:
    student, teacher, labels = example(seed=seed)
    loss = LOSSES["logit_std"]
    torch.testing.assert_close(
        loss(scale * student + shift, teacher / scale - shift, labels, temperature),
        loss(student, teacher, labels, temperature),
        rtol=1e-4,
        atol=1e-6,
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_no_loss_depends_on_the_order_of_the_samples(seed: int, samples: int) -> None:
    student, teacher, labels = example(samples=samples, seed=seed)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(student[order], teacher[order], labels[order], 2.0), loss(student, teacher, labels, 2.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 10))
def test_dist_lies_between_0_and_twice_the_squared_temperature(seed: int, temperature: float) -> None:
    student, teacher, labels = example(seed=seed)
    for name in ("dist_inter", "dist_intra"):
        assert 0 <= LOSSES[name](student, teacher, labels, temperature).item() <= 2 * temperature**2


# the learned temperature


def test_ctkd_starts_at_the_authors_temperature() -> None:
    method = built("ctkd")
    assert isinstance(method, CTKD)
    temperature = method.temperature(Progress(0.0, 0, 100))
    assert temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    student, teacher, labels = example()
    torch.testing.assert_close(
        forward(method, student, teacher, labels)["kd"], 0.9 * softened_divergence(student, teacher, temperature.item()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.0), (0.1, -0.0244717), (0.5, -0.5), (1.0, -1.0), (3.0, -1.0)])
def test_ctkds_curriculum_runs_down_half_a_cosine(progress: float, factor: float) -> None:
    assert adversity(progress / 24, 1 / 24) == pytest.approx(factor, abs=1e-7)


def test_ctkd_without_a_curriculum_works_against_the_student_from_the_first_step() -> None:
    assert adversity(0.0, 0.0) == -1


@pytest.mark.parametrize("factor", [0.0, -0.3, -1.0])
def test_a_scaled_gradient_leaves_the_value(factor: float) -> None:
    x = torch.randn(5, requires_grad=True)
    y = with_gradient_scaled(x, factor)
    assert torch.equal(y, x)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, factor * 2 * x.detach())


def test_ctkds_temperature_climbs_while_the_student_descends() -> None:
    method = built("ctkd").double()
    assert isinstance(method, CTKD)
    student, teacher, labels = example()
    student.requires_grad_()
    kd = forward(method, student, teacher, labels)["kd"]
    at_theta, at_student = torch.autograd.grad(kd, [method.theta, student])
    with torch.no_grad():
        assert forward(method, student - 0.01 * at_student, teacher, labels)["kd"] < kd
        method.theta -= 0.01 * at_theta
        assert forward(method, student, teacher, labels)["kd"] > kd
    (whole,) = torch.autograd.grad(forward(method, student, teacher, labels)["kd"], method.theta)
    (half,) = torch.autograd.grad(forward(method, student, teacher, labels, share=5 / 240)["kd"], method.theta)
    (none,) = torch.autograd.grad(forward(method, student, teacher, labels, share=0.0)["kd"], method.theta)
    torch.testing.assert_close(half, whole / 2)
    assert none.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_ctkd_is_finite_at_the_limits(dtype: torch.dtype, scale: float) -> None:
    method = built("ctkd", lowest=0.05, span=0.01)
    assert isinstance(method, CTKD)
    student, teacher, labels = example()
    student = (scale * student.sign()).to(dtype).requires_grad_()
    value = forward(method, student, (scale * teacher.sign()).to(dtype), labels)["kd"]
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (student, method.theta))


def test_ctkds_curriculum_is_the_same_share_of_any_training() -> None:
    assert built("ctkd").warmup_epochs(240) == pytest.approx(10)
    assert built("ctkd").warmup_epochs(12) == pytest.approx(0.5)


# the methods


@pytest.mark.parametrize(
    ("name", "weight", "terms"),
    [
        ("dist", "weight", ("inter", "intra")),
        ("dist", "beta", ("inter",)),
        ("dist", "gamma", ("intra",)),
        ("wsld", "weight", ("wsld",)),
        ("ctkd", "kd_weight", ("kd",)),
        ("logit_std", "kd_weight", ("kd",)),
    ],
)
def test_a_weight_multiplies_its_terms(name: str, weight: str, terms: tuple[str, ...]) -> None:
    one, many = (forward(built(name, **{weight: value}), *example()) for value in (1.0, 2.5))
    for term, value in one.items():
        torch.testing.assert_close(many[term], (2.5 if term in terms else 1.0) * value)


def test_defaults_are_the_published_ones() -> None:
    assert DIST.Params().model_dump() == {"task_weight": 1.0, "weight": 2.0, "beta": 1.0, "gamma": 1.0, "temperature": 4.0}
    assert WSLD.Params().model_dump() == {"task_weight": 1.0, "weight": 2.25, "temperature": 4.0}
    assert LogitStandardisation.Params().model_dump() == {"task_weight": 0.1, "kd_weight": 9.0, "temperature": 2.0}
    wanted = {"task_weight": 0.1, "kd_weight": 0.9, "lowest": 1.0, "span": 20.0, "curriculum_share": 10 / 240}
    assert CTKD.Params().model_dump() == wanted


@every_method
@pytest.mark.parametrize(
    ("student", "teacher", "problem"),
    [((10,), (100,), r"student gives \[10\], the teacher \[100\]"), ((1,), (1,), "at least two classes"), ((10,), None, "needs a teacher")],
)
def test_a_pair_whose_logits_can_not_be_compared_is_refused(name: str, student: tuple, teacher: tuple | None, problem: str) -> None:
    task = TaskInfo("classification", student[0], (3, 8, 8))
    with pytest.raises(UserError, match=f"method '{name}'.*{problem}"):
        method_class(MethodSpec(name=name))().build(Shapes(student, {}), None if teacher is None else Shapes(teacher, {}), task)


def test_soft_labels_of_one_class_are_hard_ones_to_wsld() -> None:
    student, teacher, labels = example()
    hard, soft = (weighted_soft_label_loss(student, teacher, y, 2.0) for y in (labels, F.one_hot(labels, 5).double()))
    torch.testing.assert_close(hard, soft)
