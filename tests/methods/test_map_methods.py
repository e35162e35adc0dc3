"""Methods that compare maps place by place: known values, identities, limits of arithmetic, any pair of networks, one training each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.ab import AB, boundary_loss, stage_weights
from kdbench.methods.at import attention_loss, attention_map
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, fitted, method_class, params_of, search_axes
from kdbench.methods.cwd import CWD, channel_divergence
from kdbench.methods.fsp import flow_loss
from kdbench.methods.ft import FT, Paraphraser, factor_loss
from kdbench.methods.mgd import MGD, generation_loss, mask_from
from kdbench.methods.nst import neuron_selectivity_loss
from kdbench.methods.pkd import correlation_loss
from kdbench.methods.vid import VID, Guess, gaussian_loss
from kdbench.models.adapters import shape_of
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import Taps, tap_shapes
from kdbench.tasks.base import TaskInfo
from tests.tolerances import rounding

Loss = Callable[[Tensor, Tensor], Tensor]

NAMES = ("fitnet", "at", "nst", "pkd", "cwd", "mgd", "fsp", "ab", "ft", "vid")
DONE = Progress(epoch=1.0, step=1, total_steps=1)
TASK = TaskInfo("classification", 7, (3, 32, 32))


def two_places(features: Tensor) -> list[Tensor]:
    """A map and one of half its size: the least that has a flow."""
    return [features, F.max_pool2d(features, 2)]


LOSSES: dict[str, Loss] = {
    "at": attention_loss,
    "at, power 4": lambda s, t: attention_loss(s, t, power=4),
    "nst": neuron_selectivity_loss,
    "pkd": correlation_loss,
    "cwd": lambda s, t: channel_divergence(s, t, 4.0),
    "cwd, cold": lambda s, t: channel_divergence(s, t, 0.05),
    "mgd": generation_loss,
    "fsp": lambda s, t: flow_loss(two_places(s), two_places(t)),
    "ab": boundary_loss,
    "ft": factor_loss,
    "ft, norm 2": lambda s, t: factor_loss(s, t, norm=2),
    "vid": lambda s, t: gaussian_loss(s, torch.ones(s.shape[1]), t),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_method = pytest.mark.parametrize("name", NAMES)


def maps(samples: int = 3, channels: int = 4, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(samples, channels, size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


# gradients and the limits of arithmetic


@every_loss
def test_gradient_is_the_derivative_of_the_value(loss: Loss) -> None:
    student, teacher = maps()
    assert gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("samples", [1, 3])
def test_value_and_gradient_are_finite_at_the_limits(loss: Loss, dtype: torch.dtype, scale: float, samples: int) -> None:
    if loss is LOSSES["fsp"] and dtype == torch.float16:
        scale = min(scale, 30.0)  # the derivative grows with the third power of the features, and has no place in half precision soon after
    student, teacher = ((scale * x).to(dtype) for x in maps(samples))
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.dim() == 0
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_single_value_has_no_deviation_and_no_gradient_that_is_not_finite() -> None:
    student, teacher = torch.randn(1, 3, 1, 1, requires_grad=True), torch.randn(1, 3, 1, 1)
    loss = correlation_loss(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_learned_scale_that_is_huge_stays_finite() -> None:
    guess = Guess(3, 4, 4, variance=5.0, least_variance=1e-5)
    with torch.no_grad():
        guess.log_scale.copy_(torch.tensor([-200.0, 0.0, 100.0, 1e4]))
    loss = guess(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4))
    loss.backward()
    assert loss.isfinite()
    assert guess.log_scale.grad is not None
    assert guess.log_scale.grad.isfinite().all()


# known values


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"ab"}))
def test_equal_maps_give_zero_with_zero_gradient(name: str) -> None:
    _, teacher = maps()
    student = teacher.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    off = rounding(torch.float64, student.numel(), 4.0)  # no sum is longer than the maps; cwd multiplies by its temperature, 4
    assert loss.item() == pytest.approx(0, abs=off)
    assert student.grad is not None
    assert student.grad.abs().max() < off


def test_units_beyond_the_margin_on_the_teachers_side_give_zero() -> None:
    _, teacher = maps()
    student = (1.5 * teacher.sign()).requires_grad_()
    assert boundary_loss(student, teacher, margin=1.5).item() == 0
    torch.testing.assert_close(boundary_loss(student, teacher, margin=2.0), torch.tensor(0.25 * student[0].numel(), dtype=torch.float64))
    torch.testing.assert_close(boundary_loss(-student, teacher, margin=1.0), torch.tensor(6.25 * student[0].numel(), dtype=torch.float64))


def test_only_the_sign_of_the_teachers_units_counts() -> None:
    student, teacher = maps()
    torch.testing.assert_close(boundary_loss(student, teacher), boundary_loss(student, 3 * teacher.relu()))


def test_earlier_boundaries_count_half_as_much_each() -> None:
    assert stage_weights(3) == [0.003 / 4, 0.003 / 2, 0.003]


def test_attention_to_opposite_corners_is_the_farthest() -> None:
    student, teacher = torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    student[0, 1, 0, 0], teacher[0, :, 1, 1] = -7.0, 2.0
    assert attention_map(student).tolist() == [[1, 0, 0, 0]]
    assert attention_map(teacher).tolist() == [[0, 0, 0, 1]]
    assert attention_loss(student, teacher).item() == 0.5
    assert factor_loss(student, teacher).item() == 0.5
    assert factor_loss(student, teacher, norm=2).item() == 0.5


def test_attention_at_four_positions_against_two() -> None:
    """|f|^2 over channels is (9, 16) against (1, 1) / sqrt(2) once normalised."""
    student = torch.tensor([[[[3.0, 4.0]]]], dtype=torch.float64)
    teacher = torch.ones(1, 5, 1, 2, dtype=torch.float64)
    length, even = math.hypot(9, 16), 1 / math.sqrt(2)
    gaps = [9 / length - even, 16 / length - even]
    off = rounding(torch.float64, 2 * 5 + 6, even / min(map(abs, gaps)))  # five channels, two positions; a difference of near numbers
    assert attention_loss(student, teacher).item() == pytest.approx((gaps[0] ** 2 + gaps[1] ** 2) / 2, rel=2 * off)
    assert factor_loss(student, teacher).item() == pytest.approx((abs(gaps[0]) + abs(gaps[1])) / 2, rel=off)


def test_selectivity_is_the_distance_of_the_channels_second_moments() -> None:
    student, teacher = maps(channels=5)[0], maps(channels=3)[1]
    a, b = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    moments_s, moments_t = a.mT @ a / 5, b.mT @ b / 3
    wanted = (moments_s - moments_t).square().sum((1, 2)).mean()
    torch.testing.assert_close(neuron_selectivity_loss(student, teacher), wanted)


def test_correlation_loss_is_one_minus_the_mean_correlation() -> None:
    student, teacher = maps()
    over_samples = (x.transpose(0, 1).flatten(1).numpy() for x in (student, teacher))
    r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*over_samples, strict=True)])
    n = student[:, 0].numel()
    assert correlation_loss(student, teacher).item() == pytest.approx((n - 1) / n * (1 - r), rel=1e-5)
    assert correlation_loss(-teacher, teacher).item() == pytest.approx(2 * (n - 1) / n, rel=1e-5)


def test_channel_divergence_is_that_of_the_channels_distributions_over_space() -> None:
    student, teacher = maps(samples=2, channels=3)
    wanted = 0.0
    for b in range(2):
        for c in range(3):
            q, p = (np.exp(x[b, c].flatten().numpy() / 2.0) for x in (student, teacher))
            q, p = q / q.sum(), p / p.sum()
            wanted += 2.0**2 / (2 * 3) * (p * np.log(p / q)).sum()
    assert channel_divergence(student, teacher, 2.0).item() == pytest.approx(wanted, rel=1e-12)
    assert channel_divergence(student[..., :1, :1], teacher[..., :1, :1], 2.0).item() == 0


def test_flow_is_the_mean_product_of_consecutive_channels() -> None:
    student, teacher = ([torch.randn(2, c, 3, 3, dtype=torch.float64) for c in (2, 4, 5)] for _ in range(2))

    def flow(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bihw,bjhw->bij", a, b) / 9

    wanted = sum((flow(student[k], student[k + 1]) - flow(teacher[k], teacher[k + 1])).square().mean() for k in range(2))
    torch.testing.assert_close(flow_loss(student, teacher), wanted)


def test_gaussian_loss_is_the_negative_log_likelihood_without_its_constant() -> None:
    mean, teacher = maps()
    variance = torch.tensor([0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    wanted = F.gaussian_nll_loss(mean, teacher, variance[None, :, None, None].expand_as(mean))
    torch.testing.assert_close(gaussian_loss(mean, variance, teacher), wanted)


def test_a_guess_begins_with_the_variance_it_was_given() -> None:
    for variance, least in ((0.01, 1e-5), (0.01, 0.009), (5.0, 1e-5), (100.0, 1e-5)):
        torch.testing.assert_close(Guess(3, 4, 2, variance, least).variance, torch.full((4,), variance))


def test_generation_loss_is_a_sum_over_features_and_a_mean_over_samples() -> None:
    assert generation_loss(torch.full((3, 2, 4, 5), 2.0), torch.zeros(3, 2, 4, 5)).item() == 4 * 2 * 4 * 5


# identities

factors = st.floats(0.1, 10)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(seeds, factors)
def test_attention_factor_and_selectivity_do_not_know_a_maps_scale_or_the_order_of_its_channels(seed: int, factor: float) -> None:
    student, teacher = maps(seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for name in ("at", "at, power 4", "ft", "ft, norm 2", "nst"):
        torch.testing.assert_close(LOSSES[name](factor * student[:, order], teacher), LOSSES[name](student, teacher), atol=1e-12, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, factors, st.floats(-5, 5))
def test_correlation_does_not_know_a_channels_scale_and_offset(seed: int, factor: float, offset: float) -> None:
    student, teacher = maps(seed=seed)
    scales = factor * torch.arange(1, 5).double()[:, None, None]
    torch.testing.assert_close(correlation_loss(scales * student + offset, teacher), correlation_loss(student, teacher), atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-50, 50))
def test_channel_divergence_does_not_know_a_channels_offset_and_is_never_negative(seed: int, offset: float) -> None:
    student, teacher = maps(seed=seed)
    offsets = offset * torch.arange(4).double()[:, None, None]
    torch.testing.assert_close(channel_divergence(student + offsets, teacher, 3.0), channel_divergence(student, teacher, 3.0))
    assert channel_divergence(student, teacher, 3.0) >= 0


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 6))
def test_no_loss_depends_on_the_order_of_the_samples(seed: int, samples: int) -> None:
    student, teacher = maps(samples, seed=seed)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_only_a_batch_coupled_loss_differs_from_the_mean_over_single_samples(name: str) -> None:
    student, teacher = maps()
    alone = torch.stack([LOSSES[name](student[k : k + 1], teacher[k : k + 1]) for k in range(len(student))]).mean()
    coupled = method_class(MethodSpec(name=name.partition(",")[0])).batch_coupled
    assert torch.allclose(LOSSES[name](student, teacher), alone, rtol=1e-9, atol=0) != coupled


@pytest.mark.parametrize("name", ["at", "nst", "ft"])
def test_the_larger_map_is_averaged_down_before_anything_else(name: str) -> None:
    large, small = maps(size=8)[0], maps(size=4)[1]
    pooled = F.avg_pool2d(large, 2)
    torch.testing.assert_close(LOSSES[name](large, small), LOSSES[name](pooled, small))
    torch.testing.assert_close(LOSSES[name](small, large), LOSSES[name](small, pooled))


# masks


@pytest.mark.parametrize("mask", ["channel", "pixel"])
def test_the_share_that_is_hidden_is_the_share_of_zeros(mask: Any) -> None:
    noise = torch.linspace(0, 1, 10_001)[:-1]
    for share in (0.0, 0.15, 0.75, 1.0):
        hidden = mask_from(noise, share, mask)
        assert set(hidden.tolist()) <= {0.0, 1.0}
        assert 1 - hidden.mean().item() == pytest.approx(share, abs=2e-4)
    assert mask_from(torch.tensor([0.1, 0.9]), 0.5, mask).tolist() == ([0, 1] if mask == "channel" else [1, 0])


def mgd_on(params: dict[str, Any], seed: int = 0) -> tuple[MGD, Callable[[Tensor, Tensor], Tensor]]:
    """MGD for maps [*, 4, 4, 4], with its generator seeded, and what gives its term for two of them."""
    torch.manual_seed(5)
    method = MGD(MGD.Params(student_taps=("x",), teacher_taps=("x",), **params), torch.Generator().manual_seed(seed))
    shapes = Shapes((7,), {"x": TapShape("map", (4, 4, 4))})
    method.build(shapes, shapes, TASK)
    return method, lambda s, t: run_method(method, {"x": s}, {"x": t})["mgd"]


def run_method(method: Method, ours: dict[str, Tensor], theirs: dict[str, Tensor], logits: Tensor | None = None) -> dict[str, Tensor]:
    samples = torch.arange(len(next(iter(ours.values()))))
    prediction = torch.zeros(len(samples), 7) if logits is None else logits
    return method(Outputs(prediction, ours), Outputs(prediction.detach(), theirs), Batch(samples, samples, samples), DONE)


@pytest.mark.parametrize("mask", ["channel", "pixel"])
def test_masks_come_from_the_runs_own_generator_anew_at_every_step(mask: str) -> None:
    student, teacher = (x.float() for x in maps())
    (_, first), (_, second), (_, other) = mgd_on({"mask": mask}), mgd_on({"mask": mask}), mgd_on({"mask": mask}, seed=1)
    before = torch.get_rng_state()
    steps = [first(student, teacher) for _ in range(3)]
    assert torch.equal(before, torch.get_rng_state())
    assert len({value.item() for value in steps}) == 3
    assert [second(student, teacher) for _ in range(3)] == steps
    assert other(student, teacher) != steps[0]


def test_a_channel_mask_hides_whole_channels_and_a_pixel_mask_all_channels_of_a_pixel() -> None:
    for mask, shape in (("channel", (3, 4, 1, 1)), ("pixel", (3, 1, 4, 4))):
        method, _ = mgd_on({"mask": mask})
        assert method._noise(torch.zeros(3, 4, 4, 4)).shape == shape


def test_what_is_hidden_entirely_teaches_the_generator_but_not_the_student() -> None:
    student, teacher = (x.float() for x in maps())
    method, term = mgd_on({"masked": 1.0})
    term(student.requires_grad_(), teacher).backward()
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0
    assert method.generators[0].generation[2].bias.grad.count_nonzero() == 4


# networks of all kinds

SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "narrow cnn": {"name": "tiny_cnn", "width": 6},  # 16x16, 8x8, 4x4
    "large cnn": {"name": "tiny_cnn", "width": 6, "stem_stride": 1},  # 32x32, 16x16, 8x8
    "cnn": {"name": "cifar_resnet8", "width": 8, "stem_stride": 2},  # 16x16, 8x8, 4x4
    "vit": {"name": "vit_tiny_patch16_224", **SMALL_VIT},  # 4x4 and a class token
    "wide vit": {"name": "vit_tiny_patch16_224", **SMALL_VIT, "embed_dim": 32, "depth": 3},
}


@cache
def network(name: str) -> tuple[nn.Module, Shapes]:
    torch.manual_seed(0)
    facts: dict[str, Any] = {"num_classes": 7, "in_channels": 3, "image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = build_model(ModelSpec.model_validate(NETWORKS[name]), **facts)
    return model, tap_shapes(model, (3, 32, 32))


@every_method
@pytest.mark.parametrize(
    ("student", "teacher"), [("narrow cnn", "cnn"), ("large cnn", "cnn"), ("vit", "wide vit"), ("narrow cnn", "vit"), ("vit", "cnn")]
)
@pytest.mark.parametrize("samples", [1, 4])
def test_every_pair_works_on_its_default_taps_and_trains_all_that_is_learned_along(
    name: str, student: str, teacher: str, samples: int
) -> None:
    (ours, our_places), (theirs, their_places) = network(student), network(teacher)
    method = fitted(MethodSpec(name=name), our_places, their_places, torch.Generator().manual_seed(0))
    method.build(our_places, their_places, TASK)
    images = torch.rand(samples, 3, 32, 32)
    s, t = Taps(ours, method.student_taps)(images), Taps(theirs, method.teacher_taps)(images)
    index = torch.arange(samples)
    frozen = Outputs(t.logits.detach(), {tap: features.detach() for tap, features in t.maps.items()})
    terms = method(s, frozen, Batch(images, index, index), DONE)
    assert all(term.dim() == 0 and term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    taps = [s.maps[name] for name in method.student_taps]
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), [*taps, *method.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.count_nonzero() for gradient in gradients)


def test_an_adapter_is_learned_only_where_widths_differ() -> None:
    (_, ours), (_, theirs) = network("narrow cnn"), network("cnn")
    for name in ("pkd", "cwd", "fsp"):
        same = fitted(MethodSpec(name=name), theirs, theirs)
        same.build(theirs, theirs, TASK)
        assert not list(same.parameters())
        differing = fitted(MethodSpec(name=name), ours, theirs)
        differing.build(ours, theirs, TASK)
        assert list(differing.parameters())
    for name in ("at", "nst"):
        method = fitted(MethodSpec(name=name), ours, theirs)
        method.build(ours, theirs, TASK)
        assert not list(method.parameters())


def test_pkd_resizes_the_side_it_is_told_to() -> None:
    ours, theirs = maps(size=8)[0], maps(size=4)[1]
    up = F.interpolate(theirs, (8, 8), mode="bilinear", align_corners=False)
    down = F.interpolate(ours, (4, 4), mode="bilinear", align_corners=False)
    for side, wanted in (("student", correlation_loss(down, theirs)), ("teacher", correlation_loss(ours, up))):
        method = prepared("pkd", ours, theirs, resize=side, weight=1)
        torch.testing.assert_close(run_method(method, {"x": ours}, {"x": theirs})["correlation"], wanted)


def prepared(name: str, ours: Tensor, theirs: Tensor, **params: Any) -> Method:
    """The method built for two maps, as tap `x`."""
    spec = MethodSpec.model_validate({"name": name, "student_taps": ["x"], "teacher_taps": ["x"], **params})
    shapes = (Shapes((7,), {"x": shape_of(features)}) for features in (ours, theirs))
    student, teacher = shapes
    method = fitted(spec, student, teacher)
    method.build(student, teacher, TASK)
    return method


def test_every_methods_weight_multiplies_its_term() -> None:
    student, teacher = (x.float() for x in maps())
    for name, weight, term in (
        ("fitnet", "weight", "hint"),
        ("at", "weight", "attention"),
        ("nst", "weight", "selectivity"),
        ("pkd", "weight", "correlation"),
        ("cwd", "weight", "cwd"),
        ("ab", "weight", "boundary"),
        ("ft", "weight", "factor"),
        ("vid", "weight", "vid"),
    ):
        found = []
        for value in (1.0, 2.5):
            torch.manual_seed(3)
            found.append(run_method(prepared(name, student, teacher, **{weight: value}), {"x": student}, {"x": teacher})[term])
        torch.testing.assert_close(found[1], 2.5 * found[0])


# what a prediction per pixel changes


def dense_pair() -> tuple[Shapes, Shapes]:
    student = Shapes((5, 8, 8), {"stage:0": TapShape("map", (4, 4, 4))})
    return student, Shapes((5, 8, 8), {"stage:0": TapShape("map", (6, 4, 4))})


def test_cwd_compares_logits_that_are_maps_without_looking_inside() -> None:
    student, teacher = dense_pair()
    method = fitted(MethodSpec(name="cwd"), student, teacher)
    assert isinstance(method, CWD)
    assert (method.student_taps, method.teacher_taps) == ((), ())
    method.build(student, teacher, TASK)
    ours, theirs = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 8, 8)
    index = torch.arange(2)
    terms = method(Outputs(ours), Outputs(theirs), Batch(index, index, index), DONE)
    torch.testing.assert_close(terms["cwd"], 3.0 * channel_divergence(ours, theirs, 4.0))


def test_cwd_compares_features_where_they_are_named_or_where_logits_are_no_maps() -> None:
    student, teacher = dense_pair()
    named = fitted(MethodSpec.model_validate({"name": "cwd", "teacher_taps": ["stage:0"]}), student, teacher)
    assert named.student_taps == named.teacher_taps == ("stage:0",)
    other = Shapes((6, 8, 8), teacher.taps)
    assert fitted(MethodSpec(name="cwd"), student, other).teacher_taps == ("stage:0",)
    ours, theirs = maps()
    torch.testing.assert_close(
        run_method(prepared("cwd", ours, theirs), {"x": ours}, {"x": theirs})["cwd"], 3.0 * channel_divergence(ours, theirs, 4.0)
    )


def test_mgd_adds_cwds_loss_where_the_prediction_is_dense() -> None:
    student, teacher = dense_pair()
    method = fitted(
        MethodSpec.model_validate(
            {"name": "mgd", "mask": "pixel", "logit_weight": 3.0, "student_taps": ["stage:0"], "teacher_taps": ["stage:0"]}
        ),
        student,
        teacher,
    )
    method.build(student, teacher, TASK)
    ours, theirs = (Outputs(torch.randn(2, 5, 8, 8), {"stage:0": torch.randn(2, width, 4, 4)}) for width in (4, 6))
    index = torch.arange(2)
    terms = method(ours, theirs, Batch(index, index, index), DONE)
    torch.testing.assert_close(terms["logits"], 3.0 * channel_divergence(ours.logits, theirs.logits, 4.0))
    classifier = Shapes((5,), teacher.taps)
    with pytest.raises(UserError, match=r"method mgd: logit_weight .* \[5, 8, 8\], the teacher \[5\]; use logit_weight: 0"):
        method.build(student, classifier, TASK)


# what a factor is


def test_the_paraphraser_learns_from_its_reconstruction_alone() -> None:
    student, teacher = (x.float() for x in maps(channels=6))
    method = prepared("ft", student, teacher, rate=0.5)
    assert isinstance(method, FT)
    terms = run_method(method, {"x": student}, {"x": teacher})
    paraphraser, translator = method.paraphrasers[0], method.translators[0]
    assert isinstance(paraphraser, Paraphraser)
    assert paraphraser(teacher)[0].shape == translator(student).shape == (3, 3, 4, 4)
    of_factor = torch.autograd.grad(terms["factor"], list(method.parameters()), allow_unused=True, retain_graph=True)
    of_reconstruction = torch.autograd.grad(terms["reconstruction"], list(method.parameters()), allow_unused=True)
    for (name, _), first, second in zip(method.named_parameters(), of_factor, of_reconstruction, strict=True):
        assert (first is None) == name.startswith("paraphrasers."), name
        assert (second is None) == name.startswith("translators."), name


# bad input


@every_method
@pytest.mark.parametrize(("tap", "shape"), [("pooled", TapShape("vector", (9,))), ("odd", TapShape("tokens", (15, 9)))])
def test_a_tap_that_is_no_map_is_refused_with_both_names_and_shapes(name: str, tap: str, shape: TapShape) -> None:
    good = TapShape("map", (4, 4, 4))
    method = fitted(
        MethodSpec.model_validate({"name": name, "student_taps": ["a", "a"], "teacher_taps": ["b", tap]}),
        Shapes((7,), {"a": good}),
        Shapes((7,), {"b": good, tap: shape}),
    )
    with pytest.raises(UserError) as caught:
        method.build(Shapes((7,), {"a": good}), Shapes((7,), {"b": good, tap: shape}), TASK)
    said = f"method {name} can't compare the student's 'a' (map [4, 4, 4]) with the teacher's '{tap}' ({shape.kind} {list(shape.shape)}): "
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["at", "nst", "cwd", "ft"])
def test_a_single_position_is_refused_where_space_is_compared(name: str) -> None:
    with pytest.raises(UserError, match=rf"method {name} can't .*: it compares positions of a map, .* name taps nearer to the image"):
        prepared(name, torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 4, 4))


def test_a_flow_needs_two_places() -> None:
    with pytest.raises(UserError, match=r"method fsp compares how features change .* has 1 to compare; name two or more student_taps"):
        prepared("fsp", torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "mgd", "masked": 1.5}, "masked: expected less than or equal to 1, got 1.5"),
        ({"name": "mgd", "mask": "channels"}, "mask: expected 'channel' or 'pixel', got 'channels'; did you mean 'channel'?"),
        ({"name": "cwd", "temperature": 0}, "temperature: expected greater than 0, got 0"),
        ({"name": "vid", "init_variance": 0}, "init_variance: expected greater than or equal to 0.01, got 0"),
        ({"name": "at", "power": 0}, "power: expected greater than or equal to 1, got 0"),
        ({"name": "ft", "norm": 3}, "norm: expected less than or equal to 2, got 3"),
        ({"name": "at", "student_taps": "stage:0"}, "student_taps: expected a list such as [a, b], got 'stage:0'"),
    ],
)
def test_a_parameter_outside_its_domain_is_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        params_of(MethodSpec.model_validate(value))
    assert message in str(caught.value)


def test_a_search_varies_the_weights_and_what_decides_how_much_is_seen() -> None:
    own = {name: {axis.name for axis in search_axes(MethodSpec(name=name))} - {"task_weight"} for name in NAMES}
    assert own == {name: {"weight"} for name in NAMES} | {
        "cwd": {"weight", "temperature"},
        "ft": {"weight", "rate"},
        "mgd": {"alpha", "masked", "mask"},
    }


def test_defaults_are_the_published_ones() -> None:
    assert (AB.Params().margin, AB.Params().weight) == (1.0, 1.0)
    assert (MGD.Params().alpha, MGD.Params().masked, MGD.Params().mask) == (7e-5, 0.15, "channel")
    assert (FT.Params().power, FT.Params().norm, FT.Params().weight, FT.Params().rate) == (2, 1, 200.0, 0.5)
    assert (VID.Params().init_variance, VID.Params().least_variance, VID.Params().weight) == (5.0, 1e-5, 1.0)
