"""Where a method's parameters are searched: what its fields say, and nothing else."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from kdbench.search.space import Choice, Parameter, Range, When, describe, dotted, is_whole, space_of


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-math.inf, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)], ids=str
)
def test_a_range_needs_two_finite_ends_in_order(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"a range needs low < high, both finite; got"):
        Range(low, high)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_logarithmic_range_begins_above_zero(low: float) -> None:
    assert Range(low, 1.0).log is False
    with pytest.raises(ValueError, match="a logarithmic range needs low > 0; got"):
        Range(low, 1.0, log=True)
    assert Range(1e-9, 1.0, log=True).low == 1e-9
    assert Range(0.5, 1.0, log=True).log is True


def test_a_range_has_steps_or_is_logarithmic() -> None:
    assert Range(1.0, 2.0, step=0.5).step == 0.5
    with pytest.raises(ValueError, match="a step or is logarithmic, not both"):
        Range(1.0, 2.0, log=True, step=0.5)


@pytest.mark.parametrize("options", [(), ("kl",)])
def test_a_choice_needs_two_options(options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="needs 2 to 1000 options"):
        Choice(options)
    assert Choice(("kl", "mse")).options == ("kl", "mse")


def test_what_a_condition_and_a_dimension_say_cannot_be_changed() -> None:
    for value, name in (
        (When("form", ("kl",)), "name"),
        (Range(0.0, 1.0), "low"),
        (Choice((1, 2)), "options"),
        (Parameter("a", Range(0, 1), 0), "name"),
    ):
        with pytest.raises(AttributeError):
            setattr(value, name, "other")


class Inner(BaseModel):
    form: Annotated[str, Choice(("kl", "mse"))] = "kl"
    margin: Annotated[float, Range(0.1, 1.0, when=When("form", ("mse",)))] = 0.5


class Outer(BaseModel):
    """With what is not searched first, in between and last."""

    name: str = "a name"
    weight: Annotated[float, "a note", Range(0.0, 2.0)] = 1.0
    first: Inner = Inner()
    layers: Annotated[int, Range(1, 4)] = 2
    second: Inner = Inner(form="mse")
    note: str | None = None


def names(axes: tuple[Parameter, ...]) -> list[str]:
    return [axis.name for axis in axes]


def test_a_space_is_the_fields_that_say_where_to_search_with_their_present_values() -> None:
    axes = space_of(Outer(weight=0.25))
    assert names(axes) == ["weight", "layers", "first.form", "first.margin", "second.form", "second.margin"]
    assert axes[0] == Parameter("weight", Range(0.0, 2.0), 0.25, integer=False)
    assert axes[1] == Parameter("layers", Range(1, 4), 2, integer=True)
    assert [axis.default for axis in axes] == [0.25, 2, "kl", 0.5, "mse", 0.5]


def test_a_condition_inside_a_part_looks_at_that_part() -> None:
    axes = {axis.name: axis.dimension.when for axis in space_of(Outer())}
    assert axes["first.margin"] == When("first.form", ("mse",))
    assert axes["second.margin"] == When("second.form", ("mse",))
    assert axes["first.form"] is None
    assert axes["weight"] is None


def test_what_is_pinned_is_not_searched_whether_it_is_a_field_or_inside_a_part() -> None:
    assert names(space_of(Outer(), frozenset({"weight", "second.margin"}))) == ["layers", "first.form", "first.margin", "second.form"]
    # A pinned field of one part says nothing of the field of this name outside or in another part.
    assert names(space_of(Inner(), frozenset({"first.form"}))) == ["form", "margin"]


def test_a_condition_on_a_pinned_field_is_settled() -> None:
    (margin,) = space_of(Inner(form="mse"), frozenset({"form"}))
    assert margin == Parameter("margin", Range(0.1, 1.0), 0.5)
    assert space_of(Inner(form="kl"), frozenset({"form"})) == ()
    axes = space_of(Outer(), frozenset({"first.form", "second.form"}))
    assert names(axes) == ["weight", "layers", "second.margin"]
    assert axes[-1].dimension.when is None


class Chain(BaseModel):
    """Each field depends on the one below it."""

    third: Annotated[float, Range(0.0, 1.0, when=When("second", (2, 3)))] = 0.5
    second: Annotated[int, Range(1, 3, when=When("first", (True,)))] = 2
    first: Annotated[bool, Choice((False, True))] = True


def test_an_axis_comes_once_and_after_the_axis_that_its_condition_looks_at() -> None:
    axes = space_of(Chain())
    assert names(axes) == ["first", "second", "third"]
    assert [axis.dimension.when for axis in axes] == [None, When("first", (True,)), When("second", (2, 3))]


@pytest.mark.parametrize(
    ("annotation", "whole"),
    [(int, True), (int | None, True), (float, False), (float | None, False), (int | float, False), (str, False), (str | None, False)],
)
def test_a_field_is_whole_where_its_type_has_an_int_and_no_float(annotation: Any, whole: bool) -> None:
    assert is_whole(annotation) is whole


def test_dotted_names_lead_into_parts_of_any_depth() -> None:
    assert dotted({"weight": 1, "kd": {"temperature": 2, "of": {"this": None}}, "empty": {}}) == {
        "weight": 1,
        "kd.temperature": 2,
        "kd.of.this": None,
    }
    assert dotted({}) == {}


def test_a_description_holds_all_that_a_search_depends_on() -> None:
    assert describe(space_of(Inner())) == {
        "form": {"kind": "choice", "options": ("kl", "mse"), "when": None, "default": "kl"},
        "margin": {
            "kind": "range",
            "low": 0.1,
            "high": 1.0,
            "log": False,
            "step": None,
            "when": {"name": "form", "values": ("mse",)},
            "default": 0.5,
        },
    }
    assert list(describe(space_of(Outer()))) == names(space_of(Outer()))
