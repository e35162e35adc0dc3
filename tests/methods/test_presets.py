"""Defaults and ranges that depend on what networks give and how large their maps are, and the places that are compared on a pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from typer.testing import CliRunner

from kdbench.cli.app import app
from kdbench.errors import UserError
from kdbench.methods.base import Method
from kdbench.methods.build import MethodSpec, fitted, params_of, search_axes
from kdbench.methods.presets import PerElement, preset_for
from kdbench.models.outputs import Shapes, TapShape
from kdbench.search.space import Choice, Range

BOXES, PIXELS, LABELS = frozenset({"boxes", "imitation"}), frozenset({"pixel logits"}), frozenset({"class logits"})
DENSE = ("mgd", "pkd", "cwd")


def detector(width: int, sizes: tuple[int, ...] = (16, 8), proposals: bool = False) -> Shapes:
    """A pyramid of square maps, beside two stages of a backbone."""
    maps = {f"level:{level}": TapShape("map", (width, size, size)) for level, size in enumerate(sizes)}
    maps |= {f"stage:{place}": TapShape("map", (width, 4, 4)) for place in (0, -1)}
    prediction: dict[str, tuple[int, ...]] = {"logits": (80, 3), "boxes": (80, 4)}
    return Shapes(prediction | ({"proposals": (10, 4)} if proposals else {}), maps)


def segmenter(width: int) -> Shapes:
    return Shapes((5, 32, 32), {f"stage:{place}": TapShape("map", (width, 8, 8)) for place in (0, -1)})


def classifier(width: int) -> Shapes:
    return Shapes((5,), {f"stage:{place}": TapShape("map", (width, 7, 7)) for place in (0, -1)})


def spec(name: str, **params: Any) -> MethodSpec:
    return MethodSpec.model_validate({"name": name, **params})


def chosen(name: str, student: Shapes, teacher: Shapes, gives: frozenset[str], **params: Any) -> dict[str, Any]:
    return fitted(spec(name, **params), student, teacher, gives=gives).params.model_dump()


# places


@pytest.mark.parametrize("name", [*DENSE, "fgd"])
def test_all_levels_of_a_pyramid_are_compared(name: str) -> None:
    for sizes in ((16,), (16, 8), (32, 16, 8, 4)):
        method = fitted(MethodSpec(name=name), detector(4, sizes), detector(6, sizes), gives=BOXES)
        assert method.student_taps == method.teacher_taps == tuple(f"level:{level}" for level in range(len(sizes)))


@pytest.mark.parametrize("name", [*DENSE, "fgd"])
def test_levels_of_one_size_are_paired(name: str) -> None:
    method = fitted(MethodSpec(name=name), detector(4, (32, 16, 8)), detector(6, (16, 8, 4)), gives=BOXES)
    assert (method.student_taps, method.teacher_taps) == (("level:1", "level:2"), ("level:0", "level:1"))
    with pytest.raises(UserError) as caught:
        fitted(MethodSpec(name=name), detector(4, (32, 16)), detector(6, (24,)), gives=BOXES)
    said = (
        "no level of the student's pyramid (32x32, 16x16) has the size of one of the teacher's (24x24); name student_taps and teacher_taps"
    )
    assert str(caught.value) == f"method {name}: {said}"


@pytest.mark.parametrize("name", [*DENSE, "fgd"])
def test_places_that_the_user_names_stay(name: str) -> None:
    named = spec(name, student_taps=["stage:-1"], teacher_taps=["level:1"])
    method = fitted(named, detector(4), detector(6), gives=BOXES)
    assert (method.student_taps, method.teacher_taps) == (("stage:-1",), ("level:1",))


def test_networks_without_a_pyramid_are_compared_where_they_were() -> None:
    for shapes in (segmenter, classifier):
        assert fitted(MethodSpec(name="mgd"), shapes(4), shapes(6)).student_taps == ("stage:-1",)
        assert fitted(MethodSpec(name="pkd"), shapes(4), shapes(6)).student_taps == ("stage:0",)
    assert fitted(MethodSpec(name="cwd"), classifier(4), classifier(6)).student_taps == ("stage:0",)
    assert fitted(MethodSpec(name="cwd"), segmenter(4), segmenter(6)).student_taps == ()


# defaults


@pytest.mark.parametrize("name", [*DENSE, "fitnet", "at", "kd"])
def test_on_classification_and_on_no_task_the_defaults_are_those_of_params(name: str) -> None:
    taps = {"student_taps", "teacher_taps"}
    for gives in (LABELS, frozenset()):
        found = chosen(name, classifier(4), classifier(6), gives)
        assert {key: value for key, value in found.items() if key not in taps} == params_of(MethodSpec(name=name)).model_dump(exclude=taps)
        assert search_axes(MethodSpec(name=name), classifier(4), classifier(6), gives) == search_axes(MethodSpec(name=name))


def test_mgd_hides_pixels_on_dense_tasks_as_the_authors_do() -> None:
    one = chosen("mgd", detector(4), detector(6), BOXES)
    two = chosen("mgd", detector(4, proposals=True), detector(6, proposals=True), BOXES)
    said = chosen("mgd", detector(4), detector(6), BOXES | {"proposals"})
    pixels = chosen("mgd", segmenter(4), segmenter(6), PIXELS)
    assert [(found["mask"], found["masked"], found["logit_weight"]) for found in (one, two, said, pixels)] == [
        ("pixel", 0.65, 0.0),
        ("pixel", 0.45, 0.0),
        ("pixel", 0.45, 0.0),
        ("pixel", 0.75, 3.0),
    ]
    assert one["alpha"] == pytest.approx(2e-5 * 256 * 100 * 152 / (6 * 16 * 16), rel=1e-12)
    assert two["alpha"] == said["alpha"] == pytest.approx(5e-7 * 256 * 200 * 304 / (6 * 16 * 16), rel=1e-12)
    assert pixels["alpha"] == pytest.approx(2e-5 * 2048 * 64 * 128 / (6 * 8 * 8), rel=1e-12)


def test_at_the_authors_size_the_defaults_are_the_authors_numbers() -> None:
    one = Shapes(
        {"logits": (1, 1), "boxes": (1, 4)}, {"level:0": TapShape("map", (256, 100, 152)), "level:1": TapShape("map", (256, 50, 76))}
    )
    assert chosen("mgd", one, one, BOXES)["alpha"] == pytest.approx(2e-5)
    found = chosen("fgd", one, one, BOXES)
    published = {"alpha": 1e-3, "beta": None, "gamma": 5e-4, "relation": 5e-6, "temperature": 0.5}
    assert {key: found[key] for key in published} == pytest.approx(published)
    two = Shapes({"boxes": (1, 4)}, {"level:0": TapShape("map", (256, 200, 304)), "level:1": TapShape("map", (256, 100, 152))})
    assert chosen("mgd", two, two, BOXES | {"proposals"})["alpha"] == pytest.approx(5e-7)
    found = chosen("fgd", two, two, BOXES | {"proposals"})
    published = {"alpha": 5e-5, "beta": None, "gamma": 5e-5, "relation": 5e-7, "temperature": 0.5}
    assert {key: found[key] for key in published} == pytest.approx(published)


def test_fgds_weights_follow_what_each_sum_grows_with() -> None:
    """At 64x64 with 16 to 48 channels the weights of objects are 5e-3 to 1.6e-2, and those of relations about 1e-2."""
    narrow, wide = (chosen("fgd", detector(width), detector(width), BOXES) for width in (16, 48))
    assert (narrow["alpha"], wide["alpha"]) == pytest.approx((1.6e-2, 5.33e-3), rel=1e-3)
    assert narrow["gamma"] == pytest.approx(5e-4 * (256 + 15200) / (16 + 256))
    assert narrow["relation"] == pytest.approx(5e-6 * 256 * 15200 / (16 * 256))
    assert wide["relation"] == pytest.approx(narrow["relation"] / 3)
    for width in (16, 48):
        shapes = detector(width)
        axes = {axis.name: axis.dimension for axis in search_axes(MethodSpec(name="fgd"), shapes, shapes, BOXES)}
        relation = axes["relation"]
        assert isinstance(relation, Range)
        assert relation.low < 1e-2 < relation.high


def test_pkd_and_cwd_have_their_published_weights_on_pyramids() -> None:
    assert chosen("pkd", detector(4), detector(6), BOXES)["weight"] == 10.0
    assert chosen("pkd", detector(4, proposals=True), detector(6, proposals=True), BOXES)["weight"] == 6.0
    found = chosen("cwd", detector(4), detector(6), BOXES)
    assert (found["weight"], found["temperature"]) == (10.0, 1.0)
    found = chosen("cwd", segmenter(4), segmenter(6), PIXELS)
    assert (found["weight"], found["temperature"]) == (3.0, 4.0)


def test_what_the_user_or_a_trial_sets_is_kept_whatever_the_networks() -> None:
    pinned = spec("mgd", mask="channel", alpha=0.5)
    found = fitted(pinned, detector(4), detector(6), gives=BOXES).params.model_dump()
    assert (found["mask"], found["alpha"], found["masked"]) == ("channel", 0.5, 0.65)
    # also where the value is that of Params itself
    assert chosen("mgd", detector(4), detector(6), BOXES, masked=0.15)["masked"] == 0.15
    tried = fitted(MethodSpec(name="mgd"), detector(4), detector(6), overrides={"masked": 0.15, "mask": "channel"}, gives=BOXES)
    assert (tried.params.masked, tried.params.mask) == (0.15, "channel")  # type: ignore[attr-defined]


def test_a_unit_that_names_everything_is_built_as_it_says() -> None:
    whole = fitted(MethodSpec(name="fgd"), detector(4), detector(6), gives=BOXES).params.model_dump(mode="json")
    again = fitted(spec("fgd", **whole), detector(8), detector(12), gives=BOXES | {"proposals"})
    assert again.params.model_dump(mode="json") == whole


def test_the_parts_of_a_combination_have_their_own() -> None:
    found = fitted(spec("mgd+cwd", cwd={"weight": 2.0}), detector(4), detector(6), gives=BOXES)
    params = found.params.model_dump()
    assert (params["mgd"]["masked"], params["cwd"]["weight"], params["cwd"]["temperature"]) == (0.65, 2.0, 1.0)
    assert found.student_taps == ("level:0", "level:1")
    axes = {axis.name: axis for axis in search_axes(spec("mgd+cwd", cwd={"weight": 2.0}), detector(4), detector(6), BOXES)}
    assert axes.keys() == {"task_weight", "mgd.alpha", "mgd.masked", "mgd.mask", "cwd.temperature"}
    assert axes["mgd.alpha"].default == params["mgd"]["alpha"]
    assert axes["mgd.alpha"].dimension == Range(params["mgd"]["alpha"] / 30, params["mgd"]["alpha"] * 30, log=True)


# ranges


@pytest.mark.parametrize("width", [1, 16, 256, 4096])
@pytest.mark.parametrize("name", [*DENSE, "fgd"])
@pytest.mark.parametrize("kind", [BOXES, BOXES | {"proposals"}, PIXELS])
def test_every_default_is_a_point_of_its_space_and_every_end_a_valid_value(name: str, width: int, kind: frozenset[str]) -> None:
    shapes = segmenter(width) if kind is PIXELS else detector(width)
    if name == "fgd" and kind is PIXELS:
        return
    axes = search_axes(MethodSpec(name=name), shapes, shapes, kind)
    assert {axis.name for axis in axes} == {axis.name for axis in search_axes(MethodSpec(name=name))}
    for axis in axes:
        if isinstance(axis.dimension, Choice):
            assert axis.default in axis.dimension.options
            continue
        assert axis.dimension.low <= axis.default <= axis.dimension.high
        for value in axis.dimension.ends:
            assert getattr(params_of(MethodSpec(name=name), {axis.name: value}), axis.name) == value


def test_a_range_is_centred_on_the_default_on_a_logarithmic_scale() -> None:
    default, dimension = PerElement(2.0, "values", of=100, within=5).on(TapShape("map", (2, 5, 5)))
    assert default == 4.0
    assert dimension == Range(0.8, 20.0, log=True)


def test_tokens_count_as_the_map_that_they_are_read_as() -> None:
    default, _ = PerElement(1.0, "channels + positions", of=100).on(TapShape("tokens", (17, 4)))
    assert default == 100 / (4 + 16)


def test_the_finest_of_the_teachers_maps_decides() -> None:
    student, teacher = detector(4, (16, 8)), detector(6, (16, 8))
    both = chosen("mgd", student, teacher, BOXES)["alpha"]
    coarse = chosen("mgd", student, teacher, BOXES, student_taps=["level:1"], teacher_taps=["level:1"])["alpha"]
    assert coarse == pytest.approx(4 * both)


# methods outside kdbench


class Own(Method):
    """A method with a preset of its own."""

    presets: Mapping[str, Mapping[str, Any]] = {"smell": {"task_weight": 0.5}, "taste": {"task_weight": 0.25}}  # type: ignore[misc]
    reads = frozenset()


def test_the_first_kind_that_networks_give_counts() -> None:
    shapes = Shapes((3,), {})
    assert preset_for(Own.presets, frozenset({"taste", "smell"}), shapes) == {"task_weight": 0.5}
    assert preset_for(Own.presets, frozenset({"taste"}), shapes) == {"task_weight": 0.25}
    assert preset_for(Own.presets, frozenset(), Shapes({"taste": (1,)}, {})) == {"task_weight": 0.25}
    assert preset_for(Own.presets, frozenset(), shapes) == {}
    params, ranges = Own().suited(shapes, None, frozenset({"taste"}))
    assert (params.task_weight, ranges) == (0.25, {})


# the page


@pytest.mark.parametrize("name", ["mgd", "mgd+kd"])
def test_show_says_what_holds_where(name: str) -> None:
    done = CliRunner().invoke(app, ["show", name])
    assert done.exit_code == 0
    parameter = "mgd.masked" if "+" in name else "masked"
    rows = [line.split() for line in done.output.splitlines()]
    assert ["proposals", parameter, "0.45", "0.1", "..", "0.8"] in rows
    assert ["boxes", parameter, "0.65", "0.1", "..", "0.8"] in rows
    assert "2e-05 x 3,891,200 / values" in done.output
    assert "default / 30 .. default x 30, logarithmic" in done.output


def test_show_has_no_such_table_for_a_method_that_is_the_same_everywhere() -> None:
    assert "defaults for networks of one kind" not in CliRunner().invoke(app, ["show", "fitnet"]).output
