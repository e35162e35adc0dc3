"""The arithmetic behind every number of the benchmark, on timings that are made up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from benchmarks import timing
from benchmarks.timing import Arm, Rounds, Sample, Spent, arm, growth_exponent, interleave, timed


def _scripted(seconds: Iterator[float]) -> Arm:
    return lambda: Spent(wall=2 * (now := next(seconds)), cpu=now)


def test_a_ratio_is_taken_within_a_round_so_that_a_slow_round_cancels() -> None:
    rounds = Rounds({"ours": [Spent(1, 1), Spent(10, 10)], "theirs": [Spent(3, 2), Spent(30, 20)]})
    assert rounds.ratio("theirs", "ours").values == (2.0, 2.0)
    assert rounds.ratio("theirs", "ours", "wall").values == (3.0, 3.0)


def test_a_formula_of_several_arms_sees_the_seconds_of_one_round() -> None:
    rounds = Rounds({"live": [Spent(0, 4), Spent(0, 8)], "teacher": [Spent(0, 1), Spent(0, 2)], "cached": [Spent(0, 3), Spent(0, 12)]})
    assert rounds.combined(lambda s: (s["live"] - s["teacher"]) / s["cached"]).values == (1.0, 0.5)


def test_every_arm_works_once_a_round_in_a_turning_order_after_one_round_that_does_not_count() -> None:
    order: list[str] = []

    def noting(name: str) -> Arm:
        def work() -> Spent:
            order.append(name)
            return Spent(1, 1)

        return work

    rounds = interleave({name: noting(name) for name in "abc"}, 0, least=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(spent) for name, spent in rounds.spent.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_round_that_does_not_count_can_be_left_out() -> None:
    rounds = interleave({"a": _scripted(iter([5.0, 1.0]))}, 0, least=2, warm_up=False)
    assert rounds.seconds("a").values == (5.0, 1.0)
    assert rounds.seconds("a", "wall").values == (10.0, 2.0)


def test_measuring_ends_when_enough_is_known_and_never_before_the_least() -> None:
    def enough(rounds: Rounds) -> bool:
        return len(rounds.spent["a"]) >= 5

    assert len(interleave({"a": lambda: Spent(1, 1)}, 60, enough=enough).spent["a"]) == 5
    assert len(interleave({"a": lambda: Spent(1, 1)}, 60, least=7, enough=enough).spent["a"]) == 7
    assert len(interleave({"a": lambda: Spent(1, 1)}, 60, most=9).spent["a"]) == 9


class Clocks:
    """The clock on the wall and that of the process, which a test moves on. It takes the place of the module `time`."""

    def __init__(self) -> None:
        self.wall, self.cpu = 1000.0, 5.0

    def perf_counter(self) -> float:
        return self.wall

    monotonic = perf_counter

    def process_time(self) -> float:
        return self.cpu

    def works(self, seconds: float) -> None:
        self.wall, self.cpu = self.wall + seconds, self.cpu + seconds

    def sleeps(self, seconds: float) -> None:
        self.wall += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(timing, "time", clocks)
    return clocks


def test_a_sleeping_process_spends_wall_time_and_no_cpu_time(clocks: Clocks) -> None:
    assert timed(lambda: clocks.sleeps(0.5)) == Spent(wall=0.5, cpu=0.0)
    assert timed(lambda: clocks.works(0.25)) == Spent(wall=0.25, cpu=0.25)
    assert arm(lambda: clocks.works(8.0), amount=4)() == Spent(wall=2.0, cpu=2.0)


def test_measuring_ends_when_its_seconds_are_over_and_never_before_the_least(clocks: Clocks) -> None:
    arms = {"a": arm(lambda: clocks.works(2.0)), "b": arm(lambda: clocks.sleeps(1.0))}
    assert len(interleave(arms, 10.0, warm_up=False).spent["a"]) == 4  # three rounds take nine seconds
    assert len(interleave(arms, 10.0).spent["a"]) == 3  # the warm-up is one of the rounds that take time
    assert len(interleave(arms, 10.0, least=6).spent["a"]) == 6


@pytest.mark.parametrize(("count", "low", "high"), [(6, 0, 5), (8, 0, 7), (9, 1, 7), (20, 5, 14)])
def test_the_medians_interval_lies_between_the_order_statistics_of_the_binomial_table(count: int, low: int, high: int) -> None:
    values = tuple(float(100 + 10 * position) for position in range(count))
    sample = Sample(values)
    assert sample.resolution == pytest.approx((values[high] - values[low]) / 2 / sample.median)


def test_five_values_are_too_few_for_an_interval() -> None:
    assert Sample((1.0, 1.0, 1.0, 1.0, 1.0)).resolution == math.inf


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 2.0])
def test_a_power_law_gives_its_own_exponent(power: float) -> None:
    sizes = [8, 16, 32, 64]
    assert growth_exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)
