"""A thing named with options of its own, as an experiment writes it, and what was wrong with the options in one readable line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kdbench.catalogue import nearest

_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}


class NamedSpec(BaseModel):
    """A name, or a mapping with `name` and any options: whoever resolves the name checks them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options_json(self) -> str:
        """The options as JSON with sorted keys: a key to cache by."""
        return json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)


def first_problem(error: ValidationError, names: Iterable[str]) -> str:
    """`no option 'sizze'; did you mean 'size'?`, `option 'x' is missing` or `option 'size': what was expected, got what`.

    names: the options there are.
    """
    problem = error.errors()[0]
    place = [str(step) for step in problem["loc"]]
    option = ".".join(place)
    if problem["type"] in _UNKNOWN:
        return f"no option {option!r}{nearest(option, names) if len(place) == 1 else ''}"
    if problem["type"] in _MISSING:
        return f"option {option!r} is missing"
    option = place[0] if place else ""  # behind it a union's place names its branches, which nobody wrote
    expected = problem["msg"].removeprefix("Value error, ")
    return f"option {option!r}: {expected[0].lower()}{expected[1:]}, got {problem['input']!r}"
