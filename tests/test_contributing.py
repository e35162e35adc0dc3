"""The worked examples of CONTRIBUTING.md, cut out of the page and trained."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdbench import api
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.cli import app as cli
from kdbench.data.sources import DataSpec, open_source
from kdbench.errors import UserError
from kdbench.experiment import Experiment, load_experiment
from kdbench.records.store import ResultStore
from tests.pages import fenced

EXAMPLES = {name: block for block in fenced("CONTRIBUTING.md") if (name := block.file_name)}
EXPERIMENTS = sorted(name for name in EXAMPLES if name.endswith(".yaml"))
SMALL = ("recipe.epochs=1", "teacher.recipe.epochs=1", "task.transfer_size=100", "seeds=1")
SEARCHED = "retrained.yaml"  # by Ray, in processes that have to find the method


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: a folder with every example under the name that its first line gives it."""
    for name, block in EXAMPLES.items():
        (tmp_path / name).write_text(block.text)
    drawn = open_source(DataSpec.model_validate({"name": "shapes", "train": 200, "test": 40, "target": "class"}))
    arrays = {"train": drawn.train, "test": drawn.test}
    images = {f"x_{part}": arrays[part].inputs[:, 0].numpy() for part in arrays}
    np.savez(tmp_path / "toys.npz", **images, **{f"y_{part}": arrays[part].target.numpy() for part in arrays})
    boxes = open_source(DataSpec.model_validate({"name": "shapes", "train": 140, "test": 20, "size": 32, "target": "boxes"}))
    marks = {"train": boxes.train, "test": boxes.test}
    pictures = {f"images_{part}": marks[part].inputs.movedim(1, -1).numpy() for part in marks}
    columns = {f"{name}_{part}": marks[part].target[name].numpy() for part in marks for name in ("boxes", "labels")}
    np.savez(tmp_path / "marks.npz", **pictures, **columns)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in EXAMPLES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_there_is_an_example_of_each_thing_that_can_be_added() -> None:
    methods, data = {"mimic.yaml", "hint.yaml", "retrained.yaml", "zoomed.yaml"}, {"toys.yaml", "marks.yaml"}
    assert methods | data | {"patch_net.yaml", "presence.yaml", "matching.yaml"} == set(EXPERIMENTS)


def test_the_examples_import_nothing_of_kdbench_but_its_api() -> None:
    sources = {name: block.text for name, block in EXAMPLES.items() if name.endswith(".py")}
    imported = {
        (name, node.module if isinstance(node, ast.ImportFrom) else alias.name, alias.name)
        for name, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    ours = {(name, module, what) for name, module, what in imported if (module or "").startswith("kdbench")}
    assert {module for _, module, _ in ours} == {"kdbench.api"}
    assert {what for _, _, what in ours} <= set(api.__all__)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != SEARCHED])
def test_an_example_trains_as_it_is_printed(name: str, examples: Path) -> None:
    sys.path.append(str(examples))
    experiment = load_experiment(examples / name, SMALL)
    summary = run(experiment, examples / "results", Unwatched())
    assert summary.failures == ()
    assert_trained(examples, experiment)


@pytest.mark.slow
@pytest.mark.ray
def test_the_example_with_a_search_is_searched(examples: Path) -> None:
    changes = [*SMALL, "recipe.epochs=3", "search.trials=2", "search.top_k=1"]  # with an epoch in each of its stages
    options = [option for change in changes for option in ("--set", change)]
    command = [sys.executable, "-m", "kdbench.cli", "run", SEARCHED, "--results", "results", "--no-mlflow", *options]
    ended = subprocess.run(command, cwd=examples, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert_trained(examples, load_experiment(examples / SEARCHED, changes))


def assert_trained(examples: Path, experiment: Experiment) -> None:
    finals = ResultStore(examples / "results").scan(role="final")
    assert {record.label for record in finals} == {method.label for method in experiment.methods}
    assert all(record.status == "ok" and record.test_metric is not None for record in finals)
    learned = {(examples / "results" / (record.artifacts_uri or "")).read_bytes() for record in finals}
    assert len(learned) == len(experiment.methods)  # every method changes what is learned


def test_a_method_takes_under_thirty_lines() -> None:
    for name in ("mimic.py", "hint.py"):
        assert sum(bool(line.strip()) for line in EXAMPLES[name].text.splitlines()) < 30


# --- what the page promises of the frame -----------------------------------------------------------------------------


def test_the_command_finds_a_dotted_path_in_the_working_directory(
    examples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdbench", "show", "mimic:Mimic"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "arXiv 1312.6184" in capsys.readouterr().out


def test_a_method_goes_by_the_tasks_own_name_not_by_the_path_it_is_named_by(examples: Path) -> None:
    sys.path.append(str(examples))
    refused = load_experiment(examples / "presence.yaml", [*SMALL, "methods=[kd]"])
    with pytest.raises(UserError, match="kd reads class logits or imitation or pixel logits; networks of task presence give nothing"):
        run(refused, examples / "results", Unwatched())
    taken = load_experiment(
        examples / "toys.yaml", [*SMALL, 'task.name="kdbench.tasks.classification:Classification"', "methods=[kd]", "task.val_size=80"]
    )
    assert run(taken, examples / "results", Unwatched()).failures == ()
