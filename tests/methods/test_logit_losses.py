"""The six logit methods: known values, identities, limits of arithmetic and gradients."""

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
from kdbench.methods import METHODS
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, build_method
from kdbench.methods.dkd import DKD, nontarget_class_loss, target_class_loss
from kdbench.methods.kd import KD, softened_cross_entropy, softened_divergence
from kdbench.methods.label_smoothing import LabelSmoothing, smoothed_cross_entropy
from kdbench.methods.logits import other_logits
from kdbench.methods.nkd import NKD, nontarget_loss, target_loss
from kdbench.methods.none import Undistilled
from kdbench.methods.tf_nkd import self_target_losses
from kdbench.models.outputs import Outputs, Shapes
from kdbench.tasks.base import TaskInfo
from tests.tolerances import rounding

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # student, teacher, labels, temperature

LOSSES: dict[str, Loss] = {
    "kd": lambda s, t, y, temperature: softened_divergence(s, t, temperature),
    "kd_cross_entropy": lambda s, t, y, temperature: softened_cross_entropy(s, t, temperature),
    "nkd_target": lambda s, t, y, temperature: target_loss(s, t, y),
    "nkd_nontarget": nontarget_loss,
    "dkd_target": target_class_loss,
    "dkd_nontarget": nontarget_class_loss,
    "tf_nkd": lambda s, t, y, temperature: torch.stack(self_target_losses(s, y)).sum(),
    "label_smoothing": lambda s, t, y, temperature: smoothed_cross_entropy(s, y, 0.1),
}
DONE = Progress(epoch=1.0, step=1, total_steps=1)
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def example(samples: int = 6, classes: int = 5, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (samples,), generator=generator)


def soft_labels(samples: int, classes: int) -> Tensor:
    """Mixup's: two labels a sample, 0.7 and 0.3."""
    first = torch.arange(samples) % classes
    return 0.7 * F.one_hot(first, classes).double() + 0.3 * F.one_hot((first + 1) % classes, classes).double()


def softened_rounding(logits: Tensor, temperature: float) -> float:
    """How far T^2 sum p log p over the classes of [B, C] may be off, and its gradient, which is T times smaller."""
    largest = (logits / temperature).log_softmax(1).abs().max().item()
    return rounding(logits.dtype, 2 * logits.shape[1] + 6, temperature**2 * largest)


def forward(method: Method, student: Tensor, teacher: Tensor | None, target: Tensor, at: Progress = DONE) -> dict[str, Tensor]:
    index = torch.arange(len(student))
    return method(Outputs(student), None if teacher is None else Outputs(teacher), Batch(index, target, index), at)


# gradients and the limits of arithmetic


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"tf_nkd"}))  # whose soft target is deliberately constant
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_gradient_is_the_derivative_of_the_value(name: str, soft: bool):
    student, teacher, labels = example()
    target = soft_labels(6, 5) if soft else labels
    assert gradcheck(lambda s: LOSSES[name](s, teacher, target, 3.0), student.requires_grad_())


def test_tf_nkd_sends_no_gradient_through_its_soft_target():
    logits, _, labels = example()
    logits.requires_grad_()
    p = logits.softmax(1)[torch.arange(6), labels].detach()
    weight = p + 1 - p.mean()
    (self_target_losses(logits, labels)[0]).backward()
    torch.testing.assert_close(logits.grad, weight[:, None] * (logits.softmax(1) - F.one_hot(labels, 5)).detach() / 6)


def test_nkd_sends_no_gradient_through_the_teachers_confidence():
    student, teacher, labels = example()
    target_loss(student.requires_grad_(), teacher.requires_grad_(), labels).backward()
    assert student.grad is not None
    assert teacher.grad is None


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("temperature", [0.05, 4.0])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (5, 2), (4, 100)])
def test_value_and_gradient_are_finite_at_the_limits(
    loss: Loss, dtype: torch.dtype, scale: float, temperature: float, samples: int, classes: int
):
    student, teacher, labels = example(samples, classes)
    student = (scale * student.sign()).to(dtype).requires_grad_()
    value = loss(student, (scale * teacher.sign()).to(dtype), labels, temperature)
    value.backward()
    assert value.dtype == torch.float32
    assert value.dim() == 0
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("kd", 1000),
        ("kd_cross_entropy", 1000),
        ("nkd_target", 1000),
        ("nkd_nontarget", 2 / 3 * 1000),
        ("dkd_target", 1000),
        ("dkd_nontarget", 2 / 3 * 1000 - math.log(3)),
        ("tf_nkd", 1000),
        ("label_smoothing", 0.9 * 1000 + 0.1 * 750),
    ],
)
def test_far_apart_logits_give_the_exact_limit_not_just_a_finite_number(name: str, wanted: float):
    """Student sure of class 1, teacher of class 0, which is the label, by 1000 nats; the rest is uniform."""
    student, teacher = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    student[0, 1], teacher[0, 0] = 1000.0, 1000.0
    assert LOSSES[name](student, teacher, torch.tensor([0]), 1.0).item() == pytest.approx(wanted, rel=1e-12)


@every_loss
def test_autocast_does_not_change_a_loss(loss: Loss):
    student, teacher, labels = example()
    student, teacher = student.float(), teacher.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(student, teacher, labels, 2.0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(student, teacher, labels, 2.0))


@every_loss
def test_a_loss_compiles_into_one_graph(loss: Loss):
    student, teacher, labels = example()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, labels, 2.0), loss(student, teacher, labels, 2.0))


# known values


@pytest.mark.parametrize("name", ["kd", "dkd_target", "dkd_nontarget"])
def test_a_divergence_is_zero_with_zero_gradient_where_student_and_teacher_agree(name: str):
    _, teacher, labels = example()
    student = teacher.clone().requires_grad_()
    value = LOSSES[name](student, teacher, labels, 4.0)
    value.backward()
    off = softened_rounding(teacher, 4.0)
    assert abs(value.item()) < off
    assert student.grad is not None
    assert student.grad.abs().max() < off


@pytest.mark.parametrize("name", ["kd_cross_entropy", "nkd_nontarget"])
def test_a_cross_entropy_is_the_teachers_entropy_with_zero_gradient_where_both_agree(name: str):
    _, teacher, labels = example()
    student = teacher.clone().requires_grad_()
    value = LOSSES[name](student, teacher, labels, 4.0)
    value.backward()
    seen = other_logits(teacher, labels) if name == "nkd_nontarget" else teacher
    entropy = torch.distributions.Categorical(logits=seen / 4.0).entropy().mean()
    torch.testing.assert_close(value.detach(), 16 * entropy)
    assert student.grad is not None
    assert student.grad.abs().max() < softened_rounding(teacher, 4.0)


def test_two_forms_of_kd_differ_by_the_teachers_entropy_and_share_their_gradient():
    student, teacher, _ = example()
    student.requires_grad_()
    divergence, cross_entropy = softened_divergence(student, teacher, 3.0), softened_cross_entropy(student, teacher, 3.0)
    entropy = torch.distributions.Categorical(logits=teacher / 3).entropy().mean()
    torch.testing.assert_close(cross_entropy - divergence, 9 * entropy)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (divergence, cross_entropy)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", [nontarget_loss, nontarget_class_loss])
def test_two_classes_leave_no_other_class_to_compare(loss: Loss):
    student, teacher, labels = example(classes=2)
    student.requires_grad_()
    value = loss(student, teacher, labels, 2.0)
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


def test_other_logits_are_the_rest_in_order():
    logits = torch.arange(12).reshape(3, 4)
    assert other_logits(logits, torch.tensor([0, 2, 3])).tolist() == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothed_cross_entropy_is_torchs(smoothing: float):
    logits, _, labels = example()
    pixels = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    classes = torch.randint(5, (2, 3, 4))
    classes[0, 1] = 255
    for x, y in ((logits, labels), (logits, soft_labels(6, 5)), (pixels, classes)):
        wanted = (
            F.cross_entropy(x, y, label_smoothing=smoothing)
            if y.is_floating_point()
            else F.cross_entropy(x, y, label_smoothing=smoothing, ignore_index=255)
        )
        torch.testing.assert_close(smoothed_cross_entropy(x, y, smoothing), wanted)


def test_tf_nkd_of_one_sample_is_cross_entropy():
    logits, _, labels = example(samples=1)
    torch.testing.assert_close(self_target_losses(logits, labels)[0], F.cross_entropy(logits, labels))


def test_tf_nkd_of_one_hot_rows_is_that_of_hard_labels():
    logits, _, labels = example()
    first, second = self_target_losses(logits, F.one_hot(labels, 5).double())
    torch.testing.assert_close(first, self_target_losses(logits, labels)[0])
    assert second.item() == 0


def test_tf_nkd_takes_its_mean_over_the_joined_batch():
    logits, _, labels = example(samples=8)
    p = logits.softmax(1)[torch.arange(8), labels]
    joined = -((p + 1 - p.mean()) * p.log()).mean()
    torch.testing.assert_close(self_target_losses(logits, labels)[0], joined)
    halves = [self_target_losses(logits[half], labels[half])[0] for half in (slice(4), slice(4, 8))]
    assert not torch.isclose(torch.stack(halves).mean(), joined, rtol=1e-3)


# properties

finite = st.floats(-50, 50)
temperatures = st.floats(0.5, 20)
seeds = st.integers(0, 2**31)


@settings(max_examples=30, deadline=None)
@given(seeds, finite, finite, temperatures)
def test_kd_ignores_a_constant_added_to_all_logits(seed: int, shift_s: float, shift_t: float, temperature: float):
    student, teacher, _ = example(seed=seed)
    torch.testing.assert_close(
        softened_divergence(student + shift_s, teacher + shift_t, temperature), softened_divergence(student, teacher, temperature)
    )


@settings(max_examples=30, deadline=None)
@given(seeds, finite, temperatures)
def test_nkd_nontarget_loss_is_least_where_the_other_classes_match_whatever_the_label_gets(
    seed: int, label_logit: float, temperature: float
):
    _, teacher, labels = example(seed=seed)
    student = teacher.scatter(1, labels[:, None], label_logit)
    least = nontarget_loss(teacher, teacher, labels, temperature)
    torch.testing.assert_close(nontarget_loss(student, teacher, labels, temperature), least)
    perturbed = student + torch.randn(student.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert nontarget_loss(perturbed, teacher, labels, temperature) > least


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 12), temperatures)
def test_kd_is_tckd_plus_nckd_weighted_by_what_the_teacher_leaves_the_other_classes(seed: int, classes: int, temperature: float):
    student, teacher, label = example(samples=1, classes=classes, seed=seed)
    rest = 1 - (teacher / temperature).softmax(1)[0, label]
    parts = (
        target_class_loss(student, teacher, label, temperature)
        + rest * nontarget_class_loss(student, teacher, label, temperature).squeeze()
    )
    torch.testing.assert_close(parts.squeeze(), softened_divergence(student, teacher, temperature))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 8))
def test_no_loss_depends_on_the_order_of_the_samples(seed: int, samples: int):
    student, teacher, labels = example(samples=samples, seed=seed)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(student[order], teacher[order], labels[order], 2.0), loss(student, teacher, labels, 2.0))


# the methods


def test_none_adds_nothing_to_the_tasks_loss():
    student, _, labels = example()
    assert forward(Undistilled(), student, None, labels) == {}
    assert Undistilled().params.task_weight == 1.0


def test_label_smoothing_replaces_the_tasks_loss():
    student, _, labels = example()
    terms = forward(LabelSmoothing(), student, None, labels)
    torch.testing.assert_close(terms, {"smoothed_ce": F.cross_entropy(student, labels, label_smoothing=0.1)})
    assert LabelSmoothing().params.task_weight == 0.0


def test_weights_of_the_parameters_multiply_the_terms():
    student, teacher, labels = example()
    for name, weights, terms in (
        ("kd", ("kd_weight",), ("kd",)),
        ("nkd", ("gamma",), ("nontarget",)),
        ("dkd", ("alpha", "beta"), ("tckd", "nckd")),
        ("tf_nkd", ("weight",), ("tf_nkd0",)),
    ):
        one = build_method(MethodSpec.model_validate({"name": name, **dict.fromkeys(weights, 1.0)}), None)
        many = build_method(MethodSpec.model_validate({"name": name, **dict.fromkeys(weights, 2.5)}), None)
        for term in terms:
            torch.testing.assert_close(forward(many, student, teacher, labels)[term], 2.5 * forward(one, student, teacher, labels)[term])


def test_dense_kd_is_kd_of_the_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.randint(3, (2, 4, 5), generator=generator)
    target[:, 1:3] = 255
    pixels_s, pixels_t = (x.movedim(1, -1)[target != 255] for x in (student, teacher))
    for form in ("kl", "cross_entropy"):
        method = KD(KD.Params(form=form))
        dense = forward(method, student, teacher, target)["kd"]
        torch.testing.assert_close(dense, forward(method, pixels_s, pixels_t, target[target != 255])["kd"])
        (gradient,) = torch.autograd.grad(dense, student)
        assert gradient[:, :, 1:3].count_nonzero() == 0


@pytest.mark.parametrize("method", [KD(), LabelSmoothing()], ids=["kd", "label_smoothing"])
def test_an_image_without_a_labelled_pixel_gives_zero(method: Method):
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    (loss,) = forward(method, logits, 2 * logits.detach(), torch.full((1, 2, 2), 255)).values()
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0


def test_dkd_rises_in_the_same_share_of_any_training():
    student, teacher, labels = example()
    full = forward(DKD(), student, teacher, labels)
    for total_steps in (240, 24_000):
        for step, strength in ((0, 0.0), (total_steps // 24, 0.5), (total_steps // 12, 1.0), (total_steps, 1.0)):
            terms = forward(DKD(), student, teacher, labels, Progress(epoch=0.0, step=step, total_steps=total_steps))
            torch.testing.assert_close(terms, {name: strength * value for name, value in full.items()})
    assert DKD().warmup_epochs(240) == pytest.approx(20)
    assert DKD().warmup_epochs(12) == pytest.approx(1)


def test_dkd_without_a_warmup_has_its_full_weight_from_the_first_step():
    student, teacher, labels = example()
    method = DKD(DKD.Params(warmup_share=0.0))
    first = forward(method, student, teacher, labels, Progress(epoch=0.0, step=0, total_steps=100))
    torch.testing.assert_close(first, forward(DKD(), student, teacher, labels))
    assert method.warmup_epochs(100) == 0


@pytest.mark.parametrize("method", [KD, NKD, DKD])
@pytest.mark.parametrize(
    ("student", "teacher", "problem"),
    [((10,), (100,), r"student gives \[10\], the teacher \[100\]"), ((1,), (1,), "at least two classes"), ((10,), None, "needs a teacher")],
)
def test_a_pair_whose_logits_can_not_be_compared_is_refused(method: type[Method], student: tuple, teacher: tuple | None, problem: str):
    task = TaskInfo("classification", student[0], (3, 8, 8))
    with pytest.raises(UserError, match=problem):
        method().build(Shapes(student, {}), None if teacher is None else Shapes(teacher, {}), task)


def test_every_method_of_the_catalogue_that_needs_no_taps_builds_and_runs_on_its_defaults():
    student, teacher, labels = example()
    for name in METHODS:
        method = build_method(MethodSpec(name=name), None)
        if not method.taps_chosen:
            continue
        method.build(Shapes((5,), {}), Shapes((5,), {}), TaskInfo("classification", 5, (3, 8, 8)))
        terms = forward(method, student, teacher if method.needs_teacher else None, labels)
        assert all(value.dim() == 0 and value.isfinite() for value in terms.values())
        assert method.supports(frozenset({"class logits"}))
