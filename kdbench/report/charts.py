"""The report's charts, from numbers to SVG. Every mark says its numbers on hover and focus; what a colour says, a shape says too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from kdbench.boards.stats import hypervolume, pareto_front
from kdbench.report.searches import Search
from kdbench.report.svg import (
    MARKERS,
    Box,
    Scale,
    chart,
    element,
    free_places,
    line,
    mark,
    marker,
    percent,
    scale_of,
    spread,
    x_axis,
    y_axis,
)

COLOURS = 8  # the style sheet has so many; the dashes of lines change after each round
_DASHES = (None, "7 3", "2 3", "9 3 2 3")
_SPAN_FOR_LOG = 20.0  # the largest over the smallest cost from which a logarithmic axis shows more
_NARROW = 330.0  # pixels that a plot is wide on a narrow screen
_LONGEST_NAME = 17  # characters that fit beside the curves
_MOST_STOPS = 25  # points of one curve that hover can find

Verdict = Literal["better", "worse", "unclear"]
VERDICTS: dict[int, Verdict] = {1: "better", -1: "worse", 0: "unclear"}
"""By what `boards.board.verdict` says."""


# --- differences with their intervals --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One method's difference to a control, in points, positive for better; the ends are None for a single seed.

    verdict: what may be said of its sign. remark: more that its tip says.
    """

    label: str
    number: int
    middle: float
    low: float | None
    high: float | None
    verdict: Verdict
    remark: str = ""


def difference_scale(differences: Sequence[Difference]) -> Scale:
    """A scale that all intervals and 0 lie on."""
    return scale_of([0.0, *(v for d in differences for v in (d.middle, d.low, d.high) if v is not None)], margin=0.06)


def whisker(scale: Scale, difference: Difference) -> Markup:
    """The interval as a line, its middle as a triangle up (surely better), down (surely worse) or a circle (can't be told)."""
    height, said = 26, difference.verdict
    shape = {"better": "triangle", "worse": "inverted", "unclear": "circle"}[said]
    parts = [element("line", x1=percent(scale(0)), x2=percent(scale(0)), y1=0, y2=height, class_="zero")]
    if difference.low is not None and difference.high is not None:
        ends = {"x1": percent(scale(difference.low)), "x2": percent(scale(difference.high))}
        parts.append(element("line", **ends, y1=height / 2, y2=height / 2, class_=f"interval {said}"))
    parts.append(marker(shape, percent(scale(difference.middle)), height / 2, 6, f"dot {said}"))
    return element("svg", *parts, height=height, width="100%", class_="whisker", aria_hidden="true")


def difference_axis(scale: Scale, title: str) -> Markup:
    return element("svg", x_axis(scale, 1, title), height=44, width="100%", class_="whisker", aria_hidden="true")


# --- quality against cost --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A method on a student: what it costs and how good it is. group: the student's number, which decides the marker's shape."""

    method: str
    name: str
    number: int
    cost: float
    quality: float
    low: float | None
    high: float | None
    group: int = 0


def on_front(points: Sequence[Point], higher_is_better: bool) -> list[bool]:
    """Which points no other one beats in both quality and cost."""
    sign = 1.0 if higher_is_better else -1.0
    return pareto_front([(sign * point.quality, -point.cost) for point in points])


def with_front(points: Sequence[Point], higher_is_better: bool) -> list[tuple[Point, bool]]:
    """The points, cheapest first, each with whether it is on the front."""
    return sorted(zip(points, on_front(points, higher_is_better), strict=True), key=lambda pair: pair[0].cost)


def front_shares(points: Sequence[Point], higher_is_better: bool) -> list[tuple[str, float]]:
    """Each method's share of the hypervolume that all methods' points dominate together, in [0, 1], best first.

    The reference point lies a tenth of the range below the worst quality and above the highest cost, so that these count too. 1 is a method
    whose own students, by themselves, offer as much as all methods' do.
    """
    sign = 1.0 if higher_is_better else -1.0
    values = {point: (sign * point.quality, -point.cost) for point in points}
    axes = list(zip(*values.values(), strict=True))
    reference = [min(axis) - 0.1 * (max(axis) - min(axis)) for axis in axes]
    together = hypervolume(list(values.values()), reference)
    if together == 0:
        return []
    methods = dict.fromkeys(point.method for point in points)
    shares = {name: hypervolume([value for point, value in values.items() if point.method == name], reference) for name in methods}
    return sorted(((name, share / together) for name, share in shares.items()), key=lambda found: -found[1])


def shape_name(group: int) -> str:
    """The marker of a student."""
    return {"inverted": "triangle down", "triangle": "triangle up"}.get(shape := MARKERS[group % len(MARKERS)], shape)


def trade_off(points: Sequence[Point], cost: str, unit: str, primary: str, higher_is_better: bool) -> Markup:
    """Quality over cost, with the Pareto front as a dashed line and its points named.

    cost: in words, such as "device-hours". unit: what stands behind a number in the tips. Needs at least one point.
    """
    height = 300
    xs = scale_of([point.cost for point in points], margin=0.1, log_from=_SPAN_FOR_LOG)
    ys = scale_of([v for p in points for v in (p.quality, p.low, p.high) if v is not None])
    front = on_front(points, higher_is_better)
    parts = [y_axis(ys, height), x_axis(xs, height, cost + (", logarithmic" if xs.log else ""))]
    best = sorted((point for point, is_on in zip(points, front, strict=True) if is_on), key=lambda point: point.cost)
    steps = [(xs(best[0].cost), height * (1 - ys(best[0].quality)))]
    for point in best[1:]:
        steps += [(xs(point.cost), steps[-1][1]), (xs(point.cost), height * (1 - ys(point.quality)))]
    parts.append(line([*steps, (1.0, steps[-1][1])], height, "front"))
    names = _names(points, front, xs, ys, height)
    for point, is_on, name in sorted(zip(points, front, names, strict=True), key=lambda drawn: drawn[1]):
        parts.append(_point(point, is_on, name, xs, ys, height, unit, primary))
    label = f"{primary} against {cost}, {len(points)} methods; on the Pareto front: {', '.join(point.name for point in best)}"
    return chart(*parts, height=height, label=label)


def _names(points: Sequence[Point], front: Sequence[bool], xs: Scale, ys: Scale, height: int) -> list[Markup]:
    """The names of the points on the front, as many as a narrow screen has room for; the others have their numbers, as all have."""
    places = [(_NARROW * xs(point.cost), height * (1 - ys(point.quality))) for point in points]
    spots = [Box(x - 10, y - 10, x + 10, y + 10) for x, y in places]
    chosen = [i for i, is_on in enumerate(front) if is_on]
    found = free_places([points[i].name for i in chosen], [places[i] for i in chosen], spots, _NARROW + 10)
    names = [Markup("")] * len(points)
    for i, place in zip(chosen, found, strict=True):
        if place is not None:
            side, offset = place
            dx, class_ = (12, "name") if side == "start" else (-12, "name end")
            at = {"x": percent(xs(points[i].cost)), "y": round(places[i][1] + offset, 1)}
            names[i] = element("text", points[i].name, **at, dx=dx, dy="0.35em", class_=class_)
    return names


def _point(point: Point, is_on: bool, name: Markup, xs: Scale, ys: Scale, height: int, unit: str, primary: str) -> Markup:
    x, y = percent(xs(point.cost)), round(height * (1 - ys(point.quality)), 1)
    tip = f"{point.name}: {primary} {point.quality:.4g}"
    parts = []
    if point.low is not None and point.high is not None:
        tip += f" [{point.low:.4g}, {point.high:.4g}]"
        ends = {"y1": round(height * (1 - ys(point.low)), 1), "y2": round(height * (1 - ys(point.high)), 1)}
        parts.append(element("line", x1=x, x2=x, **ends, class_="error"))
    parts.append(marker(MARKERS[point.group % len(MARKERS)], x, y, 9, "spot on-front" if is_on else "spot"))
    parts.append(element("text", str(point.number), x=x, y=y, dy="0.35em", class_="inside on-front" if is_on else "inside"))
    tip += f", {point.cost:.4g} {unit}" + ("; on the Pareto front" if is_on else "")
    return mark(*parts, name, method=point.method, tip=tip)


# --- learning curves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The validation metric of a method by epoch, the mean over its seeds; or the best one by the trials of its search.

    epochs: or trials.
    """

    method: str
    number: int
    epochs: tuple[float, ...]
    values: tuple[float, ...]


def learning_curves(curves: Sequence[Curve], primary: str, step: str = "epoch") -> Markup:
    """All methods' curves, each named at its end. The scale begins where the last three quarters lie: first epochs may run out below.

    step: what the curves go on by, `epoch` or `trial`.
    """
    height = 320
    late = [v for c in curves for v in c.values[len(c.values) // 4 :]]
    xs, ys = Scale(min(c.epochs[0] for c in curves), max(c.epochs[-1] for c in curves), whole=True), scale_of(late)
    if xs.low == xs.high:
        xs = Scale(xs.low - 1, xs.high, whole=True)
    ends = spread([height * (1 - min(1.0, max(0.0, ys(c.values[-1])))) for c in curves], 15, height - 4)
    parts = [y_axis(ys, height), x_axis(xs, height, step)]
    parts += [_curve(curve, index, end, xs, ys, height, primary, step) for index, (curve, end) in enumerate(zip(curves, ends, strict=True))]
    return chart(*parts, height=height, label=f"validation {primary} by {step}, {len(curves)} methods", names="right")


def _curve(curve: Curve, index: int, end: float, xs: Scale, ys: Scale, height: int, primary: str, step: str) -> Markup:
    """What lies below the scale is cut off."""
    path = [(xs(epoch), height * (1 - ys(value))) for epoch, value in zip(curve.epochs, curve.values, strict=True)]
    colour, dash = f"colour-{index % COLOURS}", _DASHES[index // COLOURS % len(_DASHES)]
    name = curve.method if len(curve.method) <= _LONGEST_NAME else f"{curve.method[: _LONGEST_NAME - 1]}…"
    shown = [
        line(path, height, f"curve {colour}", stroke_dasharray=dash),
        element("text", f"{curve.number} {name}", x="100%", dx=8, y=end, dy="0.35em", class_=f"name {colour}"),
    ]
    stops = [*range(0, len(path), math.ceil(len(path) / _MOST_STOPS)), len(path) - 1]
    shown += [
        element("circle", cx=percent(path[i][0]), cy=round(path[i][1], 1), r=7, class_="stop", data_tip=_at_step(curve, i, primary, step))
        for i in dict.fromkeys(stops)
        if 0 <= path[i][1] <= height
    ]
    tip = f"{curve.method}: {primary} {curve.values[-1]:.4g} after {curve.epochs[-1]:g} {step}s, {curve.values[0]:.4g} after the first"
    return mark(*shown, method=curve.method, tip=tip)


def _at_step(curve: Curve, position: int, primary: str, step: str) -> str:
    return f"{curve.method}, {step} {curve.epochs[position]:g}: {primary} {curve.values[position]:.4g}"


# --- searches --------------------------------------------------------------------------------------------------------


def search_history(label: str, search: Search, primary: str) -> Markup:
    """Trials in their order: filled where finished, hollow where stopped early, a cross where failed; the best so far as a line."""
    height = 150
    values = [trial.value for trial in search.trials if trial.value is not None]
    ys = scale_of(values or [0.0, 1.0])
    xs = Scale(0.5, max(len(search.trials), 2) + 0.5, whole=True)
    parts = [y_axis(ys, height, 4), x_axis(xs, height, "trial", 6)]
    best = [(xs(i + 1), height * (1 - ys(value))) for i, value in enumerate(search.best) if value is not None]
    steps = best[:1]
    for step, level in best[1:]:
        steps += [(step, steps[-1][1]), (step, level)]
    if steps:
        parts.append(line([*steps, (1.0, steps[-1][1])], height, "best"))
    for i, trial in enumerate(search.trials):
        x, y = percent(xs(i + 1)), height if trial.value is None else round(height * (1 - ys(trial.value)), 1)
        params = ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items())
        how = {"complete": None, "stopped": "stopped early", "failed": "failed"}[trial.state]
        reached = None if trial.value is None else f"{primary} {trial.value:.4g}"
        ended = ", ".join(part for part in (reached, how) if part is not None)
        shape = (
            element("text", "×", x=x, y=y, dy="0.3em", class_="cross middle")
            if trial.state == "failed"
            else marker("circle", x, y, 4.5, f"trial {trial.state}")
        )
        parts.append(mark(shape, method=label, tip=f"trial {trial.number + 1}: {ended}; {params}"))
    return chart(*parts, height=height, label=f"search of {label}: {len(search.trials)} trials, best so far as a line")


def share_bar(share: float) -> Markup:
    """A bar whose length is a share of the width."""
    drawn = element("rect", x=0, y=2, height=10, width=percent(share), rx=2, class_="bar")
    return element("svg", drawn, height=14, width="100%", class_="whisker", aria_hidden="true")


# --- critical differences --------------------------------------------------------------------------------------------


def critical_difference(ranks: Sequence[tuple[str, float]], critical: float) -> Markup:
    """Demsar's diagram: methods on an axis of average ranks, best left; a bar joins those that can't be told apart.

    ranks: (method, its average rank over the pairs). critical: how far apart two must be.
    """
    ordered = sorted(ranks, key=lambda pair: pair[1])
    row, top = 22, 40
    joined = _joined([rank for _, rank in ordered], critical)
    height = top + 12 * len(joined) + 12 + row * math.ceil(len(ordered) / 2)
    xs = Scale(1.0, float(max(2, len(ordered))))
    parts = [element("line", x1="0", x2="100%", y1=top, y2=top, class_="axis")]
    for tick in range(1, len(ordered) + 1):
        x = percent(xs(tick))
        parts += [
            element("line", x1=x, x2=x, y1=top - 5, y2=top, class_="axis"),
            element("text", str(tick), x=x, y=top - 9, class_="tick middle"),
        ]
    parts.append(element("line", x1="0", x2=percent(critical / (xs.high - xs.low)), y1=8, y2=8, class_="critical"))
    parts.append(
        element(
            "text", f"critical difference {critical:.2f}", x=percent(critical / (xs.high - xs.low)), dx=8, y=8, dy="0.35em", class_="tick"
        )
    )
    for level, (first, last) in enumerate(joined):
        y = top + 12 + 12 * level
        ends = {"x1": percent(xs(ordered[first][1]) - 0.006), "x2": percent(xs(ordered[last][1]) + 0.006)}
        parts.append(element("line", **ends, y1=y, y2=y, class_="clique"))
    half = math.ceil(len(ordered) / 2)
    for place, (label, rank) in enumerate(ordered):
        left = place < half
        y = top + 12 * len(joined) + 24 + row * (place if left else len(ordered) - 1 - place)
        x = percent(xs(rank))
        edge, anchor, dx = ("0", "name end", -6) if left else ("100%", "name", 6)
        leader = [element("line", x1=x, x2=x, y1=top, y2=y, class_="leader"), element("line", x1=edge, x2=x, y1=y, y2=y, class_="leader")]
        text = element("text", f"{label} {rank:.2f}", x=edge, y=y, dx=dx, dy="0.35em", class_=anchor)
        parts.append(mark(*leader, text, method=label, tip=f"{label}: average rank {rank:.2f}"))
    label = "average ranks, best first: " + ", ".join(f"{label} {rank:.2f}" for label, rank in ordered)
    return chart(*parts, height=height, label=f"{label}; critical difference {critical:.2f}", names="both")


def _joined(ranks: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """The largest runs of sorted ranks within the critical difference, as first and last position; single methods are left out."""
    runs: list[tuple[int, int]] = []
    for first, rank in enumerate(ranks):
        last = max(i for i, other in enumerate(ranks) if other - rank <= critical)
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs
