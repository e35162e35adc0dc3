"""From what a user writes (`dkd`, or `{name: dkd, beta: 2.0}`) to a method with its parameters and its search space."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError

from kdbench.catalogue import resolve
from kdbench.data.options import LabelledSpec
from kdbench.errors import UserError, explain
from kdbench.methods import METHODS
from kdbench.methods.base import Method
from kdbench.models.outputs import Shapes
from kdbench.search_space import Parameter, space_of

NO_OVERRIDES: Mapping[str, Any] = MappingProxyType({})


class MethodSpec(LabelledSpec):
    """Which method: a name, or `{name: dkd, beta: 2.0}`. Keys beside `name` and `label` are parameters: pinned, never searched."""

    @property
    def pinned(self) -> dict[str, Any]:
        """The parameters that the user set."""
        return dict(self.model_extra or {})


def method_class(spec: MethodSpec) -> type[Method]:
    """The class behind the name. Raises UserError for an unknown name, or for a dotted path to something that is no method."""
    found = resolve("method", spec.name, METHODS)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method {spec.name!r} is no subclass of kdbench.methods.base.Method")
    return found


def params_of(spec: MethodSpec, overrides: Mapping[str, Any] = NO_OVERRIDES) -> Method.Params:
    """The method's parameters: its defaults, then what the user pinned, then `overrides` (a trial's values).

    Raises UserError, one line a problem, for an unknown key, a wrong type or a value outside the parameter's domain.
    """
    params = method_class(spec).Params
    try:
        return params.model_validate({**spec.pinned, **overrides})
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
) -> Method:
    """The method with its taps chosen for a pair, not yet built. student, teacher: every place of the two networks (`models.taps.places`).

    Raises UserError where the pair has no places that the method could compare, or the user named one that is not there.
    """
    method = build_method(spec, generator, overrides)
    return type(method)(method.choose_taps(student, teacher), generator)


def search_axes(spec: MethodSpec) -> tuple[Parameter, ...]:
    """What a search varies: the parameters with a Range or a Choice that the user did not pin."""
    return space_of(params_of(spec), fixed=frozenset(spec.pinned))


def _described(spec: MethodSpec) -> str:
    return f"method {spec.name!r}" + (f" ({spec.label})" if spec.label != spec.name else "")
