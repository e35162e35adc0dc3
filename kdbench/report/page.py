"""A report as one HTML file that needs nothing else: no network, no other file, no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdbench import __version__
from kdbench.boards.across_pairs import SMALLEST_NUMBER_OF_PAIRS
from kdbench.boards.board import Board, Row, verdict
from kdbench.boards.formatting import interval, ranks, scaled, short
from kdbench.boards.published import PublishedFigure
from kdbench.boards.summary import THRESHOLDS, Summary, summaries
from kdbench.report import charts
from kdbench.report.budgets import after_trials
from kdbench.report.content import Page, by_protocol, trade_offs
from kdbench.report.rendering import content_data, pareto_text
from kdbench.tracking import Interface

_TEMPLATES = Path(__file__).with_name("templates")
_MINUS = "\u2212"

COST_AXES = (
    ("device_hours", "device-hours, search included", "device-hours"),
    ("latency_ms_p50", "latency, ms per image", "ms"),
    ("params_count", "parameters", "parameters"),
)
"""Of a `Row`: the field, what its axis is called, and the unit in words."""


def render_report(
    pages: Sequence[Page],
    interface: Interface,
    *,
    title: str,
    live: str | None = None,
    home: str | None = None,
    students: Sequence[Board] = (),
) -> str:
    """The report of some boards. live: the version that a server serves;
    the page asks it for newer ones. home: the address of the page above it. students: boards of students, in a section of their own."""
    return _render(
        "report.html",
        title=title,
        pages=pages,
        groups=[group for group in by_protocol(pages) if len(group) > 1],
        interface=interface,
        live=live,
        home=home,
        students=students,
    )


def render_index(pages: Sequence[Page], files: Mapping[str, str], *, title: str, students: Sequence[Board] = ()) -> str:
    """A page that leads to others: one line a board. files: by anchor. students: boards of students, shown below."""
    return _render("index.html", title=title, pages=pages, files=files, students=students)


# --- the templates and what they may call ----------------------------------------------------------------------------


def _render(template: str, *, title: str, pages: Sequence[Page], students: Sequence[Board], live: str | None = None, **more: Any) -> str:
    style, script = (Markup((_TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    across = summaries(page.board for page in pages)
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            pages=pages,
            across=across,
            fewest_pairs=SMALLEST_NUMBER_OF_PAIRS,
            style=style,
            script=script,
            policy=_policy(style, script, live is not None),
            students=students,
            data=_embedded(content_data([*(page.board for page in pages), *students], across)),
            version=__version__,
            newest=max((page.newest for page in pages), default=None),
            live=live,
            **more,
        )
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"scaled": scaled, "short": short, "percent": _percent, "plural": _plural, "quoted": shlex.quote, "value": _value}
    made.globals |= {
        "charts": charts,
        "after_trials": after_trials,
        "costs": COST_AXES,
        "interval": interval,
        "signed": _signed,
        "headline": headline,
        "diagram": diagram,
        "thresholds": THRESHOLDS,
        "settings": settings,
        "trade_offs": trade_offs,
        "differ": _differ,
        "published_cells": published_cells,
        "ranks": ranks,
        "pareto_text": pareto_text,
        "verdict": verdict,
    }
    return made


def _policy(style: str, script: str, live: bool) -> str:
    """Content-Security-Policy: nothing is loaded or run but the one style and the one script whose hashes these are."""
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    rules = [
        "default-src 'none'",
        f"style-src '{hashes[0]}'",
        f"script-src '{hashes[1]}'",
        "base-uri 'none'",
        "form-action 'none'",
        *(["connect-src 'self'"] if live else []),
    ]
    return "; ".join(rules)


def _embedded(data: Any) -> Markup:
    """JSON that can stand in a script element whatever texts it holds: no `<` and no `&` in it."""
    text = json.dumps(data, allow_nan=False, sort_keys=True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


# --- words and numbers -----------------------------------------------------------------------------------------------


def headline(page: Page) -> str:
    """What a reader should take away, in a sentence or two. Of the whole board, also where the page shows some of its rows."""
    board, leaders, figures = page.board, page.board.leaders, f".{page.board.decimals}f"
    if not leaders or leaders[0].mean is None:
        return "No method has all its seeds yet."
    first, best = leaders[0], board.best_distilled
    text = f"{first.label} has the best mean {board.primary}, {first.mean:{figures}}"
    if first.label == board.undistilled:
        text += ", without any distilling" + (f"; the best distilled is {best.label}, {best.mean:{figures}}" if best else "")
    gain, low, high = first.shown_gain
    if gain is not None:
        text += f", {_signed(gain, figures)} points over the undistilled student" + (
            f" (interval {_signed(low, figures)} to {_signed(high, figures)}, with all others at once)" if low is not None else ""
        )
    others = [row.label for row in leaders[1:]]
    if others:
        named = ", ".join(others) if len(others) <= 4 else f"{', '.join(others[:3])} and {len(others) - 3} others"
        text += f". The best may also be {named}"
    return text + "."


def diagram(summary: Summary) -> Markup | None:
    """Critical differences, where there are pairs enough for them."""
    ranks = [(row.label, row.average_rank) for row in summary.rows if row.average_rank is not None]
    return charts.critical_difference(ranks, summary.critical_difference) if summary.critical_difference is not None else None


def settings(row: Row) -> list[tuple[str, str, bool]]:
    """Parameters for display: name, value, and whether the search chose it; those that it chose first."""
    shown = [(name, _value(value), name in row.searched) for name, value in row.params.items()]
    return sorted(shown, key=lambda item: not item[2])


def published_cells(figure: PublishedFigure) -> list[str]:
    """A paper's figure as cells of a table."""
    before, after = ("–" if value is None else f"{value:.2f}" for value in (figure.before, figure.distilled))
    points = "–" if figure.points is None else _signed(figure.points, ".2f")
    return [
        figure.method,
        f"{figure.teacher or 'no teacher'} → {figure.student}",
        figure.data,
        figure.metric,
        before,
        after,
        points,
        figure.protocol or "–",
        figure.citation,
    ]


def _differ(values: Sequence[charts.Point]) -> bool:
    return len({point.cost for point in values}) > 1


def _signed(value: float | None, figures: str) -> str:
    return "–" if value is None else f"{value:+{figures}}".replace("-", _MINUS)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:z.0%}".replace("-", _MINUS)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
