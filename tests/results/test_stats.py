"""The statistics agree with scipy's own and with hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as oracle

from kdbench.results.stats import gap_recovered, paired_difference, standard_error, t_interval


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_an_interval_is_the_one_of_scipy(n, level) -> None:
    values = np.random.default_rng(n).normal(70, 2, n).tolist()

    mean, low, high = t_interval(values, level)

    assert mean == pytest.approx(np.mean(values), rel=1e-14)
    assert (low, high) == pytest.approx(oracle.t.interval(level, n - 1, loc=np.mean(values), scale=oracle.sem(values)), rel=1e-12)


def test_a_paired_difference_is_the_interval_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(71, 1, 6), rng.normal(70, 1, 6)

    mean, low, high = paired_difference(dict(enumerate(a)), dict(enumerate(b)))

    expected = oracle.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(a - b), expected.low, expected.high), rel=1e-12)


def test_only_common_seeds_are_compared() -> None:
    assert paired_difference({0: 5.0, 1: 7.0, 2: 100.0}, {1: 6.0, 0: 4.0, 9: -50.0}) == (1.0, 1.0, 1.0)
    assert paired_difference({0: 5.0}, {1: 5.0}) is None


def test_pairing_cancels_what_a_seed_does_to_both() -> None:
    noise = {0: -3.0, 1: 0.5, 2: 4.0}
    _, low, high = paired_difference({s: 71 + x for s, x in noise.items()}, {s: 70 + x for s, x in noise.items()})

    assert (low, high) == pytest.approx((1.0, 1.0))


def test_one_value_has_no_interval() -> None:
    assert t_interval([3.0]) == (3.0, None, None)
    assert standard_error([3.0]) is None
    assert paired_difference({0: 2.0}, {0: 1.5}) == (0.5, None, None)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


@pytest.mark.parametrize(
    ("student", "undistilled", "teacher", "error", "higher", "share"),
    [
        (72.0, 70.0, 74.0, None, True, 0.5),
        (69.0, 70.0, 74.0, 0.1, True, -0.25),
        (75.0, 70.0, 74.0, 0.1, True, 1.25),
        (72.0, 70.0, 74.0, 2.0, True, 0.5),  # the lead is exactly two standard errors
        (72.0, 70.0, 74.0, 2.1, True, None),
        (70.2, 70.0, 70.5, None, True, 0.4),  # exactly half a point
        (70.2, 70.0, 70.4, 0.01, True, None),
        (72.0, 70.0, 68.0, 0.1, True, None),  # the teacher is the worse one
        (3.0, 4.0, 2.0, 0.1, False, 0.5),
        (3.0, 4.0, 6.0, 0.1, False, None),
    ],
)
def test_the_gap_is_shared_where_there_is_one(student, undistilled, teacher, error, higher, share) -> None:
    assert gap_recovered(student, undistilled, teacher, error, higher) == (share if share is None else pytest.approx(share))
