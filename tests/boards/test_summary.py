"""Several pairs of one protocol family are summed up together, others never."""

from __future__ import annotations

import numpy as np
import pytest

from kdbench.boards.across_pairs import interquartile_mean
from kdbench.boards.leaderboard import boards
from kdbench.boards.summary import Summary, summaries

NONE, KD, NKD = [70.0, 70.5, 69.5], [72.0, 72.3, 71.5], [73.0, 73.5, 72.3]


@pytest.fixture
def pair(make_record):
    """The finals of none, kd and nkd on one pair; each pair has a protocol hash of its own, as other data have."""

    def make(student: str, shift: float = 0.0, methods=(("none", NONE), ("kd", KD), ("nkd", NKD)), **fields):
        given = {"student": student, "protocol_hash": f"p-{student}", "teacher_metric": 75.0 + shift, **fields}
        return [
            make_record(method=method, seed=seed, test_metric=value + shift, **given)
            for method, values in methods
            for seed, value in enumerate(values)
        ]

    return make


def only(records) -> Summary:
    found = summaries(boards(records))
    assert len(found) == 1
    return found[0]


def rows(summary: Summary) -> dict:
    return {row.label: row for row in summary.rows}


def test_the_gap_is_the_interquartile_mean_over_pairs_and_seeds(pair) -> None:
    summary = only([*pair("a"), *pair("b", shift=1.0), *pair("c", shift=-20.0, teacher_metric=60.0)])

    wide = (np.array(NKD) - np.array(NONE)) / 5.0
    expected = interquartile_mean([*wide, *wide, *(wide / 2)])  # of pair c the lead is 10 points
    nkd = rows(summary)["nkd"]
    assert nkd.gap_recovered == pytest.approx(expected)
    assert nkd.gap_low < nkd.gap_recovered < nkd.gap_high
    assert nkd.profile == pytest.approx([1.0, 1.0, 2 / 3, 0.0, 0.0])
    assert [row.label for row in summary.rows] == ["nkd", "kd", "none"]
    assert rows(summary)["none"].gap_recovered is None
    assert [(p.student, p.protocol_hash) for p in summary.pairs] == [("a", "p-a"), ("b", "p-b"), ("c", "p-c")]


def test_the_probability_of_improvement_is_over_kd(pair) -> None:
    summary = only([*pair("a"), *pair("b")])

    assert rows(summary)["kd"].probability_of_improvement is None
    assert rows(summary)["none"].probability_of_improvement == 0.0
    couples = [1.0 if x > y else 0.5 if x == y else 0.0 for x in NKD for y in KD]
    assert rows(summary)["nkd"].probability_of_improvement == pytest.approx(sum(couples) / 9)


def test_lower_is_better_turns_gaps_and_probabilities(pair) -> None:
    errors = (("none", [4.0, 4.2]), ("kd", [3.0, 3.2]), ("nkd", [2.5, 2.6]))
    same = {"methods": errors, "teacher_metric": 2.0, "higher_is_better": False, "primary": "rmse"}
    nkd = rows(only([*pair("a", **same), *pair("b", **same)]))["nkd"]

    assert nkd.gap_recovered == pytest.approx(np.mean([1.5 / 2.1, 1.6 / 2.1]))
    assert nkd.probability_of_improvement == 1.0


def test_a_single_pair_and_pairs_of_other_recipes_are_not_summed_up(pair) -> None:
    other = pair("b", recipe={"epochs": 6, "lr": 0.1})

    assert summaries(boards(pair("a"))) == []
    assert summaries(boards([*pair("a"), *other])) == []
    assert summaries(boards([*pair("a"), *pair("b", primary="top5")])) == []
    assert summaries(boards([*pair("a"), *pair("b", trials=8)])) == []


def test_what_a_search_varied_and_what_is_only_speed_does_not_part_a_family(pair) -> None:
    space = {"recipe.lr": {}}
    fast = pair("b", recipe={"epochs": 5, "lr": 0.3, "memory_format": "channels_last"}, space=space)

    assert len(only([*pair("a", recipe={"epochs": 5, "lr": 0.1, "memory_format": "contiguous"}, space=space), *fast]).pairs) == 2


def test_a_method_that_not_all_pairs_rank_is_left_out_and_named(pair, make_record) -> None:
    extra = pair("b", methods=(("dkd", NKD),))
    summary = only([*pair("a"), *pair("b"), *extra])

    assert "dkd" not in rows(summary)
    assert any("left out" in note and "dkd (1)" in note for note in summary.notes)


def test_a_method_with_fewer_seeds_on_one_pair_is_left_out(pair) -> None:
    whole = [*pair("a"), *pair("a", methods=(("dkd", NKD),))]
    fewer = [*pair("b", methods=(("dkd", NKD),)), *(record for record in pair("b") if (record.method, record.seed) != ("nkd", 2))]
    summary = only([*whole, *fewer])

    assert set(rows(summary)) == {"none", "kd", "dkd"}
    assert any("nkd (1)" in note for note in summary.notes)


def test_a_pair_without_a_lead_counts_in_no_gap(pair) -> None:
    with_two = only([*pair("a"), *pair("b")])
    summary = only([*pair("a"), *pair("b"), *pair("c", teacher_metric=70.1)])

    assert rows(summary)["nkd"].gap_recovered == rows(with_two)["nkd"].gap_recovered
    assert any("of the 2 pairs" in note for note in summary.notes)
    nobody = rows(only([*pair("a", teacher_metric=70.1), *pair("b", teacher_metric=70.1)]))
    assert (nobody["nkd"].gap_recovered, nobody["nkd"].profile) == (None, None)
    assert nobody["nkd"].probability_of_improvement is not None


def test_average_ranks_need_six_pairs(pair) -> None:
    five = [record for name in "abcde" for record in pair(name)]

    assert (only(five).critical_difference, rows(only(five))["kd"].average_rank) == (None, None)
    assert any("no average ranks" in note for note in only(five).notes)
    six = only([*five, *pair("f", methods=(("none", NONE), ("kd", NKD), ("nkd", KD)))])
    assert {label: row.average_rank for label, row in rows(six).items()} == pytest.approx({"nkd": 7 / 6, "kd": 11 / 6, "none": 3.0})
    assert six.p_value < 0.05
    assert six.critical_difference == pytest.approx(2.343 * np.sqrt(12 / 36), abs=1e-3)


def test_without_kd_nothing_is_said_about_improving_on_it(pair) -> None:
    methods = (("none", NONE), ("nkd", NKD))

    assert rows(only([*pair("a", methods=methods), *pair("b", methods=methods)]))["nkd"].probability_of_improvement is None
