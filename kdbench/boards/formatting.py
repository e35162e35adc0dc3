"""How figures read, the same in the terminal, in Markdown, in LaTeX and in explanations.

`kdbench list` imports this file, which waits for neither numpy nor pyarrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNKNOWN = "-"
COLOURS = {1: "green", -1: "red", 0: ""}  # of a verdict, in a terminal


def interval(middle: float | None, low: float | None, high: float | None, spec: str) -> str:
    """`91.05 [90.41, 91.69]`, the numbers written as `spec` says; without ends where there are none."""
    if middle is None:
        return UNKNOWN
    return f"{middle:{spec}}" if low is None or high is None else f"{middle:{spec}} [{low:{spec}}, {high:{spec}}]"


def together_data(name: str, difference: Any) -> dict[str, float | None]:
    """The difference whose interval holds together with those of the other rows, as keys of JSON; null where there is none."""
    ends = ("middle", "low", "high", "p")
    values = (None if difference is None else getattr(difference, end) for end in ends)
    return dict(zip((f"{name}_all", *(f"{name}_all_{end}" for end in ends[1:])), map(finite, values), strict=True))


def short(value: Any) -> str:
    """A number to three figures, anything else as it is."""
    if value is None:
        return UNKNOWN
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ranks(low: int | None, high: int | None) -> str:
    """`1`, or `1-3` where any of these may be the rank."""
    if low is None:
        return UNKNOWN
    return str(low) if high in (None, low) else f"{low}-{high}"


def scaled(count: int | None) -> str:
    """1234567 as 1.23M."""
    if count is None:
        return UNKNOWN
    power = min((len(str(abs(count))) - 1) // 3, 4)
    return f"{count / 1000**power:.3g}{['', 'k', 'M', 'G', 'T'][power]}"


def finite(value: Any) -> Any:
    """The value as strict JSON can hold it: null for nan and for infinity, inside of lists and mappings too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
