"""What the pages say is what the code does: commands parse, experiments load, tables hold the keys and defaults there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdbench.boards.board import Board, Row
from kdbench.boards.summary import Summary, SummaryRow
from kdbench.cli.app import app
from kdbench.cli.pages import KINDS, show_page
from kdbench.data.views import Augment
from kdbench.experiment import CacheOptions, Experiment, Recipe, Runtime, Search, TeacherSpec, UntilDecided, load_experiment
from kdbench.methods.build import MethodSpec
from kdbench.models.build import ModelSpec
from kdbench.report.rendering import board_data, row_data, student_row_data, summary_data
from kdbench.tasks.base import Task
from kdbench.tasks.build import TaskSpec
from kdbench.tasks.classification import Classification
from kdbench.tasks.segmentation import Segmentation
from tests.pages import ROOT, Block, fenced, page_text

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/api.md",
    "docs/experiment.md",
    "docs/leaderboard.md",
    "docs/design-notes.md",
    "docs/benchmarks.md",
    "docs/faults.md",
    "docs/methods.md",
    "docs/scaling.md",
    "CHANGELOG.md",
    "clusters/README.md",
    "clusters/aws.md",
    "clusters/containers.md",
    "clusters/gcp.md",
    "clusters/kuberay/README.md",
    "clusters/slurm.md",
)

YAML = [block for page in PAGES for block in fenced(page) if block.language == "yaml"]


# --- commands --------------------------------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    """Every `kdbench ...` of the pages: indented lines, and code inside of text that has more than the name."""
    for page in PAGES:
        text = page_text(page)
        yield from (line.partition("  #")[0].strip() for line in re.findall(r"^    (kdbench .*)$", text, re.MULTILINE))
        yield from re.findall(r"`(kdbench [^`\n]+)`", text)


COMMANDS = sorted(set(_commands()))


def test_there_are_commands_to_look_at() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("line", COMMANDS)
def test_a_quoted_command_parses(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    assert name in group.commands
    if arguments:  # in running text a command's bare name may stand for it
        group.commands[name].make_context(name, arguments)  # raises for an unknown option, and what is missing or left over


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match(r"kdbench (list|show) [^A-Z]*$", line)])
def test_what_a_quoted_command_lists_or_shows_is_there(line: str) -> None:
    _, command, name, *_ = shlex.split(line)
    if command == "list":
        assert name in KINDS
    else:
        assert show_page(name).startswith(name)


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match(r"kdbench (run|tune|submit) ", line)])
def test_the_experiment_of_a_quoted_command_loads_with_what_it_sets(line: str, tmp_path: Path) -> None:
    file, *options = shlex.split(line)[2:]
    printed = {block.file_name or "my-study.yaml": block.text for block in YAML}
    path = ROOT / file
    if file in printed:
        path = tmp_path / file
        path.write_text(printed[file])
    assert load_experiment(path, [value for option, value in pairwise(options) if option == "--set"]).methods


def test_every_command_stands_in_the_readme() -> None:
    group: Any = typer.main.get_command(app)
    readme = page_text("README.md")
    assert [name for name in group.commands if f"kdbench {name}" not in readme] == []


def test_links_and_quoted_files_of_this_project_exist() -> None:
    for page in PAGES:
        text = page_text(page)
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
        assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == [], page
        files = re.findall(r"`((?:kdbench|benchmarks|clusters|tests|docs|experiments|scripts)/[\w/.-]+\.\w+)`", text)
        assert [file for file in files if not (ROOT / file).exists()] == [], page


def test_links_inside_a_page_lead_to_a_heading() -> None:
    for page in PAGES:
        text = page_text(page)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors, page


# --- experiments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"{block.page}-{block.file_name or YAML.index(block)}")
def test_a_quoted_experiment_loads(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(block.text)
    assert load_experiment(path).methods


def test_the_annotated_experiment_has_every_top_level_key() -> None:
    annotated = next(block for block in fenced("README.md") if block.language == "yaml")
    assert set(yaml.safe_load(annotated.text)) == set(Experiment.model_fields)
    assert all("#" in line for line in annotated.text.splitlines() if re.match(r"[a-z_]+: *(#|$)", line))


def test_the_readme_shows_the_board_of_the_quickstart() -> None:
    shown = re.search(r"<!-- board: .*? -->\n(.*?)<!-- /board -->", page_text("README.md"), re.DOTALL)
    assert shown is not None
    experiment = load_experiment(ROOT / "experiments" / "quickstart.yaml")
    for method in experiment.methods:
        assert re.search(rf"^\s+\d+(-\d+)?\s+{method.label}\s+\d", shown[1], re.MULTILINE), f"{method.label} has no row"


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(page: str, heading: str, number: int = 0) -> dict[str, list[str]]:
    """The cells behind each key of a section's table: `| `key` | cell | ... |`."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page_text(page), re.MULTILINE | re.DOTALL)
    assert section is not None, f"{page} has no section {heading!r}"
    tables = [part for part in re.split(r"\n\n", section[1]) if part.lstrip().startswith("| key |")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in tables[number].strip().splitlines()[2:]]
    return {row[0].strip("` "): row[1:] for row in rows}


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "needed"
    if isinstance(value, BaseModel):
        return "below"
    if isinstance(value, float) and value != round(value, 4):
        value = round(value, 4)
    if value == "":
        return "the name"  # a label that nobody set
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return f"`{text.splitlines()[0]}`"  # a lone value is followed by a line that ends the document


SECTIONS: dict[str, type[BaseModel]] = {
    "The experiment": Experiment,
    "Task": TaskSpec,
    "Teacher": TeacherSpec,
    "Models": ModelSpec,
    "Recipe": Recipe,
    "Augment": Augment,
    "Search": Search,
    "Seeds": UntilDecided,
    "Cache": CacheOptions,
    "Runtime": Runtime,
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_reference_has_every_key_and_its_default(heading: str) -> None:
    table = _table("docs/experiment.md", heading)
    assert {key: cells[0] for key, cells in table.items()} == {
        name: _default(field) for name, field in SECTIONS[heading].model_fields.items()
    }


def test_the_reference_has_the_keys_of_a_method() -> None:
    assert set(_table("docs/experiment.md", "Methods")) == set(MethodSpec.model_fields)


@pytest.mark.parametrize("task", [Classification, Segmentation])
def test_the_reference_has_the_options_that_all_tasks_share(task: type[Task]) -> None:
    fields = task.Options.model_fields
    table = _table("docs/experiment.md", "Task", 1)
    assert set(table) == set(fields)
    data = fields["data"].default.name
    assert f"`{data}`" in table["data"][0]
    assert {key: cells[0] for key, cells in table.items() if key != "data"} == {
        name: _default(field) for name, field in fields.items() if name != "data"
    }


def test_the_json_contract_has_every_key_that_is_printed() -> None:
    lists = dict.fromkeys(("pareto", "pareto_sure", "pareto_off", "better_than", "run_ids"), ())
    empty = dict.fromkeys(Row.__dataclass_fields__) | {"params": {}, "values": {}, "seeds": 0, "failed": 0, **lists}
    board = Board("p", "f", "t", "d", None, None, None, "s", "accuracy", True, None, None, None, None, None, (), (), ())
    assert list(_table("docs/leaderboard.md", "A row")) == list(row_data(Row(**empty)))
    table = _table("docs/leaderboard.md", "A board")
    assert list(table) == list(board_data(board))
    assert all(f"`{key}`" in table["teacher"][0] for key in board_data(board)["teacher"])
    assert list(_table("docs/leaderboard.md", "A row of a board of students")) == list(student_row_data(Row(**empty)))
    rows = (SummaryRow("kd", "kd", *[None] * 6),)
    summary = summary_data(Summary("f", "t", "accuracy", (), rows, None, None, ()))
    assert list(_table("docs/leaderboard.md", "Across pairs")) == list(summary)
    assert all(f"`{key}`" in _table("docs/leaderboard.md", "Across pairs")["rows"][0] for key in summary["rows"][0])
