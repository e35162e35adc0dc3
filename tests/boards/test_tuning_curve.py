"""What a smaller search would have found, against the written values and against drawing searches at random."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from kdbench.boards.tuning_curve import chance_of_being_ahead, expected_best, interval_of_the_median_best, running_best

VALUES = [80.9, 63.5, 81.2, 79.4, 82.0, 75.1, 81.7, 82.4]


def near(value: float) -> object:
    return pytest.approx(value, rel=2e-9, abs=1e-9)


def test_the_expected_best_of_m_trials_is_the_written_one() -> None:
    curve = expected_best(VALUES)
    assert [curve[m - 1] for m in (1, 2, 4, 8)] == [near(value) for value in (78.275, 81.38214286, 82.09571429, 82.4)]
    with_default = expected_best(VALUES[1:], default=VALUES[0])
    assert [with_default[m - 1] for m in (1, 2, 4, 8)] == [near(value) for value in (80.9, 81.42857143, 82.02, 82.4)]


def test_the_expected_best_is_the_mean_over_all_orders() -> None:
    orders = np.array([*permutations(VALUES[:6])])
    assert expected_best(VALUES[:6]) == pytest.approx(np.maximum.accumulate(orders, axis=1).mean(axis=0))


def test_the_interval_of_the_median_best_is_the_written_one() -> None:
    assert interval_of_the_median_best(VALUES, 1) == (63.5, 82.4)
    assert interval_of_the_median_best(VALUES, 2) == (79.4, None)
    twenty = list(range(1, 21))
    assert [interval_of_the_median_best(twenty, m) for m in (1, 2, 5)] == [(6, 15), (10, 19), (14, None)]


def test_the_interval_holds_the_median_best_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(500):
        low, high = interval_of_the_median_best(generator.uniform(size=20), 2)
        held += low <= 0.5**0.5 <= high
    assert held / 500 > 0.95 - 4 * (0.95 * 0.05 / 500) ** 0.5


def test_the_chance_of_being_ahead_is_the_written_one() -> None:
    ahead = chance_of_being_ahead(VALUES, [80, 81, 79, 83, 60, 82.2, 70, 81.5])
    assert [ahead[m - 1] for m in (1, 2, 4, 8)] == [near(value) for value in (0.53125, 0.4808673469, 0.346122449, 0.0)]
    assert chance_of_being_ahead(VALUES, VALUES) == pytest.approx([0.5] * 8)


def test_the_running_best_keeps_the_order_of_the_search() -> None:
    assert running_best([3.0, 1.0, 4.0, 2.0]) == [3.0, 3.0, 4.0, 4.0]
