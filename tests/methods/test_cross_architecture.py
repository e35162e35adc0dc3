"""OFA, ScaleKD and ViTKD: losses, projectors, and pairs of architectures that have little in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from kdbench.data.batch import Batch
from kdbench.errors import UserError
from kdbench.methods.base import Method, Progress
from kdbench.methods.build import MethodSpec, fitted
from kdbench.methods.kd import softened_cross_entropy
from kdbench.methods.ofa import MapProjector, OneForAll, PatchMerging, TokenProjector, ofa_loss
from kdbench.methods.scalekd import CrossAttention, CrossAttentionProjector, ScaleKD, frequency_loss, spatial_loss
from kdbench.methods.vitkd import ViTKD, generation_loss, removed_tokens, squared_distance
from kdbench.models.adapters import as_map
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import Taps, probe, tap_shapes
from kdbench.tasks.base import TaskInfo
from kdbench.training.assembly import assemble
from kdbench.training.loop import train_epoch
from kdbench.training.session import LocalSession
from tests.training.units import saved_teacher, unit

DONE = Progress(epoch=1.0, step=1, total_steps=1)
CLASSES = 5
VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch_size": 7, "depth": 3, "embed_dim": 16, "num_heads": 2}
SMALL_VIT = {**VIT, "depth": 4, "embed_dim": 8}
SWIN: dict[str, Any] = {
    "name": "swin_tiny_patch4_window7_224",
    "patch_size": 7,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
}
MIXER: dict[str, Any] = {"name": "mixer_s16_224", "img_size": 32}
RESNET: dict[str, Any] = {"name": "cifar_resnet8", "width": 8, "stem_stride": 2}
NETWORKS = {"cnn": {"name": "tiny_cnn"}, "resnet": RESNET, "vit": VIT, "small vit": SMALL_VIT, "swin": SWIN, "mixer": MIXER}

Loss = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Loss] = {"scalekd spatial": spatial_loss, "scalekd frequency": frequency_loss, "vitkd mimicking": squared_distance}
every_distance = pytest.mark.parametrize("loss", DISTANCES.values(), ids=DISTANCES)


@cache
def network(name: str, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    spec = ModelSpec.model_validate(NETWORKS[name])
    return build_model(spec, num_classes=classes, in_channels=1, image_size=28, mean=(0.3,), std=(0.3,)).eval().requires_grad_(False)


IMAGE = (1, 28, 28)


@cache
def whole(name: str, classes: int = CLASSES) -> Shapes:
    return tap_shapes(network(name, classes), IMAGE)


def built(method: str | dict[str, Any], student: str, teacher: str, classes: int = CLASSES) -> Method:
    """The method on a pair, its taps chosen, as training makes it."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    made = fitted(MethodSpec.model_validate(method), whole(student, classes), whole(teacher, classes), generator)
    ours, theirs = (
        probe(network(name, classes), IMAGE, taps) for name, taps in ((student, made.student_taps), (teacher, made.teacher_taps))
    )
    made.build(ours, theirs, TaskInfo("classification", classes, IMAGE))
    if made.needs_teacher_network:
        made.use_teacher(network(teacher, classes), IMAGE)
    return made


def outputs(method: Method, student: str, teacher: str, samples: int = 3, classes: int = CLASSES) -> tuple[Outputs, Outputs, Batch]:
    """What both networks give for images of noise; the student's maps and logits are leaves that take gradients."""
    images = torch.rand(samples, *IMAGE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        s, t = Taps(network(student, classes), method.student_taps)(images), Taps(network(teacher, classes), method.teacher_taps)(images)
    leaves = {name: features.clone().requires_grad_() for name, features in s.maps.items()}
    labels = torch.arange(samples) % classes
    return Outputs(s.logits.clone().requires_grad_(), leaves), t, Batch(images, labels, torch.arange(samples))


# the losses


def example(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def test_gradients_are_the_derivatives_of_the_values():
    student, teacher = example(3, 4, 2, 3)
    for loss in DISTANCES.values():
        assert gradcheck(lambda s, loss=loss: loss(s, teacher), student.clone().requires_grad_())
    tokens, goal = example(2, 6, 3)
    removed = torch.rand(2, 6) > 0.5
    assert gradcheck(lambda s: generation_loss(s, goal, removed, 0.5), tokens.requires_grad_())
    logits, soft = example(4, CLASSES)
    labels = torch.arange(4)
    for target in (labels, F.one_hot(labels, CLASSES).double()):
        assert gradcheck(lambda s, target=target: ofa_loss(s, soft, target, 1.5, 3.0), logits.requires_grad_())


@every_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (2, 5, 1, 1)])
def test_a_distance_of_features_is_finite_at_the_limits(loss: Loss, dtype: torch.dtype, scale: float, shape: tuple[int, ...]):
    student, teacher = ((scale * features).to(dtype) for features in example(*shape))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("temperature", [0.05, 4.0])
@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (4, 100)])
def test_ofa_is_finite_at_the_limits(dtype: torch.dtype, scale: float, temperature: float, samples: int, classes: int):
    student, teacher = ((scale * logits.sign()).to(dtype) for logits in example(samples, classes))
    student.requires_grad_()
    value = ofa_loss(student, teacher, torch.arange(samples), 1.4, temperature)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every_distance
def test_equal_features_have_no_distance(loss: Loss):
    _, teacher = example(3, 4, 2, 3)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 10))
def test_ofa_with_exponent_one_is_the_cross_entropy_with_the_teacher(seed: int, temperature: float):
    student, teacher = example(4, CLASSES, seed=seed)
    wanted = softened_cross_entropy(student, teacher, temperature) / temperature**2
    torch.testing.assert_close(ofa_loss(student, teacher, torch.arange(4), 1.0, temperature), wanted)


def test_ofa_weighs_the_label_and_the_other_classes_as_the_authors_do():
    student, teacher = example(1, 3)
    p, log_q = teacher.softmax(1)[0], student.log_softmax(1)[0]
    weights = torch.stack([p[0] ** 1.5, (1 + p[1]) ** 1.5 - 1, p[2] ** 1.5])
    torch.testing.assert_close(ofa_loss(student, teacher, torch.tensor([1]), 1.5, 1.0), -(weights * log_q).sum())
    soft = torch.tensor([[0.3, 0.7, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ofa_loss(student, teacher, soft, 1.5, 1.0), -(weights * log_q).sum())


def cosine_transform(size: int) -> Tensor:
    """The orthonormal DCT-II, [size, size]."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (n + 0.5) * k / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def test_the_frequency_view_is_the_cosine_transform_without_its_constant_component():
    student, teacher = example(2, 3, 4, 6)
    rows, columns = cosine_transform(4), cosine_transform(6)

    def without_constant(features: Tensor) -> Tensor:
        spectrum = rows @ features @ columns.T
        spectrum[..., 0, 0] = 0
        return rows.T @ spectrum @ columns

    torch.testing.assert_close(frequency_loss(student, teacher), spatial_loss(without_constant(student), without_constant(teacher)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(-5, 5))
def test_neither_view_sees_a_scale_and_the_frequency_view_no_constant_either(seed: int, scale: float, shift: float):
    student, teacher = example(2, 3, 4, 4, seed=seed)
    torch.testing.assert_close(spatial_loss(scale * student, teacher), spatial_loss(student, teacher))
    torch.testing.assert_close(frequency_loss(scale * student + shift, teacher), frequency_loss(student, teacher))


def test_views_of_opposite_features_are_as_far_apart_as_can_be():
    _, teacher = example(2, 3, 4, 5)
    torch.testing.assert_close(spatial_loss(-teacher, teacher).item(), 4.0 * 4 * 5)


@pytest.mark.parametrize(("tokens", "share", "kept"), [(16, 0.5, 8), (9, 0.6, 3), (9, 0.5, 4), (16, 1.0, 0), (4, 0.2, 3)])
def test_every_sample_keeps_the_same_number_of_tokens_those_of_least_noise(tokens: int, share: float, kept: int):
    noise = torch.rand(5, tokens, generator=torch.Generator().manual_seed(0))
    removed = removed_tokens(noise, share)
    assert (~removed).sum(1).tolist() == [kept] * 5
    for row, gone in zip(noise, removed, strict=True):
        assert set(row[~gone].tolist()) == set(row.sort().values[:kept].tolist())


def test_only_removed_tokens_count_in_the_generation_loss():
    generated, teacher = example(2, 4, 3)
    removed = torch.tensor([[True, False, False, True], [False, True, True, False]])
    value = generation_loss(generated, teacher, removed, 0.5)
    by_hand = sum((generated[b, n] - teacher[b, n]).square().sum() for b, n in ((0, 0), (0, 3), (1, 1), (1, 2)))
    torch.testing.assert_close(value, by_hand / 2 / 0.5)


# the projectors


def test_a_map_projector_halves_and_doubles_until_the_given_width():
    projector = MapProjector(TapShape("map", (4, 9, 9)), convolutions=2, width=24, classes=7)
    assert projector(torch.randn(2, 4, 9, 9)).shape == (2, 7)
    assert [module.out_channels for module in projector.modules() if isinstance(module, nn.Conv2d)] == [4, 4, 4, 8, 8, 8, 8, 24]
    assert projector.reduce(torch.randn(2, 4, 9, 9)).shape == (2, 24, 3, 3)


@pytest.mark.parametrize(("side", "prefix", "merged"), [(4, 1, 4), (14, 0, 7), (15, 0, 8), (28, 0, 7)])
def test_a_token_projector_merges_down_to_a_grid_of_seven(side: int, prefix: int, merged: int):
    width = 8 if prefix else 12
    projector = TokenProjector(TapShape("tokens", (side * side + prefix, 8)), blocks=2, width=width, classes=5)
    seen: list[torch.Size] = []
    projector.blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert projector(torch.randn(2, side * side + prefix, 8)).shape == (2, 5)
    assert seen == [(2, merged * merged + prefix, width if side > 7 else 8)]


@pytest.mark.parametrize(("side", "merges"), [(14, 1), (28, 2)])
def test_between_merges_there_is_an_activation_and_behind_a_single_one_too(side: int, merges: int):
    projector = TokenProjector(TapShape("tokens", (side * side, 4)), blocks=1, width=6, classes=3)
    tokens = torch.randn(2, side * side, 4)
    grid = F.gelu(projector.merging[0](tokens.unflatten(1, (side, side))))
    assert len(projector.merging) == merges
    if merges == 2:
        grid = projector.merging[1](grid)
    wanted = projector.classifier(projector.blocks(grid.flatten(1, 2)).mean(1))
    torch.testing.assert_close(projector(tokens), wanted)


def test_patch_merging_joins_two_by_two_neighbours():
    merging = PatchMerging(3, 5)
    grid = torch.randn(2, 4, 4, 3)
    moved = grid.clone()
    moved[:, 2:, 2:] += torch.randn(3)
    difference = (merging(grid) - merging(moved)).abs().sum(3)
    assert difference[:, 1, 1].min() > 0
    assert difference.sum() == difference[:, 1, 1].sum()
    first = torch.cat([grid[:, 0, 0], grid[:, 1, 0], grid[:, 0, 1], grid[:, 1, 1]], dim=1)  # columns after rows, as in Swin
    torch.testing.assert_close(merging(grid)[:, 0, 0], merging.reduction(merging.norm(first)))


def test_a_class_token_decides_where_there_is_one_and_the_mean_where_there_is_none():
    for prefix in (0, 1):
        projector = TokenProjector(TapShape("tokens", (4 + prefix, 8)), blocks=1, width=8, classes=3)
        tokens = torch.randn(2, 4 + prefix, 8)
        seen = projector.blocks(tokens)
        wanted = projector.classifier(seen[:, 0] if prefix else seen.mean(1))
        torch.testing.assert_close(projector(tokens), wanted)


def test_cross_attention_is_a_softmax_over_the_students_tokens():
    attention = CrossAttention(student=6, teacher=8, heads=2, sharpness=3.0)
    query, tokens = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    q, k, v = attention.q(query), attention.k(tokens), attention.v(tokens)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (3.0 * q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)).softmax(2)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(query, tokens), attention.proj(torch.cat(heads, 2)))


def test_a_given_query_takes_the_place_of_the_learned_one():
    projector = CrossAttentionProjector((6, 5, 4), (8, 3, 2), heads=2, sharpness=5.0, own_query=True)
    features = torch.randn(2, 6, 5, 4)
    own = projector(features)
    assert own.shape == (2, 8, 3, 2)
    assert projector.query is not None
    learned = projector.query.detach().T.reshape(1, 8, 3, 2).expand(2, -1, -1, -1)
    torch.testing.assert_close(projector(features, learned), own)
    assert not torch.allclose(projector(features, torch.randn(2, 8, 3, 2)), own)


def test_a_projector_with_layer_norm_treats_samples_alone():
    projector = CrossAttentionProjector((6, 3, 3), (8, 2, 2), heads=2, sharpness=5.0, own_query=True, norm="layer")
    features = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(projector(features)[:1], projector(features[:1]))


# the methods on pairs

CROSSED = [("cnn", "vit"), ("cnn", "mixer"), ("resnet", "swin"), ("small vit", "resnet"), ("swin", "vit"), ("mixer", "cnn")]
PAIRS = [*((name, *pair) for name in ("ofa", "scalekd") for pair in CROSSED), ("vitkd", "small vit", "vit")]


@pytest.mark.parametrize(("name", "student", "teacher"), PAIRS)
def test_a_pair_works_on_defaults_and_every_adapter_learns(name: str, student: str, teacher: str):
    method = built(name, student, teacher)
    s, t, batch = outputs(method, student, teacher)
    terms = method(s, t, batch, DONE)
    assert all(term.dim() == 0 and term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    for features in s.maps.values():
        assert features.grad is not None
        assert features.grad.isfinite().all()
        assert features.grad.abs().sum() > 0
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
    assert all(parameter.grad is None for parameter in network(teacher).parameters())


@pytest.mark.parametrize(("name", "student"), [("ofa", "cnn"), ("scalekd", "cnn"), ("vitkd", "small vit")])
def test_one_sample_is_enough(name: str, student: str):
    method = built(name, student, "vit")
    assert all(term.isfinite() for term in method(*outputs(method, student, "vit", samples=1), DONE).values())


@pytest.mark.parametrize("name", ["ofa", "scalekd"])
def test_two_classes_are_enough(name: str):
    method = built(name, "cnn", "vit", classes=2)
    terms = method(*outputs(method, "cnn", "vit", classes=2), DONE)
    assert all(term.isfinite() for term in terms.values())


def test_ofa_looks_at_every_stage_of_the_student_and_at_none_of_the_teacher():
    method = built("ofa", "cnn", "vit")
    assert isinstance(method, OneForAll)
    assert (method.student_taps, method.teacher_taps) == (("stage:0", "stage:1", "stage:2"), ())
    assert method.params.stages_behind == (2, 1, 0)
    assert method.params.widths == (64, 64, 64)
    assert built("ofa", "small vit", "resnet").params.stages_behind == (3, 2, 1, 0)  # type: ignore[attr-defined]
    assert built("ofa", "small vit", "resnet").params.widths == (8,) * 4  # type: ignore[attr-defined]
    assert built("ofa", "cnn", "mixer").params.widths == (512,) * 3  # type: ignore[attr-defined]
    named = built({"name": "ofa", "student_taps": ["layer1", "stage:-1"]}, "cnn", "vit")
    assert named.params.stages_behind == (2, 0)  # type: ignore[attr-defined]


def test_ofa_gives_each_exit_and_the_head_an_exponent_of_its_own():
    method = built({"name": "ofa", "student_taps": ["stage:1", "stage:2"], "eps": [1.5, 1.2, 1.0]}, "cnn", "vit")
    s, t, batch = outputs(method, "cnn", "vit")
    exits = [projector(s.maps[tap]) for projector, tap in zip(method.projectors, method.student_taps, strict=True)]  # type: ignore[arg-type]
    wanted = [ofa_loss(logits, t.logits, batch.target, eps, 1.0) for logits, eps in zip([*exits, s.logits], (1.5, 1.2, 1.0), strict=True)]
    torch.testing.assert_close(method(s, t, batch, DONE), {"ofa": wanted[0] + wanted[1], "kd": wanted[2]})


def test_vitkd_looks_at_two_raw_blocks_and_behind_the_final_norm():
    method = built("vitkd", "small vit", "vit")
    assert method.student_taps == method.teacher_taps == ("block:0", "block:1", "norm")


def test_vitkd_leaves_class_tokens_out():
    method = built("vitkd", "small vit", "vit")
    s, t, batch = outputs(method, "small vit", "vit")
    torch.stack(list(method(s, t, batch, DONE).values())).sum().backward()
    for features in s.maps.values():
        assert features.grad is not None
        assert features.grad[:, 0].abs().max() == 0
        assert features.grad[:, 1:].abs().sum() > 0


def test_vitkd_draws_its_mask_from_the_methods_own_generator():
    method = built("vitkd", "small vit", "vit")
    given_ = outputs(method, "small vit", "vit")
    assert method.generator is not None
    state = method.generator.get_state()
    torch.manual_seed(5)
    first, second = (method(*given_, DONE)["generation"] for _ in range(2))
    method.generator.set_state(state)
    torch.manual_seed(6)
    assert method(*given_, DONE)["generation"] == first
    assert first != second


def test_vitkd_of_equal_features_imitates_without_loss_and_has_no_aligning_layers():
    method = built("vitkd", "vit", "vit")
    s, t, batch = outputs(method, "vit", "vit")
    assert method(s, t, batch, DONE)["mimicking"] == 0
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"mask_token", "generation"}


def test_scalekd_lets_the_last_query_teach_the_stage_before():
    method = built("scalekd", "cnn", "swin")
    s, t, batch = outputs(method, "cnn", "swin")
    (gradient,) = torch.autograd.grad(method(s, t, batch, DONE)["last_spatial"], s.maps[method.student_taps[0]])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("teacher", ["vit", "swin"])
def test_scalekd_sees_the_teachers_own_features_as_the_teacher_does(teacher: str):
    method = built("scalekd", "cnn", teacher)
    assert isinstance(method, ScaleKD)
    _, t, _ = outputs(method, "cnn", teacher)
    shape, last = (whole(teacher).taps[name] for name in method.teacher_taps)
    early, goal = as_map(t.maps[method.teacher_taps[0]], shape), as_map(t.maps[method.teacher_taps[1]], last)
    torch.testing.assert_close(method._perceive(early, t), goal)
    assert not torch.allclose(method._perceive(torch.randn_like(early), t), goal, atol=0.1)


def test_scalekd_weighs_stages_and_views_apart():
    one = built({"name": "scalekd", "spatial_weight": 1.0, "frequency_weight": 1.0}, "cnn", "swin")
    other = built({"name": "scalekd", "spatial_weight": [2.0, 3.0], "frequency_weight": [4.0, 0.0], "kd_weight": 1.0}, "cnn", "swin")
    given_ = outputs(one, "cnn", "swin")
    factors = {"spatial": 2.0, "last_spatial": 3.0, "frequency": 4.0, "last_frequency": 0.0, "kd": 2.0}
    plain = one(*given_, DONE)
    torch.testing.assert_close(other(*given_, DONE), {name: factor * plain[name] for name, factor in factors.items()})


def test_scalekd_has_one_head_for_64_channels_unless_it_is_told():
    assert built("scalekd", "cnn", "mixer").last.spatial.attention.heads == 8  # type: ignore[union-attr]
    assert built("scalekd", "cnn", "swin").last.spatial.attention.heads == 1  # type: ignore[union-attr]
    told = built({"name": "scalekd", "heads": [2, 4]}, "cnn", "swin")
    assert (told.perceived.spatial.attention.heads, told.last.frequency.attention.heads) == (2, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        ("vitkd", "cnn", "vit", r"^method vitkd: it imitates the first two blocks of a transformer, and the student has fewer; name"),
        (
            "vitkd",
            "mixer",
            "vit",
            r"'block:0' \(tokens \[4, 512\]\) with the teacher's 'block:0' \(tokens \[17, 16\]\): .* patches of one size",
        ),
        ({"name": "vitkd", "student_taps": ["head"], "teacher_taps": ["norm"]}, "vit", "vit", "vector of 5 numbers can't be read as a map"),
        ({"name": "ofa", "student_taps": ["stage:7"]}, "cnn", "vit", "method ofa: student_taps: there is no tap 'stage:7'; did you mean"),
        (
            {"name": "ofa", "student_taps": ["pooled"]},
            "vit",
            "cnn",
            "student_taps: 'pooled': a vector of 16 numbers can't be read",
        ),
        ({"name": "ofa", "eps": [1.0, 1.5]}, "cnn", "vit", "eps has 2 entries, expected 4 for the exits stage:0, stage:1, stage:2"),
        ({"name": "ofa", "widths": [8]}, "cnn", "vit", "widths has 1 entries, expected 3"),
        ({"name": "scalekd", "student_taps": ["stage:-1"], "teacher_taps": ["norm"]}, "cnn", "vit", "two places of each network"),
        (
            {"name": "scalekd", "student_taps": ["stage:1", "stage:2"], "teacher_taps": ["stage:1", "stage:0"]},
            "cnn",
            "swin",
            "tap 'stage:0' does not come after 'stage:1'",
        ),
        ({"name": "scalekd", "heads": [1, 3]}, "cnn", "swin", "heads: 3 do not divide the 32 channels of the teacher's 'norm'"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(method: str | dict[str, Any], student: str, teacher: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        built(method, student, teacher)
    assert "\n" not in str(caught.value)


def test_a_network_without_two_stages_is_refused():
    flat = Shapes((CLASSES,), {"stage:0": TapShape("map", (4, 3, 3)), "stage:-1": TapShape("map", (4, 3, 3))})
    with pytest.raises(UserError, match="method scalekd: it compares two stages, and the student has one; name student_taps"):
        ScaleKD().choose_taps(flat, whole("swin"))
    with pytest.raises(UserError, match="needs a teacher"):
        ViTKD().choose_taps(whole("vit"), None)
    with pytest.raises(UserError, match="needs a teacher"):
        OneForAll().choose_taps(whole("vit"), None)


# end to end


def test_scalekd_trains_in_float64_too(tmp_path: Path):
    ref = saved_teacher(tmp_path, "fp64", {**VIT, "img_size": 28})
    run = assemble(unit("scalekd", ref, student=NETWORKS["cnn"], recipe={"epochs": 1, "precision": "fp64"}), LocalSession())
    train_epoch(run, 0)
    assert run.sums is not None
    assert run.sums.dtype == torch.float64
    assert run.sums.isfinite().all()
