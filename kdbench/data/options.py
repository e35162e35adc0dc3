"""What pydantic found wrong with somebody's options, in one readable line."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from kdbench.catalogue import nearest

_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}


def first_problem(error: ValidationError, names: Iterable[str]) -> str:
    """`no option 'sizze'; did you mean 'size'?`, `option 'x' is missing` or `option 'size': what was expected, got what`.

    names: the options there are.
    """
    problem = error.errors()[0]
    option = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] in _UNKNOWN:
        return f"no option {option!r}{nearest(option, names)}"
    if problem["type"] in _MISSING:
        return f"option {option!r} is missing"
    expected = problem["msg"].removeprefix("Value error, ")
    return f"option {option!r}: {expected[0].lower()}{expected[1:]}, got {problem['input']!r}"
