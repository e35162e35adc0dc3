"""Figures of papers, quoted with what they were measured on. They stand beside our boards, never in them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

FILE = Path(__file__).with_name("published.yaml")


class PublishedFigure(BaseModel):
    """One row of a paper's table. `undistilled` and `distilled` are the student's metric in the paper's unit, mostly percent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    teacher: str | None  # None: the method has no teacher
    student: str
    data: str
    metric: str
    undistilled: float
    distilled: float
    citation: str


@cache
def load_published() -> tuple[PublishedFigure, ...]:
    """The figures that kdbench ships, in the order of the file."""
    import yaml

    return tuple(PublishedFigure(**entry) for entry in yaml.safe_load(FILE.read_text(encoding="utf-8")))
