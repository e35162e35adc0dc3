"""Several methods at once: terms, parameters by part, spaces, records and what is said of wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn

from kdbench.cli.pages import show_page
from kdbench.data.batch import Batch, Part
from kdbench.errors import UserError
from kdbench.experiment import Unit, load_experiment, to_yaml
from kdbench.methods.base import MAPS_ALONE, Method, Paper, Progress
from kdbench.methods.build import MethodSpec, build_method, fitted, method_class, params_of, search_axes
from kdbench.methods.combination import combined
from kdbench.methods.dkd import DKD
from kdbench.methods.kd import KD
from kdbench.methods.nkd import NKD
from kdbench.methods.tf_nkd import TeacherFreeNKD
from kdbench.models.outputs import Outputs, Shapes, TapShape
from kdbench.models.trace import Example
from kdbench.search.space import Choice, Range, When, dotted
from kdbench.search.study import MethodStudy
from kdbench.tasks.base import TaskInfo
from kdbench.training.assembly import assemble
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.training.units import layout, saved_teacher, unit

HALF_WAY = Progress(epoch=0.5, step=1, total_steps=24)
TASK = TaskInfo("classification", 5, (1, 28, 28))
VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 7, "depth": 3, "embed_dim": 16, "num_heads": 2}
SMALL_VIT = {**VIT, "embed_dim": 8}


def spec(value: Any) -> MethodSpec:
    return MethodSpec.model_validate(value)


def logits(samples: int = 4) -> tuple[Outputs, Outputs, Batch]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(samples, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    index = torch.arange(samples)
    return Outputs(student), Outputs(teacher), Batch(index, index % 5, index)


class Simple(Method):
    """Has a condition in its space, learns one number, and sees a teacher only if it asks for one."""

    paper = Paper("a method of the tests")
    reads = MAPS_ALONE

    class Params(Method.Params):
        form: Annotated[str, Choice(("plain", "bent"))] = "plain"
        bend: Annotated[float, Range(0.0, 1.0, when=When("form", ("bent",)))] = 0.5
        tap: str = ""

    def choose_taps(self, student: Shapes, teacher: Shapes | None) -> Method.Params:
        return self.params.model_copy(update={"tap": next(iter(student.taps))})

    def build(self, student: Shapes, teacher: Shapes | None, task: TaskInfo) -> None:
        self.saw_teacher = teacher is not None
        self.number = nn.Parameter(torch.ones(()))

    def use_samples(self, samples: Part) -> None:
        self.samples = len(samples)

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        assert (t is not None) == self.needs_teacher
        return {"number": self.number * s.logits.mean()}


class Inner(Simple):
    version = 3
    student_taps = ("stage:0", "stage:1")
    teacher_taps = ("stage:-1",)
    needs_teacher_network = True

    def use_teacher(self, network: nn.Module, example: Example) -> None:
        self.given = [network]


class Outer(Simple):
    version = 2
    student_taps = ("stage:1", "pooled")
    needs_teacher = False
    reads = frozenset({"class logits", "presence"})


BOTH = combined((("inner", Inner), ("outer", Outer)))


# what a combination is


def test_its_terms_are_those_of_its_parts_each_with_its_own_parameters():
    whole = build_method(spec({"name": "nkd+dkd", "nkd": {"temperature": 2.0}, "dkd": {"temperature": 3.0, "beta": 2.0}}), None)
    parts = NKD(NKD.Params(temperature=2.0)), DKD(DKD.Params(temperature=3.0, beta=2.0))
    given = logits()
    torch.testing.assert_close(whole(*given, HALF_WAY), parts[0](*given, HALF_WAY) | parts[1](*given, HALF_WAY))


def test_a_term_that_several_parts_have_gets_the_parts_name_in_front():
    method = BOTH()
    method.build(Shapes((5,), {}), Shapes((5,), {}), TASK)
    assert method(*logits(), HALF_WAY).keys() == {"inner.number", "outer.number"}


def test_it_needs_what_any_of_its_parts_needs():
    assert (BOTH.needs_teacher, BOTH.needs_teacher_network, BOTH.batch_coupled) == (True, True, False)
    assert method_class(spec("kd+tf_nkd")).batch_coupled
    assert not method_class(spec("label_smoothing+tf_nkd")).needs_teacher
    assert BOTH.reads == frozenset({"class logits", "presence"})
    assert not method_class(spec("kd+nkd")).supports(frozenset({"pixel logits"}))
    assert method_class(spec("kd+label_smoothing")).supports(frozenset({"pixel logits"}))
    assert combined((("a", Inner),)).reads == MAPS_ALONE


def test_its_taps_are_the_union_in_order():
    assert BOTH.student_taps == BOTH().student_taps == ("stage:0", "stage:1", "pooled")
    assert BOTH().teacher_taps == ("stage:-1",)


def test_a_part_without_a_teacher_sees_none_and_the_network_goes_to_whom_it_concerns():
    method = BOTH()
    method.build(Shapes((5,), {}), Shapes((5,), {}), TASK)
    inner, outer = method.parts
    assert (inner.saw_teacher, outer.saw_teacher) == (True, False)
    network = nn.Linear(2, 2)
    method.use_teacher(network, (1, 28, 28))
    assert inner.given == [network]
    assert not list(inner.children())


def test_its_version_rises_with_that_of_any_part():
    class Newer(Inner):
        version = 4

    assert BOTH.version == 5
    assert combined((("inner", Newer), ("outer", Outer))).version == 6


def test_its_warm_up_is_the_longest():
    assert build_method(spec("kd+dkd"), None).warmup_epochs(24) == pytest.approx(2)
    assert build_method(spec("kd+nkd"), None).warmup_epochs(24) == 0


class Marked(nn.Module):
    """A student with something around it."""

    def __init__(self, inner: nn.Module, mark: str) -> None:
        super().__init__()
        self.inner, self.mark = inner, mark


class Wrapping(Simple):
    """Wraps the student, and looks at the layer that it adds."""

    def adapt_student(self, student: nn.Module) -> nn.Module:
        self.student_taps = self.own_taps
        return Marked(student, self.mark)

    def export_student(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, Marked)
        assert student.mark == self.mark
        inner = student.inner
        assert isinstance(inner, nn.Module)
        return inner

    mark = "first"
    own_taps: tuple[str, ...] = ()


class SecondWrapping(Wrapping):
    mark = "second"
    own_taps = ("added",)


def test_students_are_changed_in_order_and_changed_back_in_reverse():
    method, student = combined((("first", Wrapping), ("second", SecondWrapping)))(), nn.Linear(3, 3)
    changed = method.adapt_student(student)
    assert isinstance(changed, Marked)
    assert changed.mark == "second"
    assert method.student_taps == ("added",)
    assert method.export_student(changed) is student


def test_a_part_that_changes_the_student_goes_with_none_that_looks_inside():
    for parts in ((("wrap", Wrapping), ("inner", Inner)), (("inner", Inner), ("wrap", Wrapping))):
        with pytest.raises(UserError, match=r"wrap changes the student, so inner would not find what it looks at there; combine wrap"):
            combined(parts)().adapt_student(nn.Linear(3, 3))


def test_all_parts_are_told_of_the_samples():
    method = BOTH()
    method.use_samples(Part(*(torch.arange(7) for _ in range(3))))
    assert [part.samples for part in method.parts] == [7, 7]


def test_adapters_of_all_parts_are_in_its_state_and_come_back():
    first, second = BOTH(), BOTH()
    for method, value in ((first, 2.0), (second, 3.0)):
        method.build(Shapes((5,), {}), Shapes((5,), {}), TASK)
        for parameter in method.parameters():
            nn.init.constant_(parameter, value)
    assert first.state_dict().keys() == {"parts.0.number", "parts.1.number"}
    second.load_state_dict(first.state_dict())
    assert [parameter.item() for parameter in second.parameters()] == [2.0, 2.0]


def test_taps_are_chosen_part_by_part():
    places = Shapes((5,), {"stage:9": TapShape("vector", (3,))})
    chosen = BOTH().choose_taps(places, places)
    assert (chosen.inner.tap, chosen.outer.tap) == ("stage:9", "stage:9")  # type: ignore[attr-defined]
    assert build_method(spec("kd+nkd"), None).taps_chosen
    assert not build_method(spec("kd+vitkd"), None).taps_chosen


def test_all_parts_draw_from_the_one_generator():
    generator = torch.Generator()
    method = build_method(spec("kd+nkd"), generator)
    assert all(part.generator is generator for part in (method, *method.parts))  # type: ignore[misc,has-type]


# its parameters and its space


def test_the_space_is_the_union_by_dotted_names_with_one_task_weight():
    axes = {axis.name: axis for axis in search_axes(spec("kd+nkd"))}
    assert axes.keys() == {"task_weight", "kd.kd_weight", "kd.temperature", "nkd.temperature", "nkd.gamma"}
    assert (axes["kd.temperature"].default, axes["nkd.temperature"].default) == (4.0, 3.0)


def test_task_weight_is_the_first_parts():
    for name, default, high in (("kd+nkd", 0.1, 1.0), ("nkd+kd", 1.0, 2.0)):
        (axis,) = [axis for axis in search_axes(spec(name)) if axis.name == "task_weight"]
        assert isinstance(axis.dimension, Range)
        assert (axis.default, axis.dimension.high) == (default, high)


def test_a_parameter_pinned_in_its_part_is_set_and_not_searched():
    pinned = spec({"name": "kd+nkd", "task_weight": 0.5, "nkd": {"temperature": 1}})
    params: Any = params_of(pinned)
    assert (params.task_weight, params.nkd.temperature, params.kd.temperature) == (0.5, 1.0, 4.0)
    assert {axis.name for axis in search_axes(pinned)} == {"kd.kd_weight", "kd.temperature", "nkd.gamma"}


def test_a_trials_values_reach_the_parts_and_win_over_pinned_ones():
    pinned = spec({"name": "kd+nkd", "nkd": {"temperature": 1.0}})
    params: Any = params_of(pinned, {"task_weight": 0.7, "nkd.temperature": 2.0, "kd.kd_weight": 0.3})
    assert (params.task_weight, params.nkd.temperature, params.kd.kd_weight) == (0.7, 2.0, 0.3)
    assert pinned.pinned == {"nkd": {"temperature": 1.0}}


def test_a_condition_looks_at_its_own_part():
    part = "tests.methods.test_combination:Inner"
    name = f"kd+{part}"
    axes = {axis.name: axis for axis in search_axes(spec(name))}
    assert axes[f"{part}.bend"].dimension.when == When(f"{part}.form", ("bent",))
    settled = {axis.name: axis for axis in search_axes(spec({"name": name, part: {"form": "bent"}}))}
    assert settled[f"{part}.bend"].dimension.when is None
    assert f"{part}.bend" not in {axis.name for axis in search_axes(spec({"name": name, part: {"form": "plain"}}))}


def test_a_study_asks_for_points_that_the_parts_understand(tmp_path: Path):
    name = "kd+tests.methods.test_combination:Inner"
    axes = search_axes(spec(name))
    study = MethodStudy(tmp_path / "study.log", "study", axes, trials=6, sampler="random", seed=0)
    points = [study.ask().params for _ in range(6)]
    assert points[0] == {axis.name: axis.default for axis in axes if axis.dimension.when is None}
    assert any(f"{name.removeprefix('kd+')}.bend" in point for point in points)
    for point in points:
        assert {key: dotted(params_of(spec(name), point).model_dump())[key] for key in point} == point


def test_parameters_survive_the_way_through_json_into_a_unit_and_back():
    params = params_of(spec("kd+nkd"), {"nkd.gamma": 2.0, "task_weight": 0.25})
    made = unit({"name": "kd+nkd", "label": "two", **params.model_dump(mode="json")})
    again = Unit.model_validate_json(made.model_dump_json())
    assert again.key == made.key
    assert build_method(again.method, None).params == params
    assert json.loads(made.model_dump_json())["method"]["nkd"] == {"temperature": 3.0, "gamma": 2.0}


def test_dotted_names_are_the_leaves():
    assert dotted({"a": 1, "b": {"c": 2, "d": (3,)}}) == {"a": 1, "b.c": 2, "b.d": (3,)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("kd+nkdd", "unknown method 'nkdd' in 'kd+nkdd'; did you mean 'nkd'?"),
        ("kd+", "unknown method '' in 'kd+'; there is: "),
        ("kd+nkd+kd", "method 'kd' stands twice in 'kd+nkd+kd'"),
        ({"name": "kd+nkd", "temperature": 2}, "method 'kd+nkd': unknown key 'temperature'; there is: kd, nkd, task_weight"),
        ({"name": "kd+nkd", "dkd": {"beta": 2}}, "method 'kd+nkd': unknown key 'dkd'; did you mean 'kd'?"),
        ({"name": "kd+nkd", "nkd": {"temprature": 2}}, "method 'kd+nkd': unknown key 'nkd.temprature'; did you mean 'temperature'?"),
        ({"name": "kd+nkd", "nkd": {"gamma": -1}}, "method 'kd+nkd': nkd.gamma: expected greater than or equal to 0, got -1"),
        ({"name": "kd+nkd", "nkd": 2}, "method 'kd+nkd': nkd: expected keys with values, got 2"),
        (
            {"name": "kd+nkd", "nkd": {"task_weight": 0.5}},
            "nkd.task_weight: there is one task_weight for all parts; write it",
        ),
        ("kd+kdbench.errors:explain", "method 'kdbench.errors:explain' is no subclass of kdbench.methods.base.Method"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(value: Any, message: str):
    with pytest.raises(UserError) as caught:
        params_of(spec(value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# in an experiment

EXPERIMENT = """
name: both
task: {name: classification, data: fashion_mnist}
teacher: {model: tiny_cnn}
students: [tiny_cnn]
methods: [none, kd, METHOD]
"""


def experiment(folder: Path, method: str, *overrides: str) -> Any:
    path = folder / "both.yaml"
    path.write_text(EXPERIMENT.replace("METHOD", method))
    return load_experiment(path, overrides)


def test_an_experiment_takes_a_combination_and_sets_its_parts(tmp_path: Path):
    read = experiment(tmp_path, "vitkd+nkd", "methods.vitkd+nkd.nkd.temperature=2", "method.task_weight=0.5")
    (both,) = [method for method in read.methods if method.name == "vitkd+nkd"]
    params: Any = params_of(both)
    assert (params.nkd.temperature, params.task_weight) == (2.0, 0.5)
    assert both.label == "vitkd+nkd"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(read))
    assert load_experiment(again) == read


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kd+nkdd", "methods: unknown method 'nkdd' in 'kd+nkdd'; did you mean 'nkd'?"),
        ("nkd+nkd", "methods: method 'nkd' stands twice in 'nkd+nkd'"),
    ],
)
def test_an_experiment_names_the_part_that_is_wrong(tmp_path: Path, method: str, message: str):
    with pytest.raises(UserError) as caught:
        experiment(tmp_path, method)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_its_page_shows_the_parameters_of_all_parts():
    page = show_page("kd+nkd")
    lines = [line.split() for line in page.splitlines()]
    assert ["nkd.temperature", "3", "1", "..", "4,", "logarithmic", "float", ">", "0"] in lines
    assert sum("task_weight" in (line or [""])[0] for line in lines) == 1
    assert "+3.36" in show_page("vitkd+nkd")


def test_it_trains_and_its_record_names_parameters_by_part(tmp_path: Path):
    teacher = saved_teacher(tmp_path, model=VIT)
    alone = assemble(unit("vitkd", teacher, student=SMALL_VIT), LocalSession())
    made = unit({"name": "vitkd+nkd", "nkd": {"temperature": 1.0}}, teacher, student=SMALL_VIT, recipe={"epochs": 1})
    run = assemble(made, LocalSession())
    assert run.distiller.method.student_taps == alone.distiller.method.student_taps
    record = fit(made, LocalSession(), layout(tmp_path))
    row = record.curve[-1]
    terms = ("cross_entropy", "mimicking", "generation", "target", "nontarget")
    assert row["train_total"] == pytest.approx(sum(row[f"train_{term}"] for term in terms), rel=1e-5)
    assert record.method == "vitkd+nkd"
    assert record.params["nkd.temperature"] == 1.0


def test_a_batch_coupled_part_and_one_with_a_teacher_go_together():
    method = build_method(spec("tf_nkd+kd"), None)
    given = logits()
    wanted = TeacherFreeNKD()(given[0], None, given[2], HALF_WAY) | KD()(*given, HALF_WAY)
    torch.testing.assert_close(method(*given, HALF_WAY), wanted)


def test_taps_found_for_a_pair_are_written_into_the_part():
    found: Any = fitted(spec("ofa+kd"), *(2 * [Shapes((5,), {"stage:0": TapShape("map", (4, 3, 3))})])).params
    assert found.ofa.student_taps == ("stage:0",)
