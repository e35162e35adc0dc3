"""Aggregates over pairs agree with scipy and scikit-posthocs, and with the truth where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import scikit_posthocs
from scipy import stats as oracle
from scipy.special import ndtri

from kdbench.boards.across_pairs import (
    average_ranks,
    critical_difference,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)


@pytest.fixture
def scores() -> np.ndarray:
    """[pairs, seeds]"""
    return np.random.default_rng(0).normal(0.4, 0.3, (7, 5))


def test_the_interquartile_mean_is_the_mean_trimmed_by_a_quarter_at_either_end(scores) -> None:
    for count in range(1, 8):
        assert interquartile_mean(scores[:count].ravel()) == pytest.approx(oracle.trim_mean(scores[:count].ravel(), 0.25))
    assert interquartile_mean(scores) == pytest.approx(oracle.trim_mean(scores, 0.25, axis=1))


def test_the_bootstrap_of_many_seeds_is_the_stratified_one_of_scipy() -> None:
    scores = np.random.default_rng(1).normal(np.linspace(0.2, 0.7, 4)[:, None], 0.2, (4, 200))

    def statistic(*strata: np.ndarray, axis: int) -> np.ndarray:
        return oracle.trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)

    middle, low, high = stratified_bootstrap(scores.tolist())

    expected = oracle.bootstrap(tuple(scores), statistic, n_resamples=2000, method="percentile", rng=0).confidence_interval
    assert middle == pytest.approx(oracle.trim_mean(scores.ravel(), 0.25))
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * (high - low))


def test_the_bootstrap_is_the_same_for_the_same_seed_and_says_nothing_about_single_seeds(scores) -> None:
    assert stratified_bootstrap(scores.tolist(), seed=3) == stratified_bootstrap(scores.tolist(), seed=3)
    assert stratified_bootstrap(scores.tolist(), seed=3) != stratified_bootstrap(scores.tolist(), seed=4)
    assert stratified_bootstrap([[0.2], [0.4]]) == (pytest.approx(0.3), None, None)
    with pytest.raises(ValueError, match="at least one"):
        stratified_bootstrap([[0.2], []])
    with pytest.raises(ValueError, match="at least one"):
        stratified_bootstrap([])


def test_of_one_pair_the_bootstrap_of_the_mean_is_students_interval() -> None:
    values = np.random.default_rng(2).normal(0.5, 0.1, 6).tolist()

    _, low, high = stratified_bootstrap([values], lambda x: x.mean(axis=-1), resamples=50_000)

    assert (low, high) == pytest.approx(oracle.t.interval(0.95, 5, np.mean(values), oracle.sem(values)), rel=0.01)


def test_95_percent_intervals_of_the_interquartile_mean_hold_the_truth_95_times_in_100() -> None:
    """Over boards that differ in number of pairs and seeds, in how far pairs lie apart, and in how noisy each is."""
    rng = np.random.default_rng(0)
    quantiles = ndtri((np.arange(200) + 0.5) / 200)
    held = []
    for board in range(1000):
        pairs, seeds = int(rng.integers(2, 11)), int(rng.integers(3, 6))
        means, sds = rng.normal(0.5, rng.uniform(0.0, 0.5), (pairs, 1)), rng.uniform(0.05, 0.15, (pairs, 1))
        truth = interquartile_mean((means + sds * quantiles).ravel())
        _, low, high = stratified_bootstrap(rng.normal(means, sds, (pairs, seeds)).tolist(), resamples=500, seed=board)
        held.append(low <= truth <= high)

    assert 0.93 <= np.mean(held) <= 0.97


def test_the_probability_of_improvement_is_the_mean_of_mann_whitneys_statistics(scores) -> None:
    other = np.random.default_rng(5).normal(0.3, 0.3, (7, 4))
    expected = [oracle.mannwhitneyu(ours, theirs).statistic / (5 * 4) for ours, theirs in zip(scores, other, strict=True)]

    assert probability_of_improvement(scores.tolist(), other.tolist()) == pytest.approx(np.mean(expected))
    assert probability_of_improvement([[1.0, 2.0]], [[1.0, 2.0]]) == 0.5
    with pytest.raises(ValueError, match="same pairs"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_a_performance_profile_is_the_share_of_runs_above_each_threshold(scores) -> None:
    thresholds = np.linspace(0, 1, 11)
    below = oracle.ecdf(scores.ravel()).cdf.evaluate(thresholds)

    assert performance_profile(scores.tolist(), thresholds.tolist()) == pytest.approx(1 - below)


def test_pairs_with_many_seeds_weigh_no_more_in_a_profile() -> None:
    assert performance_profile([[1.0], [0.0, 0.0, 0.0]], [0.5]) == [0.5]


def test_ranks_and_their_tests_are_those_of_scipy_and_posthocs() -> None:
    values = np.random.default_rng(3).normal([0.0, 0.5, 1.0, 1.2], 0.6, (12, 4)).round(1)  # rounded, so that some tie

    found = average_ranks(values)

    assert found.ranks == pytest.approx(oracle.rankdata(-values, axis=1).mean(axis=0))
    assert found.p_value == pytest.approx(oracle.friedmanchisquare(*values.T).pvalue)
    apart = np.abs(np.subtract.outer(found.ranks, found.ranks)) > found.critical_difference
    assert (apart == (scikit_posthocs.posthoc_nemenyi_friedman(values).to_numpy() < 0.05)).all()
    assert apart.any()
    assert not apart.all()


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_the_one_of_demsars_table(methods, q) -> None:
    assert critical_difference(methods, 14) == pytest.approx(q * np.sqrt(methods * (methods + 1) / (6 * 14)), abs=1e-3)


def test_methods_that_are_all_alike_share_the_middle_rank() -> None:
    found = average_ranks(np.ones((6, 3)))

    assert (found.ranks, found.p_value) == ((2.0, 2.0, 2.0), 1.0)


@pytest.mark.parametrize("shape", [(5, 4), (6, 2)])
def test_too_few_pairs_or_methods_are_not_ranked(shape) -> None:
    with pytest.raises(ValueError, match="6 pairs and 3 methods"):
        average_ranks(np.zeros(shape))
