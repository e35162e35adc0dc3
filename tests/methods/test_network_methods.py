"""Methods that read every stage, ask the rest of the teacher, or change the student while it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd import gradcheck

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.adain import restyled, style, style_distance
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, fitted
from kdbench.methods.kdsvd import KDSVD, aligned, correlation, singular_vectors
from kdbench.methods.norm import ExpandedStudent, matching_distance, normalised_logits
from kdbench.methods.ofd import margins, partial_distance
from kdbench.methods.reviewkd import hierarchical_context_loss
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import Taps, probe, tap_shapes
from kdbench.tasks.base import TaskInfo
from kdbench.training.assembly import Training, assemble
from kdbench.training.evaluate import predict
from kdbench.training.loop import close_epoch, fit, train_epoch
from kdbench.training.outcome import finished_record
from kdbench.training.session import LocalSession
from tests.tolerances import rounding
from tests.training.units import killed_and_continued, layout, saved_teacher, unit

NAMES = ("adain", "kdsvd", "norm", "ofd", "reviewkd", "srrl")
GREY = (1, 28, 28)
STUDENT = {"name": "tiny_cnn", "width": 8}
TEACHER: dict[str, Any] = {"name": "cifar_resnet8", "width": 8, "stem_stride": 2}
LATE = Progress(epoch=1.0, step=1, total_steps=2)
every_method = pytest.mark.parametrize("name", NAMES)


def network(spec: Mapping[str, Any], classes: int = 10) -> nn.Module:
    model = build_model(ModelSpec.model_validate(spec), num_classes=classes, in_channels=1, image_size=28, mean=(0.3,), std=(0.3,))
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def at_work(
    method: str | Mapping[str, Any], student: Mapping[str, Any] = STUDENT, teacher: Mapping[str, Any] = TEACHER, classes: int = 10
) -> tuple[Method, nn.Module, nn.Module]:
    """A method on a pair as training prepares it: itself, the student as it is trained, the frozen teacher."""
    torch.manual_seed(0)
    ours, theirs = network(student, classes), network(teacher, classes).eval().requires_grad_(False)
    spec = MethodSpec.model_validate(method)
    found = fitted(spec, tap_shapes(ours, GREY), tap_shapes(theirs, GREY))
    found.build(probe(ours, GREY, found.student_taps), probe(theirs, GREY, found.teacher_taps), TaskInfo("classification", classes, GREY))
    if found.needs_teacher_network:
        found.use_teacher(theirs, GREY)
    return found, found.adapt_student(ours), theirs


def terms_of(method: Method, student: nn.Module, teacher: nn.Module, samples: int = 4, classes: int = 10) -> dict[str, Tensor]:
    images = torch.rand(samples, *GREY, generator=torch.Generator().manual_seed(3))
    return on(method, Taps(student, method.student_taps)(images), Taps(teacher, method.teacher_taps)(images), classes)


def on(method: Method, s: Outputs, t: Outputs, classes: int = 10, at: Progress = LATE) -> dict[str, Tensor]:
    index = torch.arange(len(s.logits))
    return method(s, t, Batch(index, index % classes, index), at)


def gradients_are_finite(modules: list[nn.Module]) -> bool:
    return all(p.grad is None or bool(p.grad.isfinite().all()) for module in modules for p in module.parameters())


# on a pair of networks


WIDER_AND_LARGER = {"name": "tiny_cnn", "width": 12, "stem_stride": 1}  # not for kdsvd, which needs equal widths


@pytest.mark.parametrize(("name", "student"), [(n, STUDENT) for n in NAMES] + [(n, WIDER_AND_LARGER) for n in NAMES if n != "kdsvd"])
def test_the_student_and_the_adapters_learn_from_the_pair(name: str, student: Mapping[str, Any]):
    method, ours, theirs = at_work(name, student)
    terms = terms_of(method, ours, theirs)
    assert all(term.dim() == 0 and term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    first = next(ours.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if p.dim() > 1)
    assert gradients_are_finite([method, ours])
    assert not any(p is q for p in method.parameters() for q in theirs.parameters())


@every_method
def test_a_larger_teacher_map_is_no_obstacle(name: str):
    method, ours, theirs = at_work(name, teacher=TEACHER | {"stem_stride": 1})
    assert all(term.isfinite() for term in terms_of(method, ours, theirs).values())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_huge_logits_stay_finite(name: str, dtype: torch.dtype):
    pinned = {"adain": {"judgement": "logit_kl", "temperature": 0.05, "style_weight": 1.0}, "norm": {"alpha": 1.0, "temperature": 0.05}}
    method, ours, theirs = at_work({"name": name, **pinned.get(name, {})})
    images = torch.rand(4, *GREY)
    student, teacher = Taps(ours, method.student_taps)(images), Taps(theirs, method.teacher_taps)(images)
    maps = {tap: value.detach().to(dtype).requires_grad_() for tap, value in student.maps.items()}
    logits = (1e3 * student.logits.detach()).clamp(-1e3, 1e3).to(dtype).requires_grad_()
    goals = {tap: value.to(dtype) for tap, value in teacher.maps.items()}
    terms = on(method, Outputs(logits, maps), Outputs((1e3 * teacher.logits).clamp(-1e3, 1e3).to(dtype), goals))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in (logits, *maps.values()))


@every_method
def test_maps_of_zeros_give_finite_gradients(name: str):
    method, ours, theirs = at_work(name)
    images = torch.rand(4, *GREY)
    student, teacher = Taps(ours, method.student_taps)(images), Taps(theirs, method.teacher_taps)(images)
    maps = {tap: torch.zeros_like(value, requires_grad=True) for tap, value in student.maps.items()}
    terms = on(method, Outputs(student.logits, maps), teacher)
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(value.grad is not None and value.grad.isfinite().all() for value in maps.values())


@every_method
def test_a_batch_of_one_works_or_says_why_not(name: str):
    method, ours, theirs = at_work(name)
    if name == "reviewkd":
        with pytest.raises(UserError, match=r"method reviewkd: its batch norms can't measure a batch of one; change recipe\.batch_size"):
            terms_of(method, ours, theirs, samples=1)
        method.eval()
    assert all(term.isfinite() for term in terms_of(method, ours, theirs, samples=1).values())


@every_method
def test_two_classes_work(name: str):
    method, ours, theirs = at_work(name, classes=2)
    assert all(term.isfinite() for term in terms_of(method, ours, theirs, classes=2).values())


# derivatives and known values


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(features: Tensor) -> Tensor:
    """Products of singular vectors' entries, which do not depend on their signs."""
    vectors = singular_vectors(features, 3)[1]
    return vectors.unsqueeze(1) * vectors.unsqueeze(2)


PURE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "hierarchical_context_loss": (lambda s: hierarchical_context_loss(s, maps(1, 2, 5, 5, seed=1)), (1, 2, 5, 5)),
    "partial_distance": (lambda s: partial_distance(s, maps(2, 3, 4, 4, seed=1), maps(3, seed=2).abs().neg()), (2, 3, 4, 4)),
    "restyled": (lambda s: restyled(maps(2, 3, 4, 4, seed=1), s), (2, 3, 5, 5)),
    "style_distance": (lambda s: style_distance(s, maps(2, 3, 4, 4, seed=1)), (2, 3, 5, 5)),
    "matching_distance": (lambda s: matching_distance(s, maps(1, 2, 2, 2, seed=1)), (1, 4, 4, 4)),
    "normalised_logits": (lambda s: normalised_logits(s, 2.5), (3, 5)),
    "wide singular_vectors": (directions, (1, 4, 6)),
    "tall singular_vectors": (directions, (1, 6, 4)),
}


@pytest.mark.parametrize(("function", "shape"), PURE.values(), ids=PURE)
def test_gradient_is_the_derivative_of_the_value(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]):
    assert gradcheck(function, maps(*shape).requires_grad_())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_a_constant_difference_weighs_the_same_at_every_size(side: int):
    x = maps(2, 3, side, side)
    assert hierarchical_context_loss(x, x).item() == 0
    assert hierarchical_context_loss(x + 3, x).item() == pytest.approx(9, rel=1e-12)


def test_levels_of_the_pyramid_halve_in_weight():
    checkers = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    checkers[..., 2:] = -1  # its mean vanishes at one pixel, not at two
    assert hierarchical_context_loss(checkers, torch.zeros_like(checkers)).item() == pytest.approx((1 + 0.5) / (1 + 0.5 + 0.25))


def test_reviewkd_rises_from_nothing():
    method, ours, theirs = at_work({"name": "reviewkd", "warmup_share": 0.5})
    images = torch.rand(4, *GREY)
    student, teacher = Taps(ours, method.student_taps)(images), Taps(theirs, method.teacher_taps)(images)
    values = [on(method, student, teacher, at=Progress(step / 10, step, 10))["review"].item() for step in (0, 1, 5, 9)]
    assert values[0] == 0
    assert values[1] == pytest.approx(0.2 * values[2], rel=1e-5)
    assert values[2] == pytest.approx(values[3], rel=1e-5)
    assert method.warmup_epochs(10) == 5


def test_margins_are_means_of_the_negative_half():
    found = margins(torch.tensor([1.0, -2.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0, -1.5, 1.5]))
    half = math.sqrt(2 / math.pi)
    torch.testing.assert_close(found, torch.tensor([-half, -2 * half, -3.0, -1.5, 0.0], dtype=torch.float64))
    draws = 0.7 * maps(200_000) + 0.5
    sampled = draws[draws < 0].mean()
    assert margins(torch.tensor([0.7]), torch.tensor([0.5])).item() == pytest.approx(sampled.item(), abs=5e-3)


def test_what_lies_below_a_negative_goal_costs_nothing():
    teacher, margin = -maps(2, 3, 4, 4).abs(), torch.full((3,), -0.5, dtype=torch.float64)
    goal = teacher.clamp(min=-0.5)
    assert partial_distance(goal - maps(2, 3, 4, 4, seed=1).abs(), teacher, margin).item() == 0
    assert partial_distance(goal + 1, teacher, margin).item() == pytest.approx(3 * 4 * 4)
    assert partial_distance(-teacher - 1, -teacher, margin).item() == pytest.approx(3 * 4 * 4)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_teacher_in_its_own_statistics_stays_what_it_is(seed: int):
    content = maps(2, 3, 4, 4, seed=seed)
    shuffled = content.flatten(2)[..., torch.randperm(16, generator=torch.Generator().manual_seed(seed))].reshape(content.shape)
    torch.testing.assert_close(restyled(content, shuffled), content)
    found, wanted = style(restyled(content, 2 * content + 1)), style(2 * content + 1)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-4)  # the deviations' epsilon
    # Means and variances over 16 positions in another order; the root divides an error of the variance by twice the deviation.
    largest, deviation = content.abs().max().item(), style(content)[1].min().item()
    off = rounding(torch.float64, 2 * 16 + 4, largest * max(1.0, largest / deviation))
    assert style_distance(shuffled, content).item() < 2 * off**2


@pytest.mark.parametrize("judgement", ["logit_mse", "logit_kl", "feature_mse"])
def test_the_judge_finds_no_fault_with_the_teachers_own_statistics(judgement: str):
    method, _, theirs = at_work({"name": "adain", "adapter": False, "judgement": judgement, "style_weight": 1.0})
    outputs = Taps(theirs.double(), method.teacher_taps)(torch.rand(3, *GREY).double())
    alike = on(method, Outputs(outputs.logits, dict(zip(method.student_taps, outputs.maps.values(), strict=True))), outputs)
    # Restyling is off by a few roundings, and the layers behind it add at most 9 * 32 terms each, in three stages. Of logits that are off,
    # a squared distance sees the square. The divergence has its minimum there, so what is left is the rounding of ten log-probabilities.
    largest = max(value.abs().max().item() for value in (outputs.logits, outputs.logits.log_softmax(1), *outputs.maps.values()))
    off = rounding(torch.float64, 3 * 9 * 32, largest)
    bound = rounding(torch.float64, 2 * 10 + 4, largest) if judgement == "logit_kl" else off**2
    assert alike["judged"].item() < len(outputs.maps) * bound
    assert alike["style"].item() == 0
    other = on(
        method, Outputs(outputs.logits, {tap: 2 * m for tap, m in zip(method.student_taps, outputs.maps.values(), strict=True)}), outputs
    )
    assert other["judged"].item() > 1e-4


def test_stages_of_one_width_are_related_where_those_in_the_same_place_differ():
    """Widths 4, 8, 16 of the student, 8, 16, 32 of the teacher."""
    method, ours, theirs = at_work("kdsvd", {"name": "tiny_cnn", "width": 4})
    assert (method.student_taps, method.teacher_taps) == (("stage:1", "stage:2"), ("stage:0", "stage:1"))
    assert terms_of(method, ours, theirs)["kdsvd"].item() > 0


def test_equal_maps_relate_alike_and_the_order_of_positions_does_not_matter():
    method = KDSVD(KDSVD.Params(student_taps=("a", "b"), teacher_taps=("a", "b")))
    ours = {"a": maps(2, 5, 4, 4), "b": maps(2, 6, 4, 4, seed=1)}
    shapes = probe_of(ours)
    method.build(shapes, shapes, TaskInfo("classification", 2, (3, 8, 8)))
    logits = torch.zeros(2, 2)
    # A singular vector is off by the rounding of sums over 16 positions, magnified by how near the next singular value is; the kernel's
    # slope is below 1. The loss adds the squares of all 5 * 6 entries of the kernel, each of which sees two vectors of both networks.
    singular = [torch.linalg.svdvals(x.flatten(2).mT) for x in ours.values()]
    condition = max((values[:, 0] / (values[:, 0] - values[:, 1])).max().item() for values in singular)
    bound = 5 * 6 * (4 * rounding(torch.float64, 16 + 6, condition)) ** 2
    assert on(method, Outputs(logits, ours), Outputs(logits, ours), classes=2)["kdsvd"].item() < bound
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = {tap: x.flatten(2)[..., order].reshape(x.shape) for tap, x in ours.items()}
    assert on(method, Outputs(logits, moved), Outputs(logits, ours), classes=2)["kdsvd"].item() < bound
    other = {tap: maps(*x.shape, seed=7) for tap, x in ours.items()}
    assert on(method, Outputs(logits, other), Outputs(logits, ours), classes=2)["kdsvd"].item() > 1e-3


def test_the_students_nearest_direction_is_turned_to_the_teachers_side():
    teacher = torch.eye(4, dtype=torch.float64)[None, :, :1]
    student = torch.stack([torch.eye(4)[1], -torch.eye(4)[0], torch.eye(4)[2]], dim=1).double()[None]
    torch.testing.assert_close(aligned(student, teacher), teacher)
    assert correlation(torch.zeros(1, 2, 1), torch.full((1, 3, 1), 4.0)).unique().item() == pytest.approx(math.exp(-2))


def probe_of(features: Mapping[str, Tensor]) -> Shapes:
    return Shapes((2,), {tap: TapShape("map", tuple(x.shape[1:])) for tap, x in features.items()})


def test_n_segments_cost_the_sum_of_n_means():
    teacher, wide = maps(2, 3, 4, 4), maps(2, 12, 4, 4, seed=1)
    assert matching_distance(teacher.repeat(1, 4, 1, 1), teacher).item() == 0
    segments = torch.stack([F.mse_loss(wide[:, 3 * n : 3 * n + 3], teacher) for n in range(4)])
    assert matching_distance(wide, teacher).item() == pytest.approx(segments.sum().item(), rel=1e-12)
    pooled = matching_distance(wide, F.interpolate(teacher, scale_factor=2, mode="nearest"))
    assert pooled.item() == pytest.approx(segments.sum().item(), rel=1e-12)


@given(st.floats(0.1, 10), st.floats(-10, 10))
@settings(max_examples=20, deadline=None)
def test_normalised_logits_know_no_scale_and_no_offset(factor: float, offset: float):
    logits = maps(4, 6)
    torch.testing.assert_close(normalised_logits(factor * logits + offset, 2.5), normalised_logits(logits, 2.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalised_logits(logits, 2.5).std(1, correction=0), torch.full((4,), 2.5).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("schedule", "total", "strengths"),
    [
        ("cifar", 240, {0: 0.1, 9: 0.1, 10: 0.5, 20: 1, 179: 1, 180: 0.5, 210: 0.1, 239: 0.1}),
        ("imagenet", 100, {4: 0.1, 5: 0.5, 15: 0.9, 60: 0.5, 80: 0.1, 100: 0.1}),
        ("constant", 10, {0: 1, 9: 1}),
    ],
)
def test_the_matching_has_the_strength_of_its_epoch(schedule: str, total: int, strengths: dict[int, float]):
    method, ours, theirs = at_work({"name": "norm", "schedule": schedule})
    images = torch.rand(2, *GREY)
    student, teacher = Taps(ours, method.student_taps)(images), Taps(theirs, method.teacher_taps)(images)
    whole = on(at_work({"name": "norm", "schedule": "constant"})[0], student_as("expand", student), teacher)["norm"].item()
    for step, strength in strengths.items():
        assert on(method, student, teacher, at=Progress(step, step, total))["norm"].item() == pytest.approx(strength * whole, rel=1e-5)


def student_as(tap: str, outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits, {tap: next(iter(outputs.maps.values()))})


# pairs that can't work


@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        ("ofd", STUDENT, {"name": "tests.training.units:smooth_net"}, "can't compare|takes its margins from a batch norm"),
        (
            {"name": "ofd", "student_taps": ["stage:0"], "teacher_taps": ["stage:0"]},
            STUDENT,
            TEACHER,
            r"ofd .*'stage:0' \(map \[8, 14, 14\]\).*",
        ),
        ({"name": "srrl", "teacher_taps": ["stage:-1"]}, STUDENT, TEACHER, "a vector such as 'pooled'"),
        ({"name": "srrl", "student_taps": ["pooled"]}, STUDENT, TEACHER, "can't be read as a map; tap a stage"),
        ({"name": "adain", "adapter": False}, {"name": "tiny_cnn", "width": 4}, TEACHER, "leave out `adapter: false`"),
        ({"name": "adain", "student_taps": ["stage:-1"], "teacher_taps": ["pooled"]}, STUDENT, TEACHER, "can't be read as a map"),
        ("kdsvd", {"name": "tiny_cnn", "width": 6}, TEACHER, "the same number of channels"),
        ({"name": "kdsvd", "vectors": 14}, STUDENT, TEACHER, "takes 17 singular vectors"),
        ({"name": "kdsvd", "student_taps": ["stage:0"], "teacher_taps": ["stage:0"]}, STUDENT, TEACHER, "at least two student_taps"),
        ({"name": "norm", "segments": 1}, {"name": "tiny_cnn", "width": 4}, TEACHER, "with `segments: 1` both need the same"),
        ({"name": "norm", "student_taps": ["stage:0"]}, STUDENT, TEACHER, "the mean over space and one linear layer"),
        ("norm", {"name": "tests.training.units:smooth_net"}, TEACHER, "the mean over space and one linear layer"),
    ],
)
def test_a_pair_that_can_not_work_is_one_readable_line(method: Any, student: Any, teacher: Any, message: str):
    with pytest.raises(UserError, match=message) as error:
        at_work(method, student, teacher)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("teacher", "paths"),
    [
        (TEACHER, ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]),
        ({"name": "wrn_16_1", "stem_stride": 2}, ["layer2.0.bn1", "layer3.0.bn1", "bn"]),
        ({"name": "tiny_cnn", "width": 4}, ["layer1.1", "layer2.1", "layer3.1"]),
    ],
)
def test_ofd_takes_its_margins_from_the_norm_in_front_of_each_stages_activation(teacher: Mapping[str, Any], paths: list[str]):
    method, _, theirs = at_work("ofd", teacher=teacher)
    for position, path in enumerate(paths):
        norm = theirs.get_submodule(path)
        torch.testing.assert_close(method.get_buffer(f"margin{position}"), margins(norm.weight, norm.bias).float())
    assert not any(name.startswith("margin") for name in method.state_dict())


def test_a_norm_behind_the_tapped_activation_is_not_taken_for_the_one_in_front():
    named = {"name": "ofd", "student_taps": ["stage:0"], "teacher_taps": ["before:block0.2"]}
    method, _, theirs = at_work(named, teacher={"name": "vgg13"})
    norm = theirs.get_submodule("block0.1")
    torch.testing.assert_close(method.get_buffer("margin0"), margins(norm.weight, norm.bias).float())


# what is deployed


@pytest.mark.parametrize("student", [STUDENT, {"name": "wrn_16_1"}, {"name": "mobilenetv2_half"}], ids=lambda spec: spec["name"])
def test_an_exported_student_predicts_what_the_trained_one_did_and_has_no_weight_more(student: Mapping[str, Any]):
    method, trained, _ = at_work("norm", student)
    assert isinstance(trained, ExpandedStudent)
    trained.double().eval()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    plain = network(student)
    images = torch.rand(5, *GREY).double()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    exported = method.export_student(trained)
    assert exported.state_dict().keys() == plain.state_dict().keys()
    assert [p.shape for p in exported.parameters()] == [p.shape for p in plain.parameters()]
    torch.testing.assert_close(exported(images), trained(images), rtol=1e-10, atol=1e-10)
    assert (exported(images) - trained.network(images)).abs().max() > 1e-2
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_one_segment_leaves_the_student_as_it_is():
    method, student, _ = at_work({"name": "norm", "segments": 1})
    assert type(student).__name__ == "TinyCNN"
    assert method.export_student(student) is student
    assert method.student_taps == ("layer3",)


def a_training(tmp_path: Path, method: Any, **recipe: Any) -> Any:
    return unit(method, saved_teacher(tmp_path, recipe.get("precision", "fp32"), TEACHER), student=STUDENT, recipe={"epochs": 1, **recipe})


@pytest.mark.parametrize("recipe", [{}, {"epochs": 2, "ema": 0.5, "weights": "best"}], ids=["plain", "average-and-best"])
def test_the_saved_file_is_a_plain_student_with_the_trained_ones_predictions(tmp_path: Path, recipe: Mapping[str, Any]):
    run: Training = assemble(a_training(tmp_path, "norm", precision="fp64", **recipe), LocalSession())
    for epoch in range(run.unit.recipe.epochs):
        train_epoch(run, epoch)
        close_epoch(run)
    finished_record(run, layout(tmp_path))
    plain = run.task.build_model(run.unit.student).double()
    plain.load_state_dict(load_file(layout(tmp_path).student(run.unit.key)), strict=True)
    trained = predict(run.evaluated, run.splits.val, LocalSession(), "fp64", run.task)
    torch.testing.assert_close(predict(plain, run.splits.val, LocalSession(), "fp64", run.task), trained, rtol=1e-10, atol=1e-10)


def test_a_killed_training_of_an_expanded_student_continues_to_the_same_bits(tmp_path: Path):
    whole = a_training(tmp_path, "norm", ema=0.9, weights="best", epochs=2).model_copy(update={"checkpoint_seconds": 0})
    fit(whole, LocalSession(), layout(tmp_path / "whole"))
    killed_and_continued(whole, tmp_path / "continued", 7)
    a, b = (load_file(layout(tmp_path / side).student(whole.key)) for side in ("whole", "continued"))
    assert all(torch.equal(a[name], b[name]) for name in a)
