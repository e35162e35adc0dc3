"""From what a user writes to a method: names, parameters, search spaces and the messages for what is wrong."""

from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from kdbench.errors import UserError, explain
from kdbench.methods import METHODS
from kdbench.methods.build import MethodSpec, build_method, method_class, params_of, search_axes
from kdbench.methods.dkd import DKD
from kdbench.search.space import Choice, Range


def spec(value: Any) -> MethodSpec:
    return MethodSpec.model_validate(value)


@pytest.mark.parametrize("name", METHODS)
def test_every_default_lies_in_its_search_range(name: str):
    for axis in search_axes(spec(name)):
        if isinstance(axis.dimension, Range):
            assert axis.dimension.low <= axis.default <= axis.dimension.high, axis.name
        else:
            assert isinstance(axis.dimension, Choice)
            assert axis.default in axis.dimension.options


@pytest.mark.parametrize("name", METHODS)
def test_both_ends_of_every_range_are_valid_values(name: str):
    for axis in search_axes(spec(name)):
        if isinstance(axis.dimension, Range):
            for value in (axis.dimension.low, axis.dimension.high):
                assert getattr(params_of(spec(name), {axis.name: value}), axis.name) == value


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("none", set()),
        ("label_smoothing", {"smoothing"}),
        ("kd", {"task_weight", "kd_weight", "temperature"}),
        ("nkd", {"task_weight", "gamma", "temperature"}),
        ("dkd", {"task_weight", "beta", "temperature"}),
        ("tf_nkd", {"task_weight", "weight"}),
    ],
)
def test_each_method_searches_its_weights_and_temperature(name: str, axes: set[str]):
    assert {axis.name for axis in search_axes(spec(name))} == axes


def test_a_name_alone_means_the_published_defaults():
    method = build_method(spec("dkd"), None)
    assert type(method) is DKD
    assert method.params.model_dump() == {"task_weight": 1.0, "temperature": 4.0, "alpha": 1.0, "beta": 8.0, "warmup_share": 20 / 240}


def test_a_pinned_parameter_is_set_and_not_searched():
    pinned = spec({"name": "dkd", "beta": 2})
    assert params_of(pinned).beta == 2.0
    assert {axis.name for axis in search_axes(pinned)} == {"task_weight", "temperature"}


def test_overrides_win_over_pinned_values():
    method = build_method(spec({"name": "dkd", "beta": 2}), None, {"beta": 3.0, "temperature": 1.5})
    assert (method.params.beta, method.params.temperature) == (3.0, 1.5)


def test_the_generator_reaches_the_method():
    generator = torch.Generator()
    assert build_method(spec("kd"), generator).generator is generator


def test_the_label_is_the_name_unless_it_is_given():
    assert spec("kd").label == "kd"
    labelled = spec({"name": "kd", "label": "kd, T 1", "temperature": 1})
    assert labelled.label == "kd, T 1"
    assert labelled.pinned == {"temperature": 1}


def test_a_spec_can_not_be_changed():
    with pytest.raises(ValidationError):
        spec("kd").name = "dkd"


class NotAMethod:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dkdd", "unknown method 'dkdd'; did you mean 'dkd'?"),
        ({"name": "dkd", "betta": 2}, "method 'dkd': unknown key 'betta'; did you mean 'beta'?"),
        (
            {"name": "dkd", "beta": "much"},
            "method 'dkd': beta: expected a number, got 'much'",
        ),
        ({"name": "dkd", "beta": -1}, "method 'dkd': beta: expected greater than or equal to 0, got -1"),
        ({"name": "kd", "temperature": 0}, "method 'kd': temperature: expected greater than 0, got 0"),
        ({"name": "kd", "temperature": float("nan")}, "method 'kd': temperature: expected a finite number, got nan"),
        ({"name": "kd", "kd_weight": True}, "method 'kd': kd_weight: expected a number, got true"),
        ({"name": "kd", "form": "cross_entropie"}, "expected 'kl' or 'cross_entropy', got 'cross_entropie'; did you mean 'cross_entropy'?"),
        ({"name": "label_smoothing", "smoothing": 1.0}, "method 'label_smoothing': smoothing: expected less than 1, got 1.0"),
        ({"name": "none", "temperature": 4}, "method 'none': unknown key 'temperature'; there is: task_weight"),
        ({"name": "kd", "label": "mine", "temprature": 1}, "method 'kd' (mine): unknown key 'temprature'; did you mean 'temperature'?"),
        ("kdbench.errors:explain", "method 'kdbench.errors:explain' is no subclass of kdbench.methods.base.Method"),
        ("nowhere.at_all:Method", "there is no module 'nowhere' on the Python path"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(value: Any, message: str):
    with pytest.raises(UserError) as caught:
        params_of(spec(value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_outside_the_package_is_named_by_its_dotted_path():
    assert method_class(spec("kdbench.methods.dkd:DKD")) is DKD


def test_each_problem_has_a_line_of_its_own():
    with pytest.raises(UserError) as caught:
        params_of(spec({"name": "dkd", "betta": 2, "alpha": "x"}))
    assert len(str(caught.value).splitlines()) == 2


class Recipe(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    epochs: int = 1
    schedule: Literal["cosine", "step"] = "cosine"


class Study(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: str
    recipe: Recipe = Recipe()
    others: list[Recipe] = []
    named: dict[str, Recipe] = {}
    maybe: Recipe | None = None


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({}, "study.yaml: key 'name' is missing"),
        ({"name": "a", "recpe": {}}, "study.yaml: unknown key 'recpe'; did you mean 'recipe'?"),
        ({"name": "a", "recipe": {"epoch": 2}}, "study.yaml: unknown key 'recipe.epoch'; did you mean 'epochs'?"),
        ({"name": "a", "others": [{}, {"epoch": 2}]}, "study.yaml: unknown key 'others.1.epoch'; did you mean 'epochs'?"),
        ({"name": "a", "named": {"x": {"epoch": 2}}}, "study.yaml: unknown key 'named.x.epoch'; did you mean 'epochs'?"),
        ({"name": "a", "maybe": {"epoch": 2}}, "study.yaml: unknown key 'maybe.epoch'; did you mean 'epochs'?"),
        (
            {"name": "a", "recipe": {"schedule": "cosin"}},
            "study.yaml: recipe.schedule: expected 'cosine' or 'step', got 'cosin'; did you mean 'cosine'?",
        ),
        ("text", "study.yaml: expected keys with values, got 'text'"),
    ],
)
def test_a_nested_problem_names_its_path_and_the_nearest_key(value: Any, line: str):
    with pytest.raises(ValidationError) as caught:
        Study.model_validate(value)
    assert explain(caught.value, "study.yaml", Study) == line
