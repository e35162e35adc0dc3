"""Scales hold what they are given, ticks are round, labels do not cover each other, and no text becomes markup."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbench.report.charts import Point, _joined, critical_difference, front_shares, search_history
from kdbench.report.searches import Search, Trial
from kdbench.report.svg import Box, Scale, element, free_places, number, scale_of, spread

numbers = st.floats(-1e9, 1e9, allow_nan=False)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=20))
def test_a_scale_holds_all_its_values_with_room_on_both_sides(values: list[float]) -> None:
    scale = scale_of(values)
    assert all(0 < scale(value) < 1 for value in values)


@settings(deadline=None)
@given(numbers, st.floats(1e-6, 1e6))
def test_ticks_are_few_inside_and_evenly_spaced(low: float, width: float) -> None:
    scale = Scale(low, low + width)
    if scale.high - scale.low < 1e-9 * abs(low):
        return
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 7
    assert all(-1e-6 <= scale(tick) <= 1 + 1e-6 for tick in ticks)
    gaps = [b - a for a, b in pairwise(ticks)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-3) for gap in gaps)


def test_ticks_are_round_numbers() -> None:
    assert Scale(83.1, 88.7).ticks(5) == [84.0, 86.0, 88.0]
    assert Scale(1, 12, whole=True).ticks(5) == [5.0, 10.0]
    assert Scale(0.5, 6.5, whole=True).ticks(6) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert Scale(0.8, 120, log=True).ticks(9) == [1, 2, 5, 10, 20, 50, 100]


def test_costs_of_very_different_size_get_a_logarithmic_scale() -> None:
    scale = scale_of([1.0, 100.0, 10_000.0], log_from=20)
    assert scale.log
    assert scale(100.0) == pytest.approx(0.5)
    assert not scale_of([1.0, 10.0], log_from=20).log
    assert not scale_of([0.0, 1000.0], log_from=20).log


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (-2.5, "−2.5"), (24_100.0, "24.1k"), (3e6, "3M"), (0.000012, "1.2e−5"), (88.0, "88")]
)
def test_a_ticks_text_is_short(value: float, text: str) -> None:
    assert number(value) == text


@settings(deadline=None)
@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_beside_lines_are_apart_and_keep_their_order(wanted: list[float]) -> None:
    placed = spread(wanted, 15, 300)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    heights = [placed[i] for i in order]
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(heights))
    assert max(heights) <= 300


def test_a_name_goes_where_it_covers_nothing_or_is_left_out() -> None:
    spot = Box(90, 90, 110, 110)
    assert free_places(["kd"], [(100, 100)], [spot], 340) == [("start", -7.0)]
    assert free_places(["kd"], [(330, 100)], [Box(320, 90, 340, 110)], 340) == [("end", -7.0)]
    everywhere = Box(0, 0, 340, 300)
    assert free_places(["kd"], [(100, 100)], [everywhere], 340) == [None]
    first, second = free_places(["kd", "nkd"], [(100, 100), (100, 100)], [spot], 340)
    assert first != second


def test_text_and_attributes_are_escaped() -> None:
    assert element("text", "<b>&", x='"><script>') == '<text x="&#34;&gt;&lt;script&gt;">&lt;b&gt;&amp;</text>'


def test_bars_join_the_largest_runs_that_cannot_be_told_apart() -> None:
    assert _joined([1.0, 1.5, 2.9, 4.0, 5.1], 2.0) == [(0, 2), (2, 3), (3, 4)]
    assert _joined([1.0, 4.0, 7.0], 2.0) == []
    assert _joined([1.0, 1.1, 1.2], 2.0) == [(0, 2)]
    assert critical_difference([("a", 1.0), ("b", 1.1), ("c", 2.9)], 0.5).count('class="clique"') == 1


def test_a_search_without_a_value_is_drawn_all_the_same() -> None:
    failed = Search(tuple(Trial(i, "failed", None, {"lr": 0.1}) for i in range(3)), (None,) * 3, {}, None)
    drawn = search_history("kd", failed, "accuracy")
    assert drawn.count("×") == 3
    assert "polyline" not in drawn


def test_a_methods_share_of_the_joint_front_is_of_the_area_above_the_reference() -> None:
    def at(method: str, cost: float, quality: float) -> Point:
        return Point(method, method, 1, cost, quality, None, None)

    points = [at("none", 11.0, 80.0), at("dkd", 6.0, 85.0), at("kd", 1.0, 80.0), at("kd", 6.0, 90.0)]
    # The reference is at cost 12 and quality 79, so that kd's two boxes cover 11 x 1 + 6 x 10 of it, which holds all the others.
    shares = front_shares(points, higher_is_better=True)
    assert [name for name, _ in shares] == ["kd", "dkd", "none"]
    assert [share for _, share in shares] == pytest.approx([1.0, 36 / 71, 1 / 71])
    mirrored = [at(point.method, point.cost, -point.quality) for point in points]
    assert dict(front_shares(mirrored, higher_is_better=False)) == pytest.approx(dict(shares))
    assert front_shares([at("kd", 1.0, 80.0)], higher_is_better=True) == []
