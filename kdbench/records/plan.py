"""How many finals a board was meant to have, fixed before the first of them: what its intervals count on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field

UNDISTILLED = "none"
CONTROL = "kd"
AT_DEFAULT = "@default"  # how the labels of finals end that were trained at a method's published default beside the tuned ones
AT_COST = "@cost"  # and of those of `none`, trained for as long as a method took in all
MOST_TIMES = 50  # as many epochs as an ordinary training has these may have; the board says where that cut them short
LEVELS = {1: (0.05,), 2: (0.02, 0.03), 3: (0.01, 0.015, 0.025), 4: (0.0125,) * 4}  # of each look, by how many there are; 5% in all


class Plan(BaseModel):
    """The seeds of a board's rows.

    seeds: of every row; where there are several looks, at the first; where there are several searches, of each of them. control_seeds: of
    `none` and `kd`. looks: how many seeds the rows have that are undecided until then, in ascending order; empty where all rows have the
    same seeds. matters: a lead over kd, in the unit of the metric, below which a method is called no better. searches: of each method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: int = Field(ge=1)
    control_seeds: int = Field(ge=1)
    looks: tuple[int, ...] = Field(default=(), max_length=max(LEVELS))
    matters: float | None = Field(default=None, gt=0)
    searches: int = Field(default=1, ge=1)

    @property
    def most(self) -> int:
        """Finals that a row may have."""
        return max((*self.looks, self.seeds * self.searches))

    @property
    def levels(self) -> tuple[float, ...]:
        """The probability with which all intervals of each look hold at once."""
        return tuple(1 - alpha for alpha in LEVELS[len(self.looks)]) if self.looks else ()


def doubled(start: int, most: int) -> tuple[int, ...]:
    """The looks from `start` seeds on, each at twice as many as the one before, the last at `most`."""
    looks = [start]
    while looks[-1] < most:
        looks.append(min(2 * looks[-1], most))
    return tuple(looks)


def control_of(rows: Iterable[tuple[str, str]], method: str) -> str | None:
    """The label of the row that stands for `none` or `kd`: that label itself, else that of the only row with this method.

    rows: label and method of each.
    """
    of_method = [label for label, name in rows if name == method]
    labelled = [label for label in of_method if label == method]
    return next(iter(labelled or (of_method if len(of_method) == 1 else [])), None)


def controls_of(rows: Sequence[tuple[str, str]]) -> frozenset[str]:
    """The labels of both controls, as far as they are there. rows: label and method of each."""
    return frozenset(label for method in (UNDISTILLED, CONTROL) if (label := control_of(rows, method)) is not None)
