"""Defaults that a method has on networks of one kind only, and weights of sums that follow the size of the maps compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdbench.models.adapters import map_shape
from kdbench.models.outputs import Shapes, TapShape
from kdbench.search.space import Dimension, Range

Counted = Literal["channels", "channels + positions", "values"]
# What a task's networks give -> parameter -> its default there: a value, or a `PerElement`.
Presets = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PerElement:
    """The weight of a loss that is a sum over the elements of a map. The published weight belongs to maps of one size.

    On maps of another size the default is the published weight times `of`, over the elements that there are. So an element counts as much
    as it does for the authors.

    Attributes:
        weight: The published one.
        counted: What the sum grows with, of a map [C, H, W]: its C channels, its C + H * W channels and positions, or its C * H * W values.
        of: How many of these the authors' finest map has.
        within: A search looks from the default divided by this to the default times this, on a logarithmic scale.
    """

    weight: float
    counted: Counted
    of: int
    within: float = 10.0

    def on(self, finest: TapShape) -> tuple[float, Range]:
        """Default and range where `finest` is the largest of the teacher's maps that are compared."""
        channels, height, width = map_shape(finest)
        positions = height * width
        there = {"channels": channels, "channels + positions": channels + positions, "values": channels * positions}[self.counted]
        default = self.weight * self.of / there
        return default, Range(default / self.within, default * self.within, log=True)


def preset_for(presets: Presets, gives: frozenset[str], student: Shapes) -> Mapping[str, Any]:
    """The first of `presets` whose key the networks give: the task says so, or the student's prediction has a tensor of this name."""
    given = gives | (student.prediction.keys() if isinstance(student.prediction, dict) else frozenset())
    return next((values for key, values in presets.items() if key in given), {})


def placed(preset: Mapping[str, Any], teacher: Iterable[TapShape]) -> tuple[dict[str, Any], dict[str, Dimension]]:
    """A preset's defaults for maps of these shapes, and the ranges of those parameters that are `PerElement`.

    Raises UserError where a `PerElement` meets a tap that can't be read as a map.
    """
    values: dict[str, Any] = {}
    ranges: dict[str, Dimension] = {}
    shapes = tuple(teacher)
    for name, default in preset.items():
        if isinstance(default, PerElement):
            if shapes:
                values[name], ranges[name] = default.on(max(shapes, key=_positions))
        else:
            values[name] = default
    return values, ranges


def _positions(shape: TapShape) -> int:
    _, height, width = map_shape(shape)
    return height * width
