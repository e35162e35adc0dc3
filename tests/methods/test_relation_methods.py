"""Methods that compare the samples of a batch, and USKD: known values, identities, any pair of networks, one training each."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from kdbench.data.batch import Batch, Part
from kdbench.errors import UserError
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, fitted, method_class, params_of
from kdbench.methods.cc import CC, neighbour_product_loss
from kdbench.methods.crd import CRD, Contrast, contrastive_loss
from kdbench.methods.features import FeatureMethod
from kdbench.methods.pkt import PKT, neighbourhood_loss
from kdbench.methods.rkd import RKD, angle_loss, distance_loss
from kdbench.methods.sp import SP, similarity_loss
from kdbench.methods.uskd import USKD, nontarget_loss, target_loss, weak_loss
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import Taps, probe, tap_shapes
from kdbench.tasks.base import TaskInfo
from kdbench.training.assembly import assemble
from kdbench.training.session import LocalSession
from tests.tolerances import rounding
from tests.training.units import saved_teacher, unit

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "sp": similarity_loss,
    "rkd_distance": distance_loss,
    "rkd_angle": angle_loss,
    "pkt": neighbourhood_loss,
    "cc": neighbour_product_loss,
}
COMPARING = ("sp", "rkd", "pkt", "cc", "crd")
METHODS_HERE = (*COMPARING, "uskd")
IMAGE = (1, 28, 28)
CLASSES = 10
DONE = Progress(1.0, 1, 1)
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_method = pytest.mark.parametrize("name", METHODS_HERE)


def example(samples: int = 6, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of student and teacher, equally wide, as CC needs them; the other losses take any widths."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(samples, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def part_of(samples: int, classes: int = CLASSES, first: int = 0) -> Part:
    """Samples of all classes in turn, at every third position of their source."""
    return Part(torch.zeros(samples, *IMAGE), torch.arange(samples) % classes, first + 3 * torch.arange(samples))


def network(name: str, **options: int) -> nn.Module:
    spec = ModelSpec.model_validate({"name": name, **options})
    return build_model(spec, num_classes=CLASSES, in_channels=1, image_size=28, mean=(0.3,), std=(0.3,))


def built(value: Mapping[str, Any], student: nn.Module, teacher: nn.Module, samples: int = 20) -> Method:
    method = fitted(
        MethodSpec.model_validate(value), tap_shapes(student, IMAGE), tap_shapes(teacher, IMAGE), torch.Generator().manual_seed(0)
    )
    shapes = probe(student, IMAGE, method.student_taps), probe(teacher, IMAGE, method.teacher_taps)
    method.build(*shapes, TaskInfo("classification", CLASSES, IMAGE))
    method.use_samples(part_of(samples))
    return method


# gradients and the limits of arithmetic


@every_loss
@pytest.mark.parametrize("samples", [2, 5])
def test_gradient_is_the_derivative_of_the_value(loss: Loss, samples: int) -> None:
    student, teacher = example(samples)
    assert gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("loss", [similarity_loss, distance_loss, angle_loss, neighbourhood_loss])
def test_widths_need_not_agree(loss: Loss) -> None:
    student, teacher = example()[0], example(width=9, seed=1)[1]
    assert gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_value_and_gradient_are_finite_at_the_limits(loss: Loss, dtype: torch.dtype, scale: float, samples: int) -> None:
    student, teacher = example(samples, width=64)
    student = (scale * student).to(dtype).float().requires_grad_()  # a leaf of float32: a steep gradient need not fit the half
    value = loss(student.to(dtype) if dtype is torch.bfloat16 else student, (scale * teacher).to(dtype))
    value.backward()
    assert value.dtype == torch.float32
    assert value.dim() == 0
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("kind", ["all zero", "all equal", "one zero"])
def test_samples_that_coincide_give_a_finite_value_and_gradient(loss: Loss, kind: str) -> None:
    student, teacher = (x.float() for x in example())
    if kind == "one zero":
        student[0] = 0
    else:
        student = torch.full_like(student, float(kind == "all equal"))
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_loss
def test_a_batch_of_one_has_nothing_to_compare(loss: Loss) -> None:
    student, teacher = example(samples=1)
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    off = rounding(torch.float64, student.numel() + 8)  # a length, and a few steps with numbers of at most 1
    assert value.item() == pytest.approx(0, abs=off)
    assert student.grad is not None
    assert student.grad.abs().max() < off / student.norm().item()  # of a direction, whose derivative is one over the length


@every_loss
def test_a_loss_compiles_into_one_graph(loss: Loss) -> None:
    student, teacher = example()
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(student, teacher), loss(student, teacher))


# known values and identities


@every_loss
def test_a_loss_is_zero_with_zero_gradient_where_student_and_teacher_agree(loss: Loss) -> None:
    """PKT's gradient is as small as the 1e-7 that is added to its probabilities."""
    _, teacher = example()
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    off = rounding(torch.float64, student.numel() + 2 * len(student), teacher.abs().max().item() ** 2)  # sums over width, then samples
    assert abs(value.item()) < off
    assert student.grad is not None
    shortest = torch.pdist(teacher).min().item()  # an error of a distance or of an angle counts the more, the shorter the side is
    assert student.grad.abs().max() < (1e-7 if loss is neighbourhood_loss else off / min(1.0, shortest) ** 2)


def test_sp_of_two_samples_by_hand() -> None:
    """The student finds both alike, the teacher finds them orthogonal: rows (1, 1) / sqrt 2 against (1, 0) and (0, 1)."""
    student, teacher = torch.ones(2, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    half = math.sqrt(0.5)
    assert similarity_loss(student, teacher).item() == pytest.approx((2 * (1 - half) ** 2 + 2 * half**2) / 4)


def test_rkd_of_a_right_angle_and_a_line_by_hand() -> None:
    """Student: 0, 3, 4 on a line; teacher: a right angle with legs 3 and 4."""
    student = torch.tensor([[0.0], [3.0], [4.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    ours, theirs = [3 / (8 / 3), 4 / (8 / 3), 1 / (8 / 3)], [3 / 4, 4 / 4, 5 / 4]
    by_hand = sum(0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(ours, theirs, strict=True))
    assert distance_loss(student, teacher).item() == pytest.approx(2 * by_hand / 9)
    # At each corner the angle counts twice: (1, 0), (-1, 3/5), (1, 4/5) are the cosines of student and teacher.
    huber = [0.5, 1.6 - 0.5, 0.5 * 0.2**2]
    assert angle_loss(student, teacher).item() == pytest.approx(2 * sum(huber) / 27)


def test_pkt_of_two_samples_by_hand() -> None:
    student, teacher = torch.ones(2, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    wanted = (2 / 3 * math.log((2 / 3) / 0.5) + 1 / 3 * math.log((1 / 3) / 0.5)) / 2
    assert neighbourhood_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-6)


def test_cc_multiplies_what_neighbours_differ_by() -> None:
    student, teacher = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 1.0]]), torch.zeros(3, 2)
    assert neighbour_product_loss(student, teacher).item() == pytest.approx(((1 * 3 + 2 * 4) + (3 * 0 + 4 * 1)) / 2)
    assert neighbour_product_loss(student[[1, 0, 2]], teacher).item() != pytest.approx(neighbour_product_loss(student, teacher).item())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.floats(0.1, 10))
def test_what_a_relation_does_not_depend_on(seed: int, samples: int, scale: float) -> None:
    student, teacher = example(samples, seed=seed)
    student = (
        1e4 * student
    )  # so long that the epsilon which pkt adds to lengths is nothing beside them, even where two samples are opposite
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    turned = scale * student @ rotation(5, seed)
    for name in ("sp", "rkd_distance", "rkd_angle", "pkt"):
        loss = LOSSES[name]
        torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))
        torch.testing.assert_close(loss(turned, teacher), loss(student, teacher), rtol=1e-5, atol=1e-8)
    for name in ("rkd_distance", "rkd_angle"):
        torch.testing.assert_close(LOSSES[name](student + scale, teacher), LOSSES[name](student, teacher))
    lengths = torch.rand(samples, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    torch.testing.assert_close(neighbourhood_loss(lengths * student, teacher), neighbourhood_loss(student, teacher), rtol=1e-5, atol=1e-8)


def test_rkd_can_compare_squared_distances() -> None:
    student, teacher = example()
    squares = [torch.cdist(x, x).square() for x in (student, teacher)]
    relative = [x / (x.sum() / 30) for x in squares]
    torch.testing.assert_close(distance_loss(student, teacher, squared=True), F.smooth_l1_loss(*relative))


# CRD's contrast and its memory


def contrast_of(samples: int = 12, dimensions: int = 4) -> Contrast:
    contrast = Contrast(5, 7, dimensions)
    contrast.remember(samples, torch.Generator().manual_seed(0))
    return contrast.double()


def crd(samples: int = 12, classes: int = 3, seed: int = 0, **params: Any) -> CRD:
    torch.manual_seed(0)
    settings_ = {"student_taps": ("a",), "teacher_taps": ("b",), "negatives": 8, "dimensions": 4, **params}
    method = CRD(CRD.Params.model_validate(settings_), torch.Generator().manual_seed(seed))
    taps = ({"a": TapShape("vector", (5,))}, {"b": TapShape("vector", (7,))})
    method.build(Shapes((classes,), taps[0]), Shapes((classes,), taps[1]), TaskInfo("classification", classes, IMAGE))
    method.use_samples(part_of(samples, classes, first=100))
    return method


def test_crds_loss_is_that_of_its_equation() -> None:
    h = torch.tensor([[3.0, 0.5, 0.2], [0.1, 2.0, 1.0]], dtype=torch.float64)
    noise = 2 / 50
    own = -(h[:, 0] / (h[:, 0] + noise)).log()
    others = -(noise / (h[:, 1:] + noise)).log().sum(1)
    torch.testing.assert_close(contrastive_loss(h.log(), 50), (own + others).mean(), rtol=1e-5, atol=0)


def test_crds_gradient_is_the_derivative_of_its_value() -> None:
    candidates = torch.tensor([[0, 3, 4, 5], [7, 1, 1, 2]])
    student, teacher = example(2)[0], example(2, width=7)[1]

    contrast = contrast_of()
    contrast.log_partition.fill_(0.7)

    def value(s: Tensor, t: Tensor) -> Tensor:
        return copy.deepcopy(contrast)(s, t, candidates, 0.5, 0.5)  # a copy each time: a forward pass moves the memory

    assert gradcheck(value, (student.requires_grad_(), teacher.requires_grad_()))


@pytest.mark.parametrize("temperature", [0.005, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_crd_is_finite_at_the_limits(temperature: float, dtype: torch.dtype, scale: float) -> None:
    method = crd(temperature=temperature, negatives=50)
    student, teacher = scale * example(3)[0], scale * example(3, width=7)[1]
    index = 100 + 3 * torch.arange(3)
    ours = student.to(dtype).requires_grad_()
    for _ in range(3):  # the memory comes near to the embeddings: scores of up to exp(1 / temperature)
        value = method(Outputs(ours, {"a": ours}), Outputs(teacher, {"b": teacher.to(dtype)}), Batch(index, index, index), DONE)["crd"]
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


def test_crds_candidates_are_the_sample_itself_and_samples_of_other_classes_equally_often() -> None:
    method = crd(samples=12, classes=3, negatives=3000)
    index = torch.tensor([100, 103, 133])
    candidates = method.candidates(index)
    assert candidates[:, 0].tolist() == [0, 1, 11]
    for own, others in zip((0, 1, 11), candidates[:, 1:], strict=True):
        counted = Counter(others.tolist())
        assert set(counted) == {row for row in range(12) if row % 3 != own % 3}
        assert min(counted.values()) > 3000 / 8 * 0.8


def test_crd_draws_from_its_generator_alone() -> None:
    index = torch.tensor([100, 103, 106])
    first, second, other = crd(), crd(), crd(seed=1)
    assert torch.equal(first.contrasts[0].memory_student, second.contrasts[0].memory_student)
    torch.manual_seed(99)
    drawn = first.candidates(index)
    assert torch.equal(drawn, second.candidates(index))
    assert not torch.equal(drawn, second.candidates(index))
    assert not torch.equal(drawn, other.candidates(index))


def test_crds_memory_follows_the_embeddings_of_the_batch_and_of_no_other_sample() -> None:
    method = crd(momentum=0.25).double()
    (contrast,) = method.contrasts
    before = contrast.memory_teacher.clone()
    student, teacher = example(2)[0], example(2, width=7)[1]
    index = torch.tensor([106, 100])
    method(Outputs(student, {"a": student}), Outputs(teacher, {"b": teacher}), Batch(index, index, index), DONE)
    embedding = F.normalize(contrast.embed_teacher(teacher), dim=1)
    wanted = before.clone()
    wanted[[2, 0]] = F.normalize(0.25 * before[[2, 0]] + 0.75 * embedding, dim=1)
    torch.testing.assert_close(contrast.memory_teacher, wanted)


def test_crds_partition_functions_are_those_of_the_first_batch() -> None:
    method = crd().double()
    (contrast,) = method.contrasts
    assert contrast.log_partition.isnan().all()
    student, teacher = example(2)[0], example(2, width=7)[1]
    index = torch.tensor([106, 100])
    candidates = method.candidates(index)
    scores = F.normalize(contrast.embed_student(student), dim=1) @ contrast.memory_teacher.T
    wanted = (scores.gather(1, candidates) / 0.07).exp().mean() * 12
    method.contrasted(Outputs(student, {"a": student}), Outputs(teacher, {"b": teacher}), candidates)
    torch.testing.assert_close(contrast.log_partition[0].exp(), wanted)
    first = contrast.log_partition.clone()
    method.contrasted(Outputs(student, {"a": 2 - student}), Outputs(teacher, {"b": teacher}), candidates)
    assert torch.equal(contrast.log_partition, first)


def test_crd_needs_samples_of_two_classes() -> None:
    with pytest.raises(UserError, match="method crd draws samples of other classes, and all 12 training samples are of one"):
        crd(classes=1)


def test_crd_remembers_the_samples_that_students_learn_from_and_no_others(tmp_path: Path) -> None:
    run = assemble(unit({"name": "crd", "negatives": 32}, saved_teacher(tmp_path)), LocalSession())
    method = run.distiller.method
    assert isinstance(method, CRD)
    assert len(method.contrasts[0].memory_student) == 300  # of the source's 60,000


def test_crd_beside_another_method_has_its_memory_too() -> None:
    student, teacher = network("tiny_cnn", width=6).eval(), network("tiny_cnn", width=8).eval()
    method = built({"name": "kd+crd", "crd": {"negatives": 8}}, student, teacher)
    images, labels = torch.rand(3, *IMAGE), torch.arange(3)
    s, t = Taps(student, method.student_taps)(images), Taps(teacher, method.teacher_taps)(images)
    assert method(s, t, Batch(images, labels, 3 * labels), DONE).keys() == {"kd", "crd"}
    assert method.batch_coupled


# USKD


def logits_and_labels(samples: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    student, weak = (2 * x for x in example(samples, classes))
    return student, weak, torch.arange(samples) % classes


def soft(labels: Tensor, classes: int, share: float = 0.7) -> Tensor:
    """Mixup's: two labels a sample."""
    return share * F.one_hot(labels, classes).double() + (1 - share) * F.one_hot((labels + 1) % classes, classes).double()


@pytest.mark.parametrize("mixed", [False, True], ids=["hard", "soft"])
def test_uskds_soft_targets_are_constant(mixed: bool) -> None:
    logits, weak, labels = logits_and_labels()
    target = soft(labels, 5) if mixed else labels
    p = logits.softmax(1)
    logits.requires_grad_()
    target_loss(logits, target).backward()
    kept = [(labels, 0.7), ((labels + 1) % 5, 0.3)] if mixed else [(labels, 1.0)]
    wanted = torch.zeros_like(p)
    for label, value in kept:
        own = p[torch.arange(6), label].square()
        wanted += (own + value - own.mean())[:, None] * (p - F.one_hot(label, 5)) / 6
    torch.testing.assert_close(logits.grad, wanted)
    weak.requires_grad_()
    assert not torch.autograd.grad(nontarget_loss(logits, weak, target), weak, allow_unused=True)[0]
    assert gradcheck(lambda z: weak_loss(z, target), weak)


def test_uskds_other_classes_get_one_over_their_rank_among_all() -> None:
    """Scores fall from class 0 to 3, the label is class 1: its own rank stays counted, so the others get 1, 1/3 and 1/4, normalised."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    value = nontarget_loss(logits, logits, torch.tensor([1]))
    shares = torch.tensor([1, 1 / 3, 1 / 4], dtype=torch.float64)
    wanted = -(shares / shares.sum() * logits[0, [0, 2, 3]].log_softmax(0)).sum()
    torch.testing.assert_close(value, wanted)


def test_uskd_ranks_by_a_probability_of_the_weak_head_and_a_logarithm_of_the_student() -> None:
    """The quirk of the authors' code: by probabilities of both, class 2 would come before class 1."""
    student = torch.tensor([[0.0, 2.0, 2.4, -9.0]], dtype=torch.float64)
    weak = torch.tensor([[0.0, 2.0, 1.0, -9.0]], dtype=torch.float64)
    w, log_p = weak.softmax(1)[0], student.log_softmax(1)[0]
    scores = w / (1 - w[0] + 1e-6) + log_p / (1 - log_p[0] + 1e-6)
    assert scores[1] > scores[2]
    ranks = scores.argsort(descending=True).argsort() + 1
    shares = (1 / ranks[1:]).double()
    wanted = -(shares / shares.sum() * student[0, 1:].log_softmax(0)).sum()
    torch.testing.assert_close(nontarget_loss(student, weak, torch.tensor([0])), wanted)


def test_uskds_target_loss_of_one_sample_is_cross_entropy() -> None:
    logits, _, labels = logits_and_labels(samples=1)
    torch.testing.assert_close(target_loss(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("target", [torch.tensor([0, 1]), torch.tensor([[0.7, 0.3], [0.0, 1.0]])], ids=["hard", "soft"])
def test_two_classes_leave_uskd_no_other_class(target: Tensor) -> None:
    logits = torch.randn(2, 2, requires_grad=True)
    value = nontarget_loss(logits, torch.randn(2, 2), target)
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (5, 2), (4, 100)])
@pytest.mark.parametrize("mixed", [False, True], ids=["hard", "soft"])
def test_uskd_is_finite_at_the_limits(dtype: torch.dtype, scale: float, samples: int, classes: int, mixed: bool) -> None:
    student, weak, labels = logits_and_labels(samples, classes)
    target = soft(labels, classes) if mixed else labels
    ours, theirs = ((scale * x.sign()).to(dtype).requires_grad_() for x in (student, weak))
    value = target_loss(ours, target) + nontarget_loss(ours, theirs, target) + weak_loss(theirs, target)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (ours, theirs))


@pytest.mark.parametrize(
    ("shapes", "tap"),
    [
        ({"stage:0": (4, 8, 8), "stage:1": (8, 4, 4), "stage:2": (16, 2, 2)}, "stage:1"),
        ({"stage:0": (4, 8, 8)}, "stage:0"),
        ({"stage:0": (17, 6), **{f"block:{k}": (17, 6) for k in range(12)}}, "block:5"),
    ],
    ids=["second-last-stage", "one-stage", "middle-block"],
)
def test_uskd_reads_the_middle_of_the_student(shapes: dict[str, tuple[int, ...]], tap: str) -> None:
    taps = {name: TapShape("map" if len(shape) == 3 else "tokens", shape) for name, shape in shapes.items()}
    assert USKD().choose_taps(Shapes((5,), taps), None).student_taps == (tap,)  # type: ignore[attr-defined]


def test_uskd_reads_a_transformers_class_token_and_the_mean_of_tokens_without_one() -> None:
    tokens = torch.randn(3, 17, 6)
    labels = torch.arange(3)
    for shape, seen in (((17, 6), tokens[:, 0]), ((16, 6), tokens[:, 1:].mean(1))):
        method = USKD(USKD.Params(student_taps=("block:5",), mu=1.0))
        method.build(Shapes((5,), {"block:5": TapShape("tokens", shape)}), None, TaskInfo("classification", 5, IMAGE))
        found = method(Outputs(torch.randn(3, 5), {"block:5": tokens[:, 17 - shape[0] :]}), None, Batch(labels, labels, labels), DONE)
        torch.testing.assert_close(found["weak"], weak_loss(method.weak_head(seen), labels))


# the methods on real networks


@every_method
@pytest.mark.parametrize("batch", [1, 4])
def test_a_pair_of_unequal_widths_and_sizes_works_on_the_default_taps(name: str, batch: int) -> None:
    student, teacher = network("tiny_cnn", width=6), network("cifar_resnet8", width=8, stem_stride=2)
    method = built({"name": name}, student.eval(), teacher.eval().requires_grad_(False))
    images, labels = torch.rand(batch, *IMAGE), torch.arange(batch)
    s, t = Taps(student, method.student_taps)(images), Taps(teacher, method.teacher_taps)(images)
    terms = method(s, t, Batch(images, labels, 3 * labels), DONE)
    assert all(value.dim() == 0 and value.isfinite() for value in terms.values())
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(student.layer1.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if batch > 1:
        assert all(gradient.count_nonzero() for gradient in gradients)


def test_the_default_taps_are_what_the_classifiers_read_and_for_sp_the_last_maps() -> None:
    student, teacher = network("tiny_cnn", width=6), network("cifar_resnet8", width=8, stem_stride=2)
    for name in COMPARING:
        method = built({"name": name}, student, teacher)
        wanted = ("stage:-1",) if name == "sp" else ("pooled",)
        assert method.student_taps == method.teacher_taps == wanted


@pytest.mark.parametrize("name", COMPARING)
def test_maps_that_the_user_names_are_compared_pair_by_pair(name: str) -> None:
    student, teacher = network("tiny_cnn", width=6), network("cifar_resnet8", width=8, stem_stride=2)
    both = {"student_taps": ["stage:0", "stage:-1"], "teacher_taps": ["stage:0", "stage:-1"]}
    torch.manual_seed(0)
    method = built({"name": name, **both}, student.eval(), teacher.eval())
    images, labels = torch.rand(3, *IMAGE), torch.arange(3)
    s, t = Taps(student, method.student_taps)(images), Taps(teacher, method.teacher_taps)(images)
    whole = sum(value.item() for value in method(s, t, Batch(images, labels, 3 * labels), DONE).values())
    assert math.isfinite(whole)
    assert len([key for key in method.state_dict() if key.endswith("weight")]) == {"cc": 4, "crd": 4}.get(name, 0)
    if name in ("sp", "rkd", "pkt"):
        parts = []
        for tap in ("stage:0", "stage:-1"):
            one = built({"name": name, "student_taps": [tap], "teacher_taps": [tap]}, student, teacher)
            parts += [value.item() for value in one(s, t, Batch(images, labels, 3 * labels), DONE).values()]
        assert whole == pytest.approx(sum(parts), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "weight", "terms"),
    [
        ("sp", "weight", ("sp",)),
        ("rkd", "distance_weight", ("distance",)),
        ("rkd", "angle_weight", ("angle",)),
        ("pkt", "weight", ("pkt",)),
        ("cc", "weight", ("cc",)),
        ("crd", "weight", ("crd",)),
        ("uskd", "alpha", ("target",)),
        ("uskd", "beta", ("nontarget",)),
        ("uskd", "mu", ("weak",)),
    ],
)
def test_a_weight_multiplies_its_terms(name: str, weight: str, terms: tuple[str, ...]) -> None:
    student, teacher = network("tiny_cnn", width=6).eval(), network("tiny_cnn", width=8).eval()
    images, labels = torch.rand(3, *IMAGE), torch.arange(3)
    found = []
    for value in (1.0, 2.5):
        torch.manual_seed(0)
        method = built({"name": name, weight: value}, student, teacher)
        s, t = Taps(student, method.student_taps)(images), Taps(teacher, method.teacher_taps)(images)
        found.append(method(s, t, Batch(images, labels, 3 * labels), DONE))
    for term, value in found[0].items():
        torch.testing.assert_close(found[1][term], (2.5 if term in terms else 1.0) * value)


def test_defaults_are_the_published_ones() -> None:
    own: dict[type[Method], dict[str, Any]] = {
        SP: {"weight": 3000.0},
        RKD: {"distance_weight": 25.0, "angle_weight": 50.0, "squared": False},
        PKT: {"weight": 30_000.0},
        CC: {"weight": 0.02, "dimensions": 128},
        CRD: {"weight": 0.8, "temperature": 0.07, "negatives": 16_384, "momentum": 0.5, "dimensions": 128},
        USKD: {"alpha": 0.1, "beta": 0.1, "mu": 0.1},
    }
    for kind, wanted in own.items():
        shared = {"task_weight": 1.0, "student_taps": ()} | ({"teacher_taps": ()} if issubclass(kind, FeatureMethod) else {})
        assert kind.Params().model_dump() == {**shared, **wanted}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "uskd", "student_taps": ["stage:7"]}, "method uskd: student_taps: there is no tap 'stage:7'; did you mean 'stage:"),
        ({"name": "crd", "student_taps": ["pooledd"]}, "method crd: student_taps: there is no tap 'pooledd'; did you mean 'pooled'?"),
        (
            {"name": "pkt", "student_taps": ["stage:0", "stage:1"], "teacher_taps": ["stage:0"]},
            "2 student_taps (stage:0, stage:1) can't be",
        ),
    ],
)
def test_a_tap_that_is_not_there_is_one_readable_line(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        built(value, network("tiny_cnn", width=6), network("tiny_cnn", width=8))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "uskd", "student_taps": ["stage:0", "stage:1"]}, "method 'uskd': student_taps"),
        ({"name": "crd", "negatives": 0}, "negatives: expected greater than or equal to 1, got 0"),
        ({"name": "crd", "momentum": 1}, "momentum: expected less than 1, got 1"),
        ({"name": "cc", "dimensions": 0}, "dimensions: expected greater than or equal to 1, got 0"),
    ],
)
def test_a_parameter_outside_its_domain_is_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        params_of(MethodSpec.model_validate(value))
    assert message in str(caught.value)


def test_uskd_refuses_a_student_without_classes_to_rank_or_tokens_it_can_not_place() -> None:
    method = USKD(USKD.Params(student_taps=("block:0",)))
    with pytest.raises(UserError, match=r"uskd needs logits of at least two classes, the student gives \[1\]"):
        method.build(Shapes((1,), {"block:0": TapShape("tokens", (17, 6))}), None, TaskInfo("classification", 1, IMAGE))
    with pytest.raises(UserError, match="method uskd can't read the student's 'block:0': 15 tokens make no square grid"):
        method.build(Shapes((5,), {"block:0": TapShape("tokens", (15, 6))}), None, TaskInfo("classification", 5, IMAGE))
    with pytest.raises(UserError, match="there is no stage in one of the networks"):
        USKD().choose_taps(Shapes((5,), {}), None)


@pytest.mark.parametrize("name", COMPARING)
def test_a_comparison_needs_a_teacher(name: str) -> None:
    with pytest.raises(UserError, match=f"method {name} needs a teacher"):
        method_class(MethodSpec(name=name))().choose_taps(tap_shapes(network("tiny_cnn", width=6), IMAGE), None)
