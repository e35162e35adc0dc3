"""Which places of a pair are compared: chosen for convolutional networks and transformers, named by a user, or refused with a reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from kdbench.errors import UserError
from kdbench.methods.build import MethodSpec, fitted
from kdbench.methods.features import FeatureMethod, middle_stages, paired_spatial_stages, paired_stages, stages
from kdbench.models.build import ModelSpec, build_model
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.taps import tap_shapes

IMAGE = (3, 32, 32)
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "cnn": {"name": "tiny_cnn", "width": 4},  # 16x16, 8x8, 4x4
    "wide cnn": {"name": "cifar_resnet8", "width": 8},  # 32x32, 16x16, 8x8
    "resnet18": {"name": "resnet18"},  # a stem and four stages, the last of a single position
    "vit": {"name": "vit_tiny_patch16_224", "depth": 3, **SMALL_VIT},  # 4x4 and a class token
    "deep vit": {"name": "vit_tiny_patch16_224", "depth": 8, **SMALL_VIT},
    "shallow vit": {"name": "vit_tiny_patch16_224", "depth": 1, **SMALL_VIT},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "img_size": 32,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    },  # 8x8, 4x4
}


@cache
def shapes(name: str) -> Shapes:
    facts: dict[str, Any] = {"num_classes": 7, "in_channels": 3, "image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return tap_shapes(build_model(ModelSpec.model_validate(NETWORKS[name]), **facts), IMAGE)


def method(name: str, **params: Any) -> MethodSpec:
    return MethodSpec.model_validate({"name": name, **params})


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("cnn", ["stage:0", "stage:1", "stage:2"]),
        ("resnet18", ["stage:0", "stage:1", "stage:2", "stage:3", "stage:4"]),
        ("swin", ["stage:0", "stage:1"]),
        ("vit", ["block:0", "block:1", "block:2"]),
        ("deep vit", ["block:1", "block:3", "block:5", "block:7"]),
        ("shallow vit", ["stage:0"]),
    ],
)
def test_blocks_spread_over_the_depth_stand_for_the_stages_of_a_transformer(network: str, names: list[str]) -> None:
    assert stages(shapes(network)) == names


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("cnn", "wide cnn", [("stage:0", "stage:0"), ("stage:1", "stage:1"), ("stage:2", "stage:2")]),
        ("cnn", "resnet18", [("stage:0", "stage:2"), ("stage:1", "stage:3"), ("stage:2", "stage:4")]),
        ("vit", "deep vit", [("block:0", "block:3"), ("block:1", "block:5"), ("block:2", "block:7")]),
        ("cnn", "deep vit", [("stage:0", "block:3"), ("stage:1", "block:5"), ("stage:2", "block:7")]),
        ("vit", "cnn", [("block:0", "stage:0"), ("block:1", "stage:1"), ("block:2", "stage:2")]),
        ("swin", "cnn", [("stage:0", "stage:1"), ("stage:1", "stage:2")]),
        ("shallow vit", "cnn", [("stage:0", "stage:2")]),
    ],
)
def test_stages_are_paired_from_the_last_one_back(student: str, teacher: str, pairs: list[tuple[str, str]]) -> None:
    assert list(zip(*paired_stages(shapes(student), shapes(teacher)), strict=True)) == pairs


def test_a_stage_of_a_single_position_is_left_out_where_space_is_compared() -> None:
    assert shapes("resnet18").taps["stage:-1"] == TapShape("map", (512, 1, 1))
    assert paired_spatial_stages(shapes("cnn"), shapes("resnet18")) == (("stage:0", "stage:1"), ("stage:2", "stage:3"))
    assert paired_spatial_stages(shapes("resnet18"), shapes("cnn")) == (("stage:2", "stage:3"), ("stage:0", "stage:1"))
    assert paired_spatial_stages(shapes("vit"), shapes("deep vit")) == paired_stages(shapes("vit"), shapes("deep vit"))
    point = Shapes((7,), {"stage:0": TapShape("map", (8, 1, 1))})
    assert paired_spatial_stages(point, point) == (("stage:0",), ("stage:0",))


@pytest.mark.parametrize(
    ("student", "teacher", "pair"),
    [
        ("cnn", "wide cnn", ("stage:0", "stage:1")),  # 16x16 both
        ("wide cnn", "cnn", ("stage:2", "stage:1")),  # 8x8 both
        ("vit", "deep vit", ("block:2", "block:3")),  # all of one size: the deepest
        ("cnn", "deep vit", ("stage:2", "block:3")),  # 4x4 both
        ("vit", "cnn", ("block:2", "stage:1")),
    ],
)
def test_the_middle_is_the_teachers_and_the_students_nearest_in_size(student: str, teacher: str, pair: tuple[str, str]) -> None:
    assert middle_stages(shapes(student), shapes(teacher)) == ((pair[0],), (pair[1],))


def test_taps_that_are_chosen_become_parameters_and_are_not_chosen_again() -> None:
    found = fitted(method("at"), shapes("cnn"), shapes("vit"))
    assert found.student_taps == ("stage:0", "stage:1", "stage:2")
    assert found.teacher_taps == ("block:0", "block:1", "block:2")
    assert found.taps_chosen
    dumped = found.params.model_dump(mode="json")
    again = fitted(method("at", **dumped), shapes("resnet18"), shapes("resnet18"))
    assert again.params == found.params


def test_taps_that_a_user_names_are_taken_as_they_are() -> None:
    found = fitted(method("at", student_taps=["layer2", "stage:2"], teacher_taps=["blocks.0", "block:-1"]), shapes("cnn"), shapes("vit"))
    assert (found.student_taps, found.teacher_taps) == (("layer2", "stage:2"), ("blocks.0", "block:-1"))


def test_one_side_named_leaves_the_other_to_the_method() -> None:
    found = fitted(method("mgd", student_taps=["stage:1"]), shapes("cnn"), shapes("vit"))
    assert (found.student_taps, found.teacher_taps) == (("stage:1",), ("stage:-1",))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"student_taps": ["stage:7"]}, "method mgd: student_taps: there is no tap 'stage:7'; did you mean 'stage:"),
        ({"teacher_taps": ["blocks.0.att"]}, "method mgd: teacher_taps: there is no tap 'blocks.0.att'; did you mean 'blocks.0.attn"),
        (
            {"student_taps": ["stage:0", "stage:1"], "teacher_taps": ["block:0"]},
            "method mgd: 2 student_taps (stage:0, stage:1) can't be paired with 1 teacher_taps (block:0); name as many of the one as of",
        ),
        ({"student_taps": ["stage:0", "stage:1"]}, "2 student_taps (stage:0, stage:1) can't be paired with 1 teacher_taps (stage:-1)"),
    ],
)
def test_taps_that_do_not_fit_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        fitted(method("mgd", **params), shapes("cnn"), shapes("vit"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_teacher_it_says_so() -> None:
    with pytest.raises(UserError, match=r"method at needs a teacher, and there is none; add `teacher: \{model: \.\.\.\}`"):
        fitted(method("at"), shapes("cnn"), None)


def test_a_network_without_stages_is_told_to_name_taps() -> None:
    flat = Shapes((7,), {"fc1": TapShape("vector", (5,)), "fc2": TapShape("vector", (7,))})
    with pytest.raises(UserError) as caught:
        fitted(method("at"), flat, shapes("cnn"))
    assert str(caught.value) == (
        "method at: there is no stage in one of the networks; there is: fc1, fc2; name student_taps and teacher_taps"
    )


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (
            "pooled",
            "method at can't compare the student's 'pooled' (vector [16]) with the teacher's 'stage:1' (map [8, 8, 8]): a vector of 16",
        ),
        ("layer3", "'layer3' (map [16, 4, 4]) with the teacher's 'point' (map [9, 1, 1]): it compares positions of a map, and there is a"),
    ],
)
def test_a_place_that_can_not_be_compared_is_named_with_its_shape(tap: str, message: str) -> None:
    theirs = "point" if tap == "layer3" else "stage:1"
    teacher = Shapes((7,), {**shapes("cnn").taps, "point": TapShape("map", (9, 1, 1))})
    found = fitted(method("at", student_taps=[tap], teacher_taps=[theirs]), shapes("cnn"), teacher)
    assert isinstance(found, FeatureMethod)
    with pytest.raises(UserError) as caught:
        found.map_pairs(shapes("cnn"), teacher, over_space=True)
    assert message in str(caught.value)


class Compare(FeatureMethod):
    """A method of one's own, outside the catalogue."""


def test_a_method_outside_the_catalogue_compares_last_stages_and_is_called_by_its_path() -> None:
    found = Compare(Compare().choose_taps(shapes("cnn"), shapes("swin")))
    assert (found.student_taps, found.teacher_taps) == (("stage:-1",), ("stage:-1",))
    assert found.name == f"{Compare.__module__}:Compare"


@pytest.mark.parametrize("student", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [torch.float16, torch.float32, torch.float64])
def test_maps_are_read_on_their_grid_and_as_wide_as_the_student(student: torch.dtype, teacher: torch.dtype) -> None:
    compare = Compare(Compare.Params(student_taps=("a", "b"), teacher_taps=("c", "d")))
    tokens, grid = torch.randn(2, 17, 5), torch.randn(2, 3, 4, 4)
    ours = Outputs(torch.zeros(2, 7), {"a": tokens.to(student), "b": grid.to(student)})
    theirs = Outputs(torch.zeros(2, 7), {"c": grid.to(teacher), "d": tokens.to(teacher)})
    (first, second), (third, _) = compare.read_maps(ours, theirs)
    assert first.shape == (2, 5, 4, 4)
    assert torch.equal(first[:, :, 1, 2], tokens.to(student)[:, 1 + 4 + 2].to(first.dtype))
    assert torch.equal(second, grid.to(teacher).to(second.dtype))
    assert {x.dtype for x in (first, second, third)} == {torch.float64 if student == torch.float64 else torch.float32}
