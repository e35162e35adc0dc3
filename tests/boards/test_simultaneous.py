"""Comparisons at once: the critical values and boards of the written procedure, to 10 digits, and what simulation says of the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as oracle

from benchmarks.statistics import FAILED, Figures, figures, simulated
from kdbench.boards import simultaneous
from kdbench.boards.simultaneous import (
    better,
    differences,
    dunnett,
    fieller,
    fronts,
    gap,
    partial_difference,
    rank_intervals,
    search_variances,
    smallest_found,
    spreads,
    tukey,
)
from tests.boards.layouts import EVEN, UNEVEN, WIDE


def near(value: float) -> object:
    return pytest.approx(value, rel=2e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("comparisons", "df", "level", "value"),
    [
        (1, 2, 0.95, 4.302652730),
        (5, 10, 0.95, 2.990290179),
        (11, 22, 0.95, 2.989410507),
        (9, 40, 0.95, 2.811754453),
        (34, 68, 0.95, 3.137001742),
        (35, 70, 0.95, 3.141897563),
        (11, 22, 0.99, 3.715607408),
        (11, 35, 0.985, 3.384777808),
        (11, 44, 0.975, 3.140200464),
    ],
)
def test_dunnetts_critical_values_are_the_written_ones(comparisons, df, level, value) -> None:
    assert dunnett(comparisons, df, level) == near(value)


@pytest.mark.parametrize(("rows", "df", "value"), [(2, 2, 4.302652730), (6, 10, 3.473319646), (12, 22, 3.637586154), (36, 70, 4.007817432)])
def test_tukeys_critical_values_are_those_of_the_studentized_range(rows, df, value) -> None:
    assert tukey(rows, df) == near(value)
    assert tukey(rows, df) == pytest.approx(oracle.studentized_range.ppf(0.95, rows, df) / 2**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("c", "shares", "df", "value"),
    [
        (2.5, [0.5**0.5] * 5, 10, 0.8901937398),
        (2.5, [0.2, 0.5, 0.8], 7, 0.8953387269),
        (3.0, [0.6] * 11, 22, 0.9438329184),
    ],
)
def test_the_probability_that_no_comparison_leaves_an_interval(c, shares, df, value) -> None:
    assert simultaneous._dunnett_probability(c, simultaneous._law(shares, len(shares)), df) == near(value)


def test_a_board_with_even_spreads() -> None:
    found = spreads(EVEN)
    against_kd, against_none = differences(EVEN, 2, found), differences(EVEN, 0, found)

    assert found.own == pytest.approx([0.4721111111, 0.5747777778, 0.6191111111, 0.1021111111, 0.04211111111, 0.03211111111], rel=1e-8)
    assert (found.pool, found.degrees, found.df, found.uneven, found.wide.any()) == (near(0.3070555556), 10, 10, False, False)
    nkd, tf_nkd = against_kd[3], against_kd[5]
    assert (nkd.middle, nkd.low, nkd.high, nkd.p) == (near(0.65), near(-1.011488273), near(2.311488273), near(0.6684180614))
    assert (tf_nkd.low, tf_nkd.high, tf_nkd.p) == (near(-5.811488273), near(-2.488511727), near(0.00009027377518))
    for row, middle, error, low, high, p in (
        (0, -4.35, 0.6031092279, -6.153471601, -2.546528399, 0.000121474127),
        (1, -4.333333333, 0.6308430573, -6.219737132, -2.446929534, 0.0001829128172),
        (4, 0.95, 0.5556277731, -0.7114882733, 2.611488273, 0.3551553953),
    ):
        one = against_kd[row]
        assert (one.middle, one.error, one.low, one.high, one.p) == (near(middle), near(error), near(low), near(high), near(p))
    assert (against_none[4].error, against_none[4].low, against_none[4].high) == (near(0.509629495), near(3.776059926), near(6.823940074))
    assert against_none[2].low == near(2.546528399)
    assert (against_none[5].low, against_none[5].high, against_none[5].p) == (near(-1.323940074), near(1.723940074), near(0.9928350946))
    assert 2 not in against_kd
    assert found.shared == 0.0
    assert rank_intervals(better(EVEN, found)) == [(4, 6), (4, 6), (1, 3), (1, 3), (1, 3), (4, 6)]
    assert smallest_found(6, 3, found) == near(2.075733163)


def test_the_gap_of_a_board_with_its_interval() -> None:
    found = spreads(EVEN)
    against_none = differences(EVEN, 0, found)
    for row, middle, low, high in (
        (2, 0.522, 0.3333801809, 0.6908473600),
        (3, 0.6, 0.4619992523, 0.7214547569),
        (4, 0.636, 0.5010012902, 0.7559418581),
        (5, 0.024, -0.1793820975, 0.1870098799),
    ):
        share, *ends = gap(against_none[row], EVEN, 0, found, 86.8)
        assert (share, *ends) == (near(middle), near(low), near(high))
        assert (ends[0] > 0) == (against_none[row].low > 0)
    assert gap(against_none[4], EVEN, 0, found, 78.9) is None  # a lead within the noise
    assert gap(against_none[4], EVEN, 0, found, 70.0) is None  # a teacher that is surely worse has no lead
    assert fieller(4, 8, 0.3, 0.15, 0.2, 3) == (near(0.3224971083), near(0.6630334383))
    assert fieller(1, 1, 0.3, 0.15, 0.2, 3) is None


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [(0.0, "off off sure may may sure"), (0.05, "off off may may may may")],
)
def test_the_pareto_front_of_a_board_by_what_its_ranks_say(tolerance, expected) -> None:
    costs = np.array([0.00476, 0.00511, 0.00238, 0.00241, 0.00333, 0.00229])
    surely = costs[None] <= costs[:, None] / (1 + tolerance)
    possibly = costs[None] < costs[:, None] * (1 + tolerance) if tolerance else surely
    sure, off = fronts(better(EVEN, spreads(EVEN)), surely, possibly)
    assert ["sure" if one else "off" if other else "may" for one, other in zip(sure, off, strict=True)] == expected.split()


def test_a_control_with_further_seeds() -> None:
    found, extra = spreads(EVEN), {2: [82.9, 83.1, 82.4]}
    against = differences(EVEN, 2, found, extra=extra)
    dkd, none = against[4], against[0]

    assert dkd.critical == near(3.051431167)
    assert (dkd.middle, dkd.error, dkd.low, dkd.high) == (near(0.9583333333), near(0.408126932), near(-0.2870379071), near(2.203704574))
    assert (none.middle, none.error, none.low, none.high) == (
        near(-4.341666667),
        near(0.4707293395),
        near(-5.778064845),
        near(-2.905268489),
    )
    assert smallest_found(6, 3, found, extra=3) < smallest_found(6, 3, found)


def test_two_rows_with_further_seeds_are_compared_over_all_of_them() -> None:
    """And its share of the control's mean is what the others' formula gives: the covariance of the two differences, by simulation."""
    found, extra = spreads(EVEN), {2: [82.9, 83.1, 82.4], 0: [78.1, 78.9, 78.4]}
    kd = differences(EVEN, 0, found, extra=extra)[2]
    assert kd.middle == near(np.mean([*EVEN[2], *extra[2]]) - np.mean([*EVEN[0], *extra[0]]))
    assert kd.error == near(
        (
            (
                simultaneous._with_further_seeds(np.array(EVEN), 2, found, {2: np.array(extra[2])})
                + simultaneous._with_further_seeds(np.array(EVEN), 0, found, {0: np.array(extra[0])})
            )
            / 6
        )
        ** 0.5
    )
    back = differences(EVEN, 2, found, extra=extra)[0]
    assert (back.middle, back.error) == (near(-kd.middle), near(kd.error))


def test_the_errors_of_a_control_with_further_seeds_are_those_of_its_estimates() -> None:
    """Simulated: variances of a difference and of the lead, with seeds that shift all rows alike."""
    generator, seeds, extra, shift, sd = np.random.default_rng(3), 3, 3, 0.8, 1.1
    found = replace(spreads(EVEN), shared=shift**2, pool=sd**2, own=np.full(6, sd**2), variances=np.full(6, sd**2))
    by_seed = generator.normal(size=(200_000, 1, seeds + extra)) * shift
    draws = generator.normal(size=(200_000, 3, seeds + extra)) * sd + by_seed  # a row, kd, none
    used = simultaneous._used(found, seeds, extra)
    block, further = draws[..., :seeds].mean(axis=-1), draws[..., seeds:].mean(axis=-1)
    none = block[:, 2] - used * (block[:, 2] - further[:, 2])
    row, pair = block[:, 0] - none, draws[:, 1].mean(axis=-1) - draws[:, 2].mean(axis=-1)
    assert used == pytest.approx((1 - shift**2 / (shift**2 + sd**2)) / 2)
    assert row.var() == pytest.approx(sd**2 * (2 - used) / seeds, rel=0.02)
    assert pair.var() == pytest.approx(2 * sd**2 / (seeds + extra), rel=0.02)
    assert none.var() == pytest.approx(sd**2 / (seeds + extra) + (1 - used) * shift**2 / seeds + sd**2 * 0, rel=0.03)
    assert np.cov(row, pair)[0, 1] == pytest.approx(sd**2 / (seeds + extra), rel=0.03)
    assert np.cov(row, -none)[0, 1] == pytest.approx(sd**2 / (seeds + extra), rel=0.03)


def test_a_replicate_may_be_a_search() -> None:
    finals = np.array([
        [[70, 70.4], [71, 71.2], [70.5, 70.5]],
        [[72, 72.6], [71.8, 72], [73, 73.2]],
        [[71, 71.1], [72.2, 72.6], [71.4, 71.2]],
        [[70.2, 70.3], [70.9, 71.5], [71, 70.8]],
    ])  # fmt: skip
    means = finals.mean(axis=2)
    found = spreads(means)
    one = differences(means, 0, found)[1]
    assert (found.pool, found.df, one.critical) == (near(0.2716666667), 6, near(3.099293447))
    assert (one.middle, one.low, one.high, one.p) == (near(1.833333333), near(0.04743816244), near(3.619228504), near(0.04517953715))
    assert search_variances(finals) == (near(0.3160227273), near(0.03545454545))


@pytest.mark.parametrize(
    ("seeds", "rows", "value"),
    [(3, 6, 3.74595921), (3, 12, 3.702629025), (3, 36, 3.821029673), (5, 12, 2.656215758), (10, 12, 1.774774283)],
)
def test_the_smallest_difference_that_is_found_four_times_in_five(seeds, rows, value) -> None:
    degrees = (rows - 1) * (seeds - 1)
    known = replace(spreads(EVEN), pool=1.0, degrees=degrees, df=degrees)
    assert smallest_found(rows, seeds, known) == near(value)


def test_a_metric_that_moves_in_steps_has_at_least_the_error_of_its_rounding() -> None:
    agreeing = [[70.0, 71.0], [72.0, 73.0]]
    assert spreads(agreeing) is None
    found = spreads(agreeing, step=0.05)
    assert found.variances == pytest.approx([0.05**2 / 12] * 2)
    assert found.shared == pytest.approx(0.5)
    assert differences(agreeing, 0, found)[1].error == near((2 * 0.05**2 / 12 / 2) ** 0.5)


def test_a_row_that_scatters_far_more_than_the_others_is_judged_by_its_own_spread() -> None:
    found = spreads(WIDE)
    against = differences(WIDE, 1, found)

    assert list(found.wide) == [False] * 7 + [True]
    assert (found.shared, against[5].critical) == (near(0.02920634921), near(3.039724866))
    assert (against[7].error, against[7].critical, against[7].degrees) == (near(10.02346091), near(11.76867844), 2)
    assert (found.own[7], found.pool, found.degrees) == (near(301.3480357), near(0.03984126984), 12)
    assert (against[5].middle, against[5].low, against[5].high) == (near(1.966666667), near(1.408616695), near(2.524716638))
    assert (against[7].high - against[7].middle) / 10.02346091 == pytest.approx(11.76867844, rel=1e-8)
    assert against[7].p == 1.0
    low, high = zip(*rank_intervals(better(WIDE, found)), strict=True)
    assert (list(low), list(high)) == ([7, 4, 2, 3, 5, 1, 1, 1], [8, 7, 5, 6, 7, 3, 4, 8])


def test_a_board_with_uneven_spreads_takes_wider_intervals() -> None:
    found = spreads(UNEVEN)
    against = differences(UNEVEN, 0, found)
    assert (against[2].error, against[3].error, against[2].critical) == (near(0.1258305739), near(0.1932183566), near(3.051875928))
    assert tukey(6, found.df) == near(3.552161493)

    assert (found.pool, found.degrees, found.df, found.uneven) == (near(0.03166666667), 15, 9, True)
    assert (against[2].low, against[2].high, against[2].p) == (near(0.06598070048), near(0.8340192995), near(0.02249542366))
    assert (against[3].low, against[3].high) == (near(0.3353215487), near(1.514678451))
    low, high = zip(*rank_intervals(better(UNEVEN, found)), strict=True)
    assert (list(low), list(high)) == ([5, 2, 3, 1, 1, 4], [6, 3, 5, 4, 2, 6])
    assert smallest_found(6, 4, found) == near(0.5753233532)


def test_two_rows_are_compared_by_the_paired_t_test() -> None:
    a, b = [1.0, 2.0, 4.0], [2.0, 4.0, 5.0]
    found = spreads([a, b])
    assert found.own == pytest.approx([1 / 6] * 2)
    [difference] = differences([a, b], 0, found).values()

    paired = oracle.ttest_rel(b, a)
    assert difference.p == near(paired.pvalue)
    assert (difference.low, difference.high) == pytest.approx(tuple(paired.confidence_interval()))
    assert rank_intervals(better([a, b], found)) == [(1, 2), (1, 2)]


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
    known = partial_difference(EVEN[4][:2], EVEN[2][:2], 6, found, float(found.variances[2]))
    assert known.error == pytest.approx(((found.pool + found.variances[2]) / 2) ** 0.5)
    assert partial_difference(EVEN[4][:1], EVEN[2][:1], 6, found) is None


@pytest.fixture(scope="module")
def measured() -> Figures:
    """Of 12 rows and 3 seeds, per cent of 1,000 boards of each kind; the bands are those of so many."""
    return figures(1000, 3, 12)


def test_equal_rows_are_as_seldom_told_apart_as_is_written(measured: Figures) -> None:
    assert 1.3 <= measured.false <= 4.7
    assert 3.3 <= measured.false_uneven <= 7.7
    assert measured.shared >= 95


def test_a_true_difference_of_two_standard_deviations_is_found_as_often_as_is_written(measured: Figures) -> None:
    assert 48 <= measured.found <= 58


def test_a_seed_that_fails_leaves_the_others_their_power(measured: Figures) -> None:
    assert measured.found_beside_a_failure >= 47
    generator, blamed = np.random.default_rng(3), []
    for _ in range(1000):
        values = simulated(generator, 12, 3)
        values[2, 0] -= FAILED
        blamed.append(bool(spreads(values).wide[2]))
    assert sum(blamed) >= 950
