"""The public surface: what it holds, that its page says so, and that a training calls a method's hooks when the page says."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kdbench import api
from kdbench.api import Batch, Experiment, Method, OwnOptimizer, Paper, Progress, Stage, Task
from kdbench.training.loop import fit
from kdbench.training.session import LocalSession
from tests.pages import fenced, page_text
from tests.training.units import layout, saved_teacher, unit

PAGE = page_text("docs/api.md")


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    below = iter(PAGE.partition(f"## {heading}\n")[2].splitlines())
    next(line for line in below if line.startswith("|---"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in takewhile(bool, below)]


def names_in(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def hooks_of(kind: type[Any]) -> set[str]:
    """What a subclass may override: methods and properties without an underscore that are the class's own."""
    return {
        name
        for name, found in vars(kind).items()
        if not name.startswith("_") and (callable(found) or isinstance(found, property | classmethod))
    }


def test_the_page_lists_the_whole_surface() -> None:
    assert sorted(name for row in rows_below("What is in it") for name in names_in(row[1])) == sorted(api.__all__)
    assert len(set(api.__all__)) == len(api.__all__)


def made_here(name: str) -> bool:
    """Whether it is a class or a function, and no type alias or constant."""
    return inspect.isclass(getattr(api, name)) or inspect.isfunction(getattr(api, name))


@pytest.mark.parametrize("name", [*filter(made_here, api.__all__)])
def test_everything_has_a_docstring_of_its_own(name: str) -> None:
    found = getattr(api, name)
    assert found.__doc__
    assert not found.__doc__.startswith(f"{name}("), "made by dataclass"
    if not inspect.isclass(found) or issubclass(found, Exception):
        return
    own = {hook: value for hook, value in vars(found).items() if inspect.isfunction(value) and not hook.startswith("_")}
    said = [found, api.Kind, api.Watch]  # protocols, which their implementations do not name as bases
    assert [hook for hook in own if not any(inspect.getdoc(getattr(kind, hook, None)) for kind in said)] == []


def test_importing_it_starts_no_ray_and_no_mlflow() -> None:
    code = "import sys, kdbench.api; print(*{'ray', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_page_has_every_hook_of_a_method_and_of_a_task() -> None:
    listed = {name for row in rows_below("The hooks of a method") for name in names_in(row[0])}
    questions = set(names_in(PAGE.partition("answer questions")[0].rpartition("\n\n")[2]))
    assert listed | questions == (hooks_of(Method) | {"forward"}) - {"Params"}
    assert not listed & questions
    tasks = {name for row in rows_below("The hooks of a task") for name in names_in(row[0])}
    assert tasks == hooks_of(Task) - {"Options"}


def test_the_example_runs_an_experiment_and_reads_its_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    [block] = fenced("docs/api.md")
    experiment = """
name: small
task: {name: classification, data: {name: shapes, target: class, train: 60, test: 20, size: 16}, val_size: 20}
teacher: {model: tiny_cnn, recipe: {epochs: 1}}
students: [{name: tiny_cnn, width: 4}]
methods: [none, kd]
recipe: {epochs: 1, batch_size: 20}
seeds: 1
"""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.yaml").write_text(experiment)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block.text, found)
    assert isinstance(found["experiment"], Experiment)
    assert found["summary"].trained == 9, "the teacher, and two controls on four seeds"
    printed = capsys.readouterr().out
    assert printed.startswith("tiny_cnn [(")
    assert {"'none'", "'kd'"} <= set(re.findall(r"'\w+'", printed))


class Noting(Method):
    """Notes each call of a hook, and what the page says of it."""

    paper = Paper("test")
    needs_teacher_network = True
    batch_coupled = True
    called: ClassVar[list[str]] = []
    grounds: ClassVar[dict[str, set[tuple[bool, bool]]]] = {}

    def note(self, hook: str) -> None:
        if Noting.called[-1:] != [hook]:
            Noting.called.append(hook)
        Noting.grounds.setdefault(hook, set()).add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    @property
    def taps_chosen(self) -> bool:
        return False

    def choose_taps(self, student: Any, teacher: Any) -> Method.Params:
        self.note("choose_taps")
        assert {"stage:-1", "pooled"} <= student.taps.keys() | teacher.taps.keys(), "every place"
        return self.params

    @property
    def peer_count(self) -> int:
        self.note("peer_count")
        return 0

    def build(self, student: Any, teacher: Any, task: Any) -> None:
        self.note("build")
        self.part = nn.Linear(2, 2)
        assert not hasattr(self, "teacher_seen")

    def use_teacher(self, network: nn.Module, example: Any) -> None:
        self.note("use_teacher")
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        self.teacher_seen = [network]

    def use_samples(self, samples: Any) -> None:
        self.note("use_samples")
        assert len(samples) == 300, "the transfer part"

    def adapt_student(self, student: nn.Module) -> nn.Module:
        self.note("adapt_student")
        return student

    def own_optimizers(self) -> tuple[OwnOptimizer, ...]:
        self.note("own_optimizers")
        return (OwnOptimizer(self.part, {}, by_method=True),)

    def use_optimizers(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        self.note("use_optimizers")
        assert len(optimizers) == 1

    def stages(self) -> tuple[Stage, ...]:
        return Stage("one", 0.5), Stage("two", 0.5)

    def begin(self, stage: int, student: nn.Module) -> nn.Module:
        self.note("begin")
        return student

    def shown(self, batch: Batch, at: Progress) -> Batch:
        self.note("shown")
        return batch

    def task_weight(self, at: Progress) -> float:
        self.note("task_weight")
        return 1.0

    def forward(self, s: Any, t: Any, batch: Batch, at: Progress) -> dict[str, Tensor]:
        self.note("forward")
        return {"none": 0.0 * s.logits.float().sum()}

    def export_student(self, student: nn.Module) -> nn.Module:
        self.note("export_student")
        return student


def test_a_training_calls_the_hooks_in_the_order_of_the_page(tmp_path: Path) -> None:
    listed = [name for row in rows_below("The hooks of a method") for name in names_in(row[0])]
    Noting.called, Noting.grounds = [], {}
    of = unit("tests.test_api:Noting", saved_teacher(tmp_path), student={"name": "tiny_cnn", "width": 4}, recipe={"precision": "bf16"})
    fit(of, LocalSession(), layout(tmp_path))
    assert list(dict.fromkeys(Noting.called)) == listed
    assert [Noting.called.count(once) for once in ("build", "use_teacher", "use_samples", "adapt_student", "begin", "export_student")] == [
        1
    ] * 6
    assert Noting.grounds["shown"] == Noting.grounds["forward"] == {(True, False)}, "gradients enabled, outside autocast"
    again = Noting.called[Noting.called.index("begin") :]
    assert again[1:3] == ["own_optimizers", "use_optimizers"]
