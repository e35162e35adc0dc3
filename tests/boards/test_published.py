"""Published figures are data: strict, about methods that exist or are planned, and apart from what kdbench measured."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from kdbench.boards.published import FILE, PublishedFigure, load_published
from kdbench.methods import METHODS

PLANNED: list[str] = yaml.safe_load(FILE.read_text(encoding="utf-8"))["planned"]
ROW = {
    "method": "nkd",
    "teacher": "resnet34",
    "student": "resnet18",
    "data": "ImageNet-1k",
    "metric": "top1",
    "undistilled": 69.9,
    "distilled": 71.96,
    "citation": "somewhere",
}


def test_every_figure_is_of_a_method_that_is_there_or_planned() -> None:
    named = {part for figure in load_published() for part in figure.method.split("+")}
    assert named <= {*METHODS, *PLANNED}


def test_no_method_is_planned_that_is_there_already() -> None:
    assert not set(PLANNED) & set(METHODS)


def test_what_is_planned_has_figures() -> None:
    assert set(PLANNED) <= {figure.method for figure in load_published()}


def test_no_figure_stands_twice() -> None:
    figures = [figure.model_dump_json() for figure in load_published()]
    assert len(set(figures)) == len(figures) > 90


def test_the_figures_of_the_abstracts_are_there() -> None:
    def of(method: str, student: str, citation: str = "arXiv") -> list[tuple[float | None, float | None, float | None]]:
        rows = [f for f in load_published() if (f.method, f.student) == (method, student) and citation in f.citation]
        return [(row.before, row.distilled, row.points) for row in rows]

    assert of("nkd", "resnet18") == [(69.9, 71.96, 2.06)]
    assert of("vitkd+nkd", "deit_base") == [(81.76, 85.41, 3.65)]
    assert of("scalekd", "mixer_b16") == [(76.44, 81.96, 5.52)]
    assert of("uskd", "mobilenet") == [(None, None, 1.17)]
    assert of("ffsd", "wrn_40_2", "FFSD") == [(None, 79.13, None)]


def test_a_method_without_a_teacher_quotes_none() -> None:
    teachers = {figure.method: figure.teacher for figure in load_published()}
    assert [teachers[method] for method in ("tf_nkd", "uskd", "ffsd")] == [None, None, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distiled": 1.0}, "Extra inputs"),
        ({"distilled": "71.96"}, "valid number"),
        ({"distilled": float("nan")}, "finite number"),
        ({"citation": ""}, "at least 1 character"),
        ({"gain": 2.06}, "follows from the other two"),
        ({"distilled": None}, "neither `distilled` nor `gain`"),
        ({"distilled": None, "gain": 2.06}, "`distilled` is missing"),
        ({"seeds": 0}, "greater than or equal to 1"),
        ({"epoch": "middle"}, "'best' or 'last'"),
    ],
)
def test_a_row_that_is_wrong_is_refused(change: dict[str, object], reason: str) -> None:
    assert PublishedFigure.model_validate(ROW).points == 2.06
    with pytest.raises(ValidationError, match=reason):
        PublishedFigure.model_validate(ROW | change)


def test_what_is_known_of_the_protocol_is_told_in_one_line() -> None:
    known = PublishedFigure.model_validate(ROW | {"epoch": "best", "seeds": 3, "teacher_metric": 73.3, "remarks": "200 epochs"})
    assert known.protocol == "best epoch, 3 seeds, teacher 73.3, 200 epochs"
    assert PublishedFigure.model_validate(ROW).protocol == ""


def test_the_file_is_the_only_place_that_quotes_papers_results() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in FILE.parents[1].rglob("*.py")}
    assert [path.name for path, text in sources.items() if "71.96" in text] == []
