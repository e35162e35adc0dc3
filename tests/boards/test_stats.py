"""The statistics of a board agree with independent implementations, and with the truth where it is known."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as oracle

from kdbench.boards.stats import (
    hypervolume,
    paired_difference,
    paired_p_value,
    pareto_front,
    standard_error,
    t_interval,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)


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


def test_an_interval_may_rest_on_a_variance_that_is_known_otherwise() -> None:
    _, low, high = t_interval([3.0, 3.0, 3.0], variance=0.3)
    assert (low, high) == pytest.approx(oracle.t.interval(0.95, 2, loc=3.0, scale=0.1**0.5))


def test_one_value_has_no_interval() -> None:
    assert t_interval([3.0]) == (3.0, None, None)
    assert standard_error([3.0]) is None
    assert paired_difference({0: 2.0}, {0: 1.5}) == (0.5, None, None)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_paired_p_value_is_the_one_of_the_paired_t_test(n) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(70.5, 1, n), rng.normal(70, 1, n)

    assert paired_p_value(dict(enumerate(a)), dict(enumerate(b))) == pytest.approx(oracle.ttest_rel(a, b).pvalue, rel=1e-10)


def test_differences_that_are_all_alike_are_certain_and_one_seed_says_nothing() -> None:
    assert paired_p_value({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}) == 0.0
    assert paired_p_value({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}) == 1.0
    assert paired_p_value({0: 2.0, 1: 3.0}, {0: 1.0}) is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_front_holds_what_optuna_calls_the_best_trials(points) -> None:
    study = optuna.create_study(directions=["maximize"] * 3)
    study.add_trials([optuna.trial.create_trial(values=point, user_attrs={"row": row}) for row, point in enumerate(points)])

    best = {trial.user_attrs["row"] for trial in study.best_trials}
    assert pareto_front(points) == [row in best for row in range(len(points))]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_hypervolume_is_the_number_of_unit_cells_below_the_points(dimensions) -> None:
    points = np.random.default_rng(dimensions).integers(-2, 7, (12, dimensions))
    cells = np.stack(np.meshgrid(*[np.arange(6)] * dimensions, indexing="ij"), axis=-1).reshape(-1, dimensions)
    dominated = (cells[:, None] < points[None]).all(axis=2).any(axis=1).sum()

    assert hypervolume(points.tolist(), [0.0] * dimensions) == dominated
    assert hypervolume([], [0.0] * dimensions) == 0.0
    shift = [3.5] * dimensions
    assert hypervolume((points + 3.5).tolist(), shift) == pytest.approx(dominated)


def test_the_volume_of_one_box_is_the_product_of_its_sides_and_what_lies_below_the_reference_adds_nothing() -> None:
    assert hypervolume([[1.0, 2.0, 3.0]], [0.0, 0.0, 0.0]) == 6.0
    assert hypervolume([[2.0, 3.0, 1.0], [3.0, 1.0, 2.0]], [0.0, 0.0, 0.0]) == 6.0 + 6.0 - 2.0  # the two share a box of 2, 1 and 1
    assert hypervolume([[2.0, -0.5], [1.0, 1.0]], [0.0, 0.0]) == 1.0
    assert hypervolume([[-0.5]], [0.0]) == 0.0


# --- boards with known truth -----------------------------------------------------------------------------------------

BOARDS = 1000


def simulated(seeds: int, effects: list[float], seed: int) -> np.ndarray:
    """Metrics [boards, 1 + methods, seeds]: kd first, then methods that are truly better by `effects`. A seed moves all methods alike."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(70.0, 1.0, (BOARDS, 1, seeds))
    own = rng.normal(0.0, rng.uniform(0.1, 0.6, (BOARDS, 1 + len(effects), 1)), (BOARDS, 1 + len(effects), seeds))
    return shared + own + np.array([0.0, *effects])[:, None]


def by_seed(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_means_and_of_paired_differences_hold_the_truth_95_times_in_100(seeds) -> None:
    boards = simulated(seeds, [0.4], seed=seeds)

    means = [t_interval(board[0].tolist()) for board in boards]
    differences = [paired_difference(by_seed(board[1]), by_seed(board[0])) for board in boards]

    for intervals, truth in ((means, 70.0), (differences, 0.4)):
        assert 0.93 <= np.mean([low <= truth <= high for _, low, high in intervals]) <= 0.97
