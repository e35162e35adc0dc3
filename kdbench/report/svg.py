"""What the charts are drawn with: elements, scales, axes. Lengths along x are shares of the width, so that a chart fits any screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

_STRETCHED = 1000  # units that a stretched drawing is wide


def element(name: str, *content: object, **attributes: object) -> Markup:
    """One element; text in it is escaped. `class_` is written `class`, `stroke_width` `stroke-width`; None leaves an attribute out."""
    written = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(map(escape, content)))


def percent(share: float) -> str:
    """A share of the width as SVG takes it."""
    return f"{100 * share:.2f}%"


@dataclass(frozen=True)
class Scale:
    """Values to shares, 0 at `low` and 1 at `high`; both positive where it is logarithmic. whole: of what is counted."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """At most about `count` round numbers inside."""
        if self.log:
            marks = [m * 10.0**e for e in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) for m in (1, 2, 5)]
            inside = [mark for mark in marks if self.low <= mark <= self.high]
            return inside[:: max(1, math.ceil(len(inside) / count))]
        rough = max((self.high - self.low) / count, 1.0 if self.whole else 0.0)
        power = 10.0 ** math.floor(math.log10(rough))
        steps = (1, 2, 5, 10) if self.whole else (1, 2, 2.5, 5, 10)
        step = next(m * power for m in steps if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_of(values: Iterable[float], margin: float = 0.08, log_from: float = math.inf) -> Scale:
    """A scale that holds all values with a margin on both sides; logarithmic where the largest is over `log_from` times the smallest."""
    found = list(values)
    low, high = min(found), max(found)
    if low > 0 and high / low > log_from:
        room = (high / low) ** margin
        return Scale(low / room, high * room, log=True)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return Scale(low - room, high + room)


def number(value: float) -> str:
    """A tick's text: short, without an exponent where that can be."""
    if value and abs(value) >= 10_000:
        power = min(int(math.log10(abs(value))) // 3, 4)
        return f"{value / 1000**power:g}{['', 'k', 'M', 'G', 'T'][power]}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "\u2212")


def y_axis(scale: Scale, height: int, count: int = 5) -> Markup:
    """Grid lines across, their numbers left of the plot."""
    parts = []
    for tick in scale.ticks(count):
        y = round(height * (1 - scale(tick)), 1)
        parts += [
            element("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"),
            element("text", number(tick), x="-8", y=y, dy="0.32em", class_="tick end"),
        ]
    return Markup("").join(parts)


def x_axis(scale: Scale, height: int, title: str, count: int = 5) -> Markup:
    """A line below, with numbers and what they are."""
    parts = [element("line", x1="0", x2="100%", y1=height, y2=height, class_="axis")]
    for tick in scale.ticks(count):
        x = percent(scale(tick))
        parts += [
            element("line", x1=x, x2=x, y1=height, y2=height + 4, class_="axis"),
            element("text", number(tick), x=x, y=height + 17, class_="tick middle"),
        ]
    parts.append(element("text", title, x="50%", y=height + 36, class_="title middle"))
    return Markup("").join(parts)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def free_places(
    texts: Sequence[str], points: Sequence[tuple[float, float]], taken: Sequence[Box], width: float
) -> list[tuple[str, float] | None]:
    """Where to write each text beside its point so that it covers no box that is `taken` and no other text: (start or end, y offset).

    points: in pixels, as are the boxes and the `width` that the texts stay in. None for a text that has no such place.
    """
    covered = list(taken)
    found: list[tuple[str, float] | None] = []
    for text, (x, y) in zip(texts, points, strict=True):
        length, place = 7.0 * len(text), None
        for side, offset in (("start", -7), ("end", -7), ("start", 9), ("end", 9), ("start", 1), ("end", 1)):
            left = x + 12 if side == "start" else x - 12 - length
            box = Box(left, y + offset - 7, left + length, y + offset + 6)
            if box.left >= 0 and box.right <= width and not any(box.meets(other) for other in covered):
                place = side, float(offset)
                covered.append(box)
                break
        found.append(place)
    return found


def line(points: Sequence[tuple[float, float]], height: int, class_: str, **attributes: object) -> Markup:
    """A line through points [(share of the width, y in pixels)], as wide as the chart is, its stroke as thick as ever."""
    path = " ".join(f"{_STRETCHED * x:.1f},{y:.1f}" for x, y in points)
    drawn = element("polyline", points=path, class_=class_, vector_effect="non-scaling-stroke", **attributes)
    return element(
        "svg", drawn, width="100%", height=height, viewBox=f"0 0 {_STRETCHED} {height}", preserveAspectRatio="none", class_="stretch"
    )


def spread(wanted: Sequence[float], gap: float, highest: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and none over `highest`, in the same order; for labels beside lines' ends."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    least = -math.inf
    for i in order:
        placed[i] = least = max(wanted[i], least + gap)
    most = highest
    for i in reversed(order):
        placed[i] = most = min(placed[i], most)
        most -= gap
    return placed


MARKERS = ("circle", "square", "diamond", "triangle", "inverted")
_CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "triangle": ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
    "inverted": ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
}


def marker(kind: str, x: str, y: float, size: float, class_: str) -> Markup:
    """A shape of that kind around (x, y); x is a length such as `25%`."""
    if kind == "circle":
        return element("circle", cx=x, cy=y, r=size, class_=class_)
    drawn = element("polygon", points=" ".join(f"{size * a:.1f},{size * b:.1f}" for a, b in _CORNERS[kind]), class_=class_)
    return element("svg", drawn, x=x, y=y, class_="anchor")


def mark(*content: object, method: str, tip: str) -> Markup:
    """A group that hover and focus explain: `tip` is shown, and read aloud. The script lets arrow keys move between a chart's marks."""
    return element("g", *content, class_="mark", data_method=method, data_tip=tip, tabindex="-1", role="img", aria_label=tip)


def chart(*content: object, height: int, label: str, names: Literal["right", "both"] | None = None) -> Markup:
    """The plot itself; axes' texts stand outside of it, in the margin that the style sheet leaves. names: where it leaves room for them."""
    return element(
        "svg", *content, height=height, class_=f"plot names-{names}" if names else "plot", role="group", aria_label=label, width="100%"
    )
