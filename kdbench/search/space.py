"""Where to search a parameter: `Range` and `Choice`, written beside a field's default as `Annotated[float, Range(...)]`.

The search space of a method is what its `Params` fields say, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel

MOST_STEPS = 1_000_000  # of a range; a finer grid is no grid
MOST_OPTIONS = 1000


@dataclass(frozen=True)
class When:
    """This parameter exists only where the parameter `name` has one of `values`: a conditional space."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both included; whole numbers where the field is an int.

    log: where a weight spans decades. step: for a grid.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs low < high, both finite; got {self.low} .. {self.high}")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"a range of {self.low} .. {self.high} is wider than a float can hold")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0; got {self.low}")
        if self.log and self.step is not None:
            raise ValueError("a range has a step or is logarithmic, not both")
        if self.step is not None:
            self._check_step(self.step)

    def _check_step(self, step: float) -> None:
        width = self.high - self.low
        if not 0 < step <= width:
            raise ValueError(f"step must be above 0 and at most high - low, {width:g}; got {step:g}")
        if width > MOST_STEPS * step:
            raise ValueError(f"step {step:g} cuts {self.low:g} .. {self.high:g} into more than {MOST_STEPS} steps; leave step out")

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    def check_whole(self) -> None:
        """Raises ValueError where a parameter that takes whole numbers only can't be searched here."""
        if self.step is not None and self.step % 1:
            raise ValueError(f"step must be a whole number for a parameter of whole numbers; got {self.step:g}")
        if not math.ceil(self.low) < math.floor(self.high):
            raise ValueError(f"the range {self.low:g} .. {self.high:g} holds fewer than two whole numbers")


@dataclass(frozen=True)
class Choice:
    """One of a few values, without order."""

    options: tuple[Any, ...]
    when: When | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= MOST_OPTIONS:
            raise ValueError(f"a choice needs 2 to {MOST_OPTIONS} options; got {len(self.options)}")

    @property
    def ends(self) -> tuple[Any, ...]:
        """All of them, as none lies between others."""
        return self.options


Dimension = Range | Choice


@dataclass(frozen=True)
class Parameter:
    """One axis of a search: its dotted name, where to look, the default (tried first) and whether it is a whole number."""

    name: str
    dimension: Dimension
    default: Any
    integer: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """As its dimension's, whole numbers where it is one."""
        if not self.integer or isinstance(self.dimension, Choice):
            return self.dimension.ends
        return math.ceil(self.dimension.low), math.floor(self.dimension.high)


def space_of(
    params: BaseModel, fixed: frozenset[str] = frozenset(), ranges: Mapping[str, Dimension] = MappingProxyType({})
) -> tuple[Parameter, ...]:
    """The axes of `params`: each field annotated with a Range or a Choice, the field's present value as its default.

    `fixed` names fields that the user pinned: they keep their value and are not searched, and conditions on them are settled here.
    An axis with a condition comes after the axis that it looks at. A field that has fields of its own adds theirs, by dotted names.
    `ranges` says by dotted name where to look in place of what the field says; the field's condition holds there too.
    """
    searched: dict[str, Parameter] = {}
    for name, field in type(params).model_fields.items():
        for extra in field.metadata:
            if isinstance(extra, Range | Choice) and name not in fixed:
                dimension = replace(ranges[name], when=extra.when) if name in ranges else extra
                searched[name] = Parameter(name, dimension, getattr(params, name), is_whole(field.annotation))
    axes: list[Parameter] = []
    for axis in searched.values():
        _insert(axis, searched, params, axes)
    for name in type(params).model_fields:
        if isinstance(part := getattr(params, name), BaseModel):
            own = frozenset(key.removeprefix(f"{name}.") for key in fixed if key.startswith(f"{name}."))
            moved = {key.removeprefix(f"{name}."): dimension for key, dimension in ranges.items() if key.startswith(f"{name}.")}
            axes += [_under(name, axis) for axis in space_of(part, own, moved)]
    return tuple(axes)


def _under(part: str, axis: Parameter) -> Parameter:
    """The axis under the dotted name that it has outside its part, its condition too."""
    when = axis.dimension.when
    dimension = axis.dimension if when is None else replace(axis.dimension, when=replace(when, name=f"{part}.{when.name}"))
    return replace(axis, name=f"{part}.{axis.name}", dimension=dimension)


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by dotted name: `{kd: {temperature: 2}}` as `{kd.temperature: 2}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": inner for key, inner in dotted(value).items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _insert(axis: Parameter, searched: Mapping[str, Parameter], params: BaseModel, axes: list[Parameter]) -> None:
    """Append an axis, the one that its condition looks at first; none where its condition can't hold."""
    when = axis.dimension.when
    if any(placed.name == axis.name for placed in axes):
        return
    if when is None:
        axes.append(axis)
    elif when.name in searched:
        _insert(searched[when.name], searched, params, axes)
        axes.append(axis)
    elif getattr(params, when.name) in when.values:
        axes.append(replace(axis, dimension=replace(axis.dimension, when=None)))


def is_whole(annotation: Any) -> bool:
    """Whether a field of this type, such as `int` or `int | None`, takes whole numbers only."""
    kinds = set(get_args(annotation)) or {annotation}
    return int in kinds and float not in kinds


def describe(axes: tuple[Parameter, ...]) -> Mapping[str, dict[str, Any]]:
    """The space as plain data, for hashes and records."""
    return {axis.name: {"kind": type(axis.dimension).__name__.lower(), **asdict(axis.dimension), "default": axis.default} for axis in axes}
