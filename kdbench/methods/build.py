"""From what a user writes (`dkd`, `{name: dkd, beta: 2.0}`, `vitkd+nkd`) to a method with its parameters and its search space."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError

from kdbench.catalogue import known, nearest, resolve
from kdbench.data.options import LabelledSpec
from kdbench.errors import UserError, explain, shown
from kdbench.methods import METHODS
from kdbench.methods.base import Method
from kdbench.methods.combination import combined
from kdbench.models.outputs import Shapes
from kdbench.search.space import Parameter, dotted, space_of

PLUS = "+"  # between the names of methods that are used together
NO_OVERRIDES: Mapping[str, Any] = MappingProxyType({})


class MethodSpec(LabelledSpec):
    """Which method: a name, or `{name: dkd, beta: 2.0}`. Keys beside `name` and `label` are parameters: pinned, never searched.

    A name such as `vitkd+nkd` is several methods at once, with parameters by part: `{name: vitkd+nkd, nkd: {temperature: 1.0}}`.
    """

    @property
    def pinned(self) -> dict[str, Any]:
        """The parameters that the user set."""
        return dict(self.model_extra or {})


def method_class(spec: MethodSpec) -> type[Method]:
    """The class behind the name. Raises UserError for an unknown name, or for a dotted path to something that is no method."""
    check_method_name(spec.name)
    kinds = tuple((name, _class_called(name)) for name in spec.name.split(PLUS))
    return kinds[0][1] if len(kinds) == 1 else combined(kinds)


def method_code(spec: MethodSpec) -> list[type[Method]]:
    """The classes that a method is made of: one, or each part of several at once."""
    return [_class_called(name) for name in spec.name.split(PLUS)]


def _class_called(name: str) -> type[Method]:
    found = resolve("method", name, METHODS)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method {shown(name)} is no subclass of kdbench.methods.base.Method")
    return found


def check_method_name(name: str) -> None:
    """Raise UserError where no method is called so, or of several joined by `+` one is not known or stands twice. Imports none of them."""
    parts = name.split(PLUS)
    where = f" in {shown(name)}" if len(parts) > 1 else ""
    for part in parts:
        if not known("method", part, METHODS):
            raise UserError(f"unknown method {shown(part)}{where}{nearest(part, METHODS)}")
        if parts.count(part) > 1:
            raise UserError(f"method {shown(part)} stands twice{where}; a method can be combined with others, not with itself")


def params_of(spec: MethodSpec, overrides: Mapping[str, Any] = NO_OVERRIDES) -> Method.Params:
    """The method's parameters: its defaults, then what the user pinned, then `overrides` (a trial's values, by dotted name).

    Raises UserError, one line a problem, for an unknown key, a wrong type or a value outside the parameter's domain.
    """
    params = method_class(spec).Params
    values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in spec.pinned.items()}
    for name, value in overrides.items():
        part, dot, own = name.rpartition(".")
        (values.setdefault(part, {}) if dot else values)[own] = value
    try:
        return params.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, _described(spec), params)) from error


def build_method(spec: MethodSpec, generator: torch.Generator | None, overrides: Mapping[str, Any] = NO_OVERRIDES) -> Method:
    """The method itself, not yet built for a pair. Parameters and errors are those of `params_of`.

    generator: the source of any randomness inside the loss.
    """
    return method_class(spec)(params_of(spec, overrides), generator)


def fitted(
    spec: MethodSpec,
    student: Shapes,
    teacher: Shapes | None,
    generator: torch.Generator | None = None,
    overrides: Mapping[str, Any] = NO_OVERRIDES,
    gives: frozenset[str] = frozenset(),
) -> Method:
    """The method with its taps chosen for a pair and the defaults that suit it, not yet built.

    student, teacher: every place of the two networks (`models.taps.places`). gives: what the task's networks give (`Task.gives`).

    Raises UserError where the pair has no places that the method could compare, or the user named one that is not there.
    """
    method = _tapped(spec, student, teacher, generator, overrides)
    params, _ = method.suited(student, teacher, gives)
    return method if params == method.params else type(method)(params, generator)


def search_axes(
    spec: MethodSpec, student: Shapes | None = None, teacher: Shapes | None = None, gives: frozenset[str] = frozenset()
) -> tuple[Parameter, ...]:
    """What a search varies: the parameters with a Range or a Choice that the user did not pin.

    For a pair, as `fitted` gets it, with the defaults and ranges that suit it; without one as `Params` says.
    """
    fixed = frozenset(dotted(spec.pinned))
    if student is None:
        return space_of(params_of(spec), fixed)
    params, ranges = _tapped(spec, student, teacher, None, NO_OVERRIDES).suited(student, teacher, gives)
    return space_of(params, fixed, ranges)


def _tapped(
    spec: MethodSpec, student: Shapes, teacher: Shapes | None, generator: torch.Generator | None, overrides: Mapping[str, Any]
) -> Method:
    """The method with its taps chosen for a pair."""
    method = build_method(spec, generator, overrides)
    chosen = method.choose_taps(student, teacher)
    return method if chosen == method.params else type(method)(chosen, generator)


def _described(spec: MethodSpec) -> str:
    return f"method {shown(spec.name)}" + (f" ({spec.label})" if spec.label != spec.name else "")
