"""Comparisons at once: the critical values and boards of the written procedure, to 10 digits, and what simulation says of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as oracle

from kdbench.boards.simultaneous import (
    differences,
    dunnett,
    partial_difference,
    rank_intervals,
    smallest_found,
    spreads,
    tukey,
)

# none, label_smoothing, kd, nkd, dkd, tf_nkd of a real run
EVEN = [
    [77.75, 78.80, 78.85],
    [78.00, 79.40, 78.05],
    [83.55, 82.25, 82.65],
    [83.75, 83.30, 83.35],
    [83.80, 84.05, 83.45],
    [78.75, 78.60, 78.65],
]
WIDE = [
    [70, 70.4, 70.2], [71, 71.6, 71.1], [72, 72.2, 72.6], [71.5, 71.9, 71.6],
    [70.8, 71, 71.3], [73, 73.5, 73.1], [72.4, 72.5, 72.9], [71.9, 40, 72],
]  # fmt: skip
UNEVEN = [
    [60.0, 60.1, 60.3, 60.1], [61.0, 61.2, 61.2, 61.3], [60.4, 60.6, 60.5, 60.8],
    [60.9, 61.5, 60.7, 61.1], [61.5, 61.6, 61.8, 61.6], [60.2, 60.2, 60.5, 60.3],
]  # fmt: skip


def near(value: float) -> object:
    return pytest.approx(value, rel=2e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("comparisons", "df", "level", "value"),
    [
        (1, 2, 0.95, 4.302652730),
        (5, 10, 0.95, 2.990290179),
        (11, 22, 0.95, 2.989410507),
        (9, 40, 0.95, 2.811754453),
        (35, 70, 0.95, 3.141897563),
        (11, 22, 0.99, 3.715607408),
        (11, 44, 0.975, 3.140200464),
    ],
)
def test_dunnetts_critical_values_are_the_written_ones(comparisons, df, level, value) -> None:
    assert dunnett(comparisons, df, level) == near(value)


@pytest.mark.parametrize(("rows", "df", "value"), [(2, 2, 4.302652730), (6, 10, 3.473319646), (12, 22, 3.637586154), (36, 70, 4.007817432)])
def test_tukeys_critical_values_are_those_of_the_studentized_range(rows, df, value) -> None:
    assert tukey(rows, df) == near(value)
    assert tukey(rows, df) == pytest.approx(oracle.studentized_range.ppf(0.95, rows, df) / 2**0.5, rel=1e-6)


def test_a_board_with_even_spreads() -> None:
    found = spreads(EVEN)
    against_kd, against_none = differences(EVEN, 2, found), differences(EVEN, 0, found)

    assert found.own == pytest.approx([0.4721111111, 0.5747777778, 0.6191111111, 0.1021111111, 0.04211111111, 0.03211111111], rel=1e-8)
    assert (found.pool, found.degrees, found.df, found.uneven, found.wide.any()) == (near(0.3070555556), 10, 10, False, False)
    nkd, tf_nkd = against_kd[3], against_kd[5]
    assert (nkd.middle, nkd.low, nkd.high, nkd.p) == (near(0.65), near(-1.011488273), near(2.311488273), near(0.6684180614))
    assert (tf_nkd.low, tf_nkd.high, tf_nkd.p) == (near(-5.811488273), near(-2.488511727), near(0.00009027377518))
    assert (against_none[4].low, against_none[4].high) == (near(3.776059926), near(6.823940074))
    assert 2 not in against_kd
    assert rank_intervals(EVEN, found) == [(4, 6), (4, 6), (1, 3), (1, 3), (1, 3), (4, 6)]
    assert smallest_found(6, 3, found) == near(2.075733163)


def test_a_row_that_scatters_far_more_than_the_others_is_judged_by_its_own_spread() -> None:
    found = spreads(WIDE)
    against = differences(WIDE, 1, found)

    assert list(found.wide) == [False] * 7 + [True]
    assert (found.own[7], found.pool, found.degrees) == (near(301.3480357), near(0.03984126984), 12)
    assert (against[5].middle, against[5].low, against[5].high) == (near(1.966666667), near(1.408616695), near(2.524716638))
    assert (against[7].high - against[7].middle) / 10.02346091 == pytest.approx(11.76867844, rel=1e-8)
    assert against[7].p == 1.0
    low, high = zip(*rank_intervals(WIDE, found), strict=True)
    assert (list(low), list(high)) == ([7, 4, 2, 3, 5, 1, 1, 1], [8, 7, 5, 6, 7, 3, 4, 8])


def test_a_board_with_uneven_spreads_takes_wider_intervals() -> None:
    found = spreads(UNEVEN)
    against = differences(UNEVEN, 0, found)

    assert (found.pool, found.degrees, found.df, found.uneven) == (near(0.03166666667), 15, 9, True)
    assert (against[2].low, against[2].high, against[2].p) == (near(0.06598070048), near(0.8340192995), near(0.02249542366))
    assert (against[3].low, against[3].high) == (near(0.3353215487), near(1.514678451))
    low, high = zip(*rank_intervals(UNEVEN, found), strict=True)
    assert (list(low), list(high)) == ([5, 2, 3, 1, 1, 4], [6, 3, 5, 4, 2, 6])
    assert smallest_found(6, 4, found) == near(0.5753233532)


def test_two_rows_are_compared_by_the_paired_t_test() -> None:
    a, b = [1.0, 2.0, 4.0], [2.0, 4.0, 5.0]
    found = spreads([a, b])
    [difference] = differences([a, b], 0, found).values()

    paired = oracle.ttest_rel(b, a)
    assert difference.p == near(paired.pvalue)
    assert (difference.low, difference.high) == pytest.approx(tuple(paired.confidence_interval()))
    assert rank_intervals([a, b], found) == [(1, 2), (1, 2)]


def test_seeds_that_agree_exactly_tell_nothing_of_the_error() -> None:
    assert spreads([[70.0, 71.0], [72.0, 73.0]]) is None


def test_a_row_that_misses_seeds_is_compared_over_those_it_has() -> None:
    found = spreads(EVEN)
    whole = differences(EVEN, 2, found)[4]
    part = partial_difference(EVEN[4][:2], EVEN[2][:2], 6, found)

    assert part.middle == pytest.approx((83.80 + 84.05 - 83.55 - 82.25) / 2)
    assert part.high - part.middle > whole.high - whole.middle
    error = ((0.3070555556 + np.var(EVEN[2][:2], ddof=1)) / 2) ** 0.5  # of kd, the own spread of two seeds is the larger
    assert part.high - part.middle == pytest.approx(oracle.t.ppf(1 - 0.05 / 10, 1) * error)
    assert partial_difference(EVEN[4][:1], EVEN[2][:1], 6, found) is None


def test_equal_rows_are_seldom_told_apart_and_truly_better_ones_often_found() -> None:
    """12 rows, 3 seeds: a false verdict on 2.8%, all share rank 1 on 97%, a difference of 2 sd found on 53%."""
    generator, boards = np.random.default_rng(0), 150
    false = shared = hits = 0
    for _ in range(boards):
        values = generator.normal(size=(12, 3))
        found = spreads(values)
        false += any(each.p < 0.05 for each in differences(values, 0, found).values())
        shared += all(low == 1 for low, _ in rank_intervals(values, found))
        values[1] += 2 * 2**0.5
        found = spreads(values)
        hits += differences(values, 0, found)[1].low > 0
    for count, share in ((false, 0.028), (shared, 0.97), (hits, 0.53)):
        assert abs(count / boards - share) < 4 * (share * (1 - share) / boards) ** 0.5
