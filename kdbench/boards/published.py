"""Figures of papers, quoted with what they were measured on. They stand beside our boards, never in them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FILE = Path(__file__).with_name("published.yaml")

Text = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class PublishedFigure(BaseModel):
    """One row of a paper's table, in the paper's unit, mostly percent.

    undistilled, distilled, gain: the student's metric without and with the method, and the difference, as far as the source says them.
    teacher: None where the method has none. epoch, seeds: which epoch was measured and how many runs it is the mean of, None where
    the source does not tell. remarks: what else differs from the method's usual protocol.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Text
    teacher: Text | None
    student: Text
    data: Text
    metric: Text
    undistilled: Number | None = None
    distilled: Number | None = None
    gain: Number | None = None
    teacher_metric: Number | None = None
    epoch: Literal["best", "last"] | None = None
    seeds: Annotated[int, Field(ge=1)] | None = None
    remarks: Text | None = None
    citation: Text

    @model_validator(mode="after")
    def _says_something_once(self) -> PublishedFigure:
        if self.distilled is None and self.gain is None:
            raise ValueError(f"{self.method}, {self.student}: neither `distilled` nor `gain`")
        if None not in (self.undistilled, self.distilled, self.gain):
            raise ValueError(f"{self.method}, {self.student}: `gain` follows from the other two; leave it out")
        if self.distilled is None and self.undistilled is not None:
            raise ValueError(f"{self.method}, {self.student}: `distilled` is missing")
        return self

    @property
    def before(self) -> float | None:
        """The undistilled student's metric, as the source says it or as it follows from the gain."""
        if self.undistilled is None and self.distilled is not None and self.gain is not None:
            return round(self.distilled - self.gain, 4)
        return self.undistilled

    @property
    def points(self) -> float | None:
        """The gain, as the source says it or as the difference of the two metrics."""
        if self.gain is None and self.distilled is not None and self.undistilled is not None:
            return round(self.distilled - self.undistilled, 4)
        return self.gain

    @property
    def protocol(self) -> str:
        """What is known of how it was measured: `best epoch, 3 seeds, at 256x192`; empty where nothing is."""
        seeds = None if self.seeds is None else f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        teacher = None if self.teacher_metric is None else f"teacher {self.teacher_metric:g}"
        return ", ".join(part for part in (self.epoch and f"{self.epoch} epoch", seeds, teacher, self.remarks) if part)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    planned: tuple[Text, ...]
    figures: tuple[PublishedFigure, ...]


def load_published() -> tuple[PublishedFigure, ...]:
    """The figures that kdbench ships, in the order of the file."""
    return _read().figures


@cache
def _read() -> _File:
    import yaml

    return _File.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
