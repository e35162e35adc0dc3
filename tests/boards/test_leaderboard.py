"""Boards are fair: one protocol each, controls found, failures counted, ranks shared where nothing tells two methods apart."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scipy import stats as oracle

from kdbench.boards.board import Board, Row
from kdbench.boards.leaderboard import boards
from kdbench.boards.published import load_published
from kdbench.boards.simultaneous import differences, gap, smallest_found, spreads
from tests.boards.layouts import EVEN, EVEN_LABELS, UNEVEN, WIDE


@pytest.fixture
def finals(make_record):
    """Final records of one label from its test metrics, seeds 0, 1, ..."""

    def make(label: str, values: list[float], **fields: Any) -> list:
        method = fields.pop("method", label)
        return [make_record(method=method, label=label, seed=seed, test_metric=value, **fields) for seed, value in enumerate(values)]

    return make


def only(found: list[Board]) -> Board:
    assert len(found) == 1
    return found[0]


def row(board: Board, label: str) -> Row:
    return next(row for row in board.rows if row.label == label)


def test_a_row_holds_the_means_and_paired_intervals_of_its_seeds(finals) -> None:
    none, kd, nkd = [90.0, 90.4, 89.9], [91.0, 91.2, 90.7], [91.5, 91.8, 91.0]
    board = only(boards([*finals("none", none), *finals("kd", kd), *finals("nkd", nkd)]))

    nkd_row = row(board, "nkd")
    assert nkd_row.mean == pytest.approx(sum(nkd) / 3)
    assert (nkd_row.low, nkd_row.high) == pytest.approx(oracle.t.interval(0.95, 2, nkd_row.mean, oracle.sem(nkd)))
    gain = oracle.ttest_rel(nkd, none).confidence_interval()
    assert (nkd_row.gain_low, nkd_row.gain_high) == pytest.approx((gain.low, gain.high))
    assert nkd_row.gain == pytest.approx((gain.low + gain.high) / 2)
    against = oracle.ttest_rel(nkd, kd).confidence_interval()
    assert (nkd_row.vs_control_low, nkd_row.vs_control_high) == pytest.approx((against.low, against.high))
    assert nkd_row.gap_recovered == pytest.approx((nkd_row.mean - row(board, "none").mean) / (94.0 - row(board, "none").mean))
    assert nkd_row.seeds == 3
    assert board.teacher_metric == 94.0


def test_a_control_is_not_compared_with_itself(finals) -> None:
    board = only(boards([*finals("none", [90.0, 90.2]), *finals("kd", [91.0, 91.2])]))

    assert (row(board, "kd").vs_control, row(board, "none").gain, row(board, "none").gap_recovered) == (None, None, None)
    assert row(board, "none").vs_control == pytest.approx(-1.0)


def test_a_rank_is_the_interval_of_the_ranks_that_a_method_may_have(finals) -> None:
    """As many as are surely better come before it, as many as are surely worse after it: the written board, through the whole way."""
    values = dict(zip(EVEN_LABELS, EVEN, strict=True))
    board = only(boards([record for label, of in values.items() for record in finals(label, of, teacher_metric=86.8)]))

    found = {r.label: (r.rank, r.rank_high) for r in board.rows}
    assert found == {"none": (4, 6), "label_smoothing": (4, 6), "kd": (1, 3), "nkd": (1, 3), "dkd": (1, 3), "tf_nkd": (4, 6)}
    assert [r.label for r in board.leaders] == ["dkd", "nkd", "kd"]
    assert "may be the best: dkd, nkd, kd" in board.findings
    assert row(board, "dkd").better_than == {"none", "label_smoothing", "tf_nkd"}
    assert row(board, "dkd").apart_from(row(board, "none"))
    assert row(board, "none").apart_from(row(board, "dkd"))
    assert not row(board, "dkd").apart_from(row(board, "kd"))
    dkd, kd = row(board, "dkd"), row(board, "kd")
    assert (dkd.shown_gain, dkd.shown_difference) == (
        pytest.approx((5.3, 3.776059926, 6.823940074)),
        pytest.approx((0.95, -0.7114882733, 2.611488273)),
    )
    assert (dkd.gap_recovered, dkd.gap_low, dkd.gap_high) == pytest.approx((0.636, 0.5010012902, 0.7559418581))
    assert (kd.gap_recovered, kd.gap_low, kd.gap_high) == pytest.approx((0.522, 0.3333801809, 0.6908473600))
    assert board.detectable == pytest.approx(2.075733163)
    assert board.errors is not None
    assert (board.errors.pool, board.errors.df, board.errors.comparisons) == (pytest.approx(0.3070555556), 10, 5)


def test_further_seeds_of_the_controls_make_differences_surer_and_leave_the_ranks(finals, make_record) -> None:
    values = dict(zip(EVEN_LABELS, EVEN, strict=True))
    records = [record for label, of in values.items() for record in finals(label, of)]
    more = [make_record(method="kd", seed=3 + place, test_metric=value) for place, value in enumerate([82.9, 83.1, 82.4])]
    before, after = only(boards(records)), only(boards([*records, *more]))

    assert row(after, "dkd").shown_difference == pytest.approx((0.9583333333, -0.2870379071, 2.203704574))
    assert row(after, "none").shown_difference == pytest.approx((-4.341666667, -5.778064845, -2.905268489))
    assert {r.label: (r.rank, r.rank_high) for r in after.rows} == {r.label: (r.rank, r.rank_high) for r in before.rows}
    assert row(after, "kd").mean == pytest.approx((83.55 + 82.25 + 82.65 + 82.9 + 83.1 + 82.4) / 6)
    assert after.detectable < before.detectable
    assert any(note.startswith("kd has 3 more seeds, which differences use") for note in after.notes)


def test_both_controls_with_further_seeds_are_compared_over_all_of_them(finals, make_record) -> None:
    values = dict(zip(EVEN_LABELS, EVEN, strict=True))
    records = [record for label, of in values.items() for record in finals(label, of)]
    kd, none = [82.9, 83.1, 82.4], [78.1, 78.9, 78.4]
    records += [make_record(method="kd", seed=3 + place, test_metric=value) for place, value in enumerate(kd)]
    records += [make_record(method="none", seed=3 + place, test_metric=value) for place, value in enumerate(none)]
    board = only(boards(records))

    known, extra = spreads(EVEN), {2: kd, 0: none}
    expected = differences(EVEN, 0, known, extra=extra)
    assert row(board, "kd").over_undistilled.middle == pytest.approx(expected[2].middle)
    assert row(board, "kd").over_undistilled.error == pytest.approx(expected[2].error)
    assert row(board, "nkd").over_undistilled.low == pytest.approx(expected[3].low)
    assert row(board, "nkd").gap_low == pytest.approx(gap(expected[3], EVEN, 0, known, 94.0, extra)[1])
    assert any(note.startswith("kd and none have 3 more seeds") for note in board.notes)


def test_methods_that_are_equal_nearly_always_share_rank_1_as_the_docs_say(finals) -> None:
    """12 equal methods with 3 seeds: all may be the best on 97% of 2,000 boards."""
    generator, count = random.Random(0), 100
    records = [
        record
        for number in range(count)
        for method in range(12)
        for record in finals(f"m{method}", [generator.gauss(80, 1) for _ in range(3)], protocol_hash=f"p{number}")
    ]
    shared = sum(len(board.leaders) == 12 for board in boards(records))

    assert shared / count > 0.97 - 4 * math.sqrt(0.97 * 0.03 / count)


def test_one_seed_ranks_nobody_above_another_and_says_so(finals) -> None:
    board = only(boards([*finals("none", [90.0]), *finals("kd", [95.0])]))

    assert [(r.rank, r.rank_high) for r in board.rows] == [(1, 2), (1, 2)]
    assert (row(board, "kd").gain, row(board, "kd").shown_gain) == (5.0, (5.0, None, None))
    assert row(board, "kd").gain_low is None
    assert any("one seed" in note for note in board.notes)


@pytest.mark.parametrize("broken", [{"status": "failed", "test_metric": None}, {"test_metric": math.nan}])
def test_a_failed_seed_counts_as_the_undistilled_student_of_that_seed(finals, make_record, broken) -> None:
    records = [*finals("none", [90.0, 80.0]), *finals("kd", [91.0]), make_record(method="kd", seed=1, **broken)]
    board = only(boards(records))

    kd = row(board, "kd")
    assert (kd.mean, kd.seeds, kd.failed, kd.rank) == (85.5, 2, 1, 1)
    assert kd.gain == pytest.approx(0.5)
    assert any("failed seeds" in note and "kd (1)" in note for note in board.notes)


def test_a_failed_seed_without_an_undistilled_student_is_missing(finals, make_record) -> None:
    records = [*finals("kd", [91.0, 92.0]), *finals("nkd", [95.0]), make_record(method="nkd", seed=1, status="failed", test_metric=None)]
    board = only(boards(records))

    nkd = row(board, "nkd")
    assert (nkd.mean, nkd.seeds, nkd.failed, nkd.rank) == (95.0, 1, 1, None)


def test_all_seeds_failed_and_nothing_to_count_instead_is_a_row_without_numbers(make_record) -> None:
    board = only(boards([make_record(status="failed", test_metric=None)]))

    assert (board.rows[0].mean, board.rows[0].rank, board.rows[0].failed) == (None, None, 1)


def test_a_stopped_run_is_not_a_result(finals, make_record) -> None:
    assert boards([make_record(status="stopped")]) == []


def test_fewer_seeds_than_others_are_listed_last_without_a_rank(finals) -> None:
    records = [*finals("none", [90.0, 90.1, 90.2]), *finals("kd", [91.0, 91.1, 91.2]), *finals("at", [90.0, 90.1, 90.2])]
    board = only(boards([*records, *finals("nkd", [99.0, 99.0])]))

    assert [(r.label, r.rank) for r in board.rows] == [("kd", 1), ("at", 1), ("none", 1), ("nkd", None)]
    assert any("not ranked, not all of the 3 seeds that others have: nkd (2)" in note for note in board.notes)


def test_protocols_and_pairs_are_never_mixed(finals) -> None:
    records = [
        *finals("kd", [90.0]),
        *finals("kd", [91.0], protocol_hash="p2"),
        *finals("kd", [92.0], student="other"),
        *finals("kd", [93.0], teacher="other"),
        *finals("kd", [94.0], data="cifar10"),
        *finals("kd", [95.0], task="segmentation"),
    ]

    assert sorted(board.rows[0].mean for board in boards(records)) == [90, 91, 92, 93, 94, 95]


def test_other_weights_of_the_same_teacher_make_another_board_with_the_same_undistilled_student(finals) -> None:
    records = [
        *finals("none", [90.0], teacher_sha="a"),
        *finals("kd", [91.0], teacher_sha="a", teacher_metric=93.0),
        *finals("kd", [92.0], teacher_sha="b", teacher_metric=95.0),
        *finals("label_smoothing", [90.5]),
    ]

    found = {board.teacher_sha: board for board in boards(records)}

    assert {sha: (row(b, "kd").mean, row(b, "kd").gain, b.teacher_metric) for sha, b in found.items()} == {
        "a": (91.0, 1.0, 93.0),
        "b": (92.0, 2.0, 95.0),
    }
    assert all(len(board.rows) == 3 for board in found.values())


def test_only_finals_of_ours_are_ranked(finals) -> None:
    records = [*finals("kd", [90.0]), *finals("nkd", [99.0], role="candidate"), *finals("dkd", [99.0], source="published")]

    assert [r.label for r in only(boards(records)).rows] == ["kd"]


def test_the_teachers_own_record_gives_its_metric_where_finals_do_not(finals, make_record) -> None:
    teacher = make_record(role="teacher", method="none", teacher=None, student="cifar_resnet56", test_metric=93.5, teacher_metric=None)

    assert only(boards([teacher, *finals("kd", [91.0], teacher_metric=None)])).teacher_metric == 93.5


def test_another_setting_of_a_label_replaces_the_older_and_is_never_averaged_in(finals) -> None:
    older = finals("kd", [80.0, 80.0, 80.0], params={"temperature": 1.0})
    newer = finals("kd", [90.0], params={"temperature": 4.0})
    board = only(boards([*newer, *older[:1], *finals("none", [85.0] * 3), *older[1:]]))
    assert row(board, "kd").mean == 90.0
    assert row(board, "kd").rank is None
    assert any("left out: kd (3)" in note for note in board.notes)


def test_the_only_method_kd_is_the_control_under_any_label(finals) -> None:
    board = only(
        boards([*finals("hinton", [91.0, 91.2], method="kd"), *finals("plain", [90.0, 90.1], method="none"), *finals("nkd", [92.0, 92.3])])
    )

    assert row(board, "hinton").vs_control is None
    assert row(board, "nkd").vs_control == pytest.approx(1.05)
    assert row(board, "nkd").gain == pytest.approx(2.1)


def test_the_label_kd_is_the_control_among_several(finals) -> None:
    board = only(boards([*finals("kd", [91.0]), *finals("kd_hot", [93.0], method="kd")]))

    assert row(board, "kd_hot").vs_control == 2.0
    assert row(board, "kd").vs_control is None


def test_lower_is_better_turns_signs_and_order(finals) -> None:
    common = {"primary": "rmse", "higher_is_better": False, "teacher_metric": 2.0}
    board = only(boards([*finals("none", [4.0, 4.2], **common), *finals("kd", [3.0, 3.2], **common), *finals("nkd", [3.5, 3.7], **common)]))

    assert [r.label for r in board.rows] == ["kd", "nkd", "none"]
    kd, nkd = row(board, "kd"), row(board, "nkd")
    assert (kd.gain, kd.gain_low, kd.gain_high) == pytest.approx((1.0, 1.0, 1.0))
    assert nkd.vs_control == pytest.approx(-0.5)
    assert kd.gap_recovered == pytest.approx(1.0 / 2.1)


def test_methods_that_are_surely_better_or_worse_than_tuned_kd_are_findings_and_open_ones_are_not(finals) -> None:
    records = [
        *finals("none", [90.0, 90.1, 90.2]),
        *finals("kd", [91.0, 91.1, 91.2], trials=8),
        *finals("nkd", [92.0, 92.1, 92.22], trials=8),
        *finals("dkd", [91.0, 91.3, 91.1], trials=8),
        *finals("at", [90.5, 90.6, 90.71], trials=8),
        *finals("label_smoothing", [90.0, 90.1, 90.2], trials=8),
    ]
    board = only(boards(records))

    assert board.findings == ("may be the best: nkd", "worse than kd, each as tuned here: at", "better than kd, each as tuned here: nkd")
    assert "no difference from kd was found, which does not show that there is none: dkd" in board.notes
    assert any("of these parameters (one search)" in note and "a second search was not made" in note for note in board.notes)


def test_kd_that_was_not_tuned_is_not_called_tuned(finals) -> None:
    board = only(boards([*finals("none", [90.0, 90.1]), *finals("kd", [91.0, 91.02]), *finals("nkd", [92.0, 92.1])]))

    assert "better than kd, each as tuned or configured here (kd is not tuned): nkd" in board.findings


def test_one_seed_finds_nothing_about_a_method(finals) -> None:
    board = only(boards([*finals("none", [90.0]), *finals("kd", [91.0]), *finals("nkd", [92.0])]))

    assert board.findings == ()
    assert not any("no difference" in note for note in board.notes)


def test_distilling_that_makes_every_student_worse_is_a_finding(finals) -> None:
    none = finals("none", [97.7, 97.6, 97.68])
    records = [
        *none,
        *finals("kd", [95.3, 95.2, 95.4]),
        *finals("fragile", [95.7, 95.6, 95.8]),
        *finals("label_smoothing", [98.0, 98.1, 97.9]),
    ]

    board = only(boards(records))
    assert "distilling hurts here: every distilled method is surely worse than the undistilled student" in board.findings
    assert board.best_distilled is not None
    assert board.best_distilled.label == "fragile"
    open_ = only(boards([*records, *finals("dkd", [97.4, 97.8, 97.5])]))
    assert "distilling with kd hurts here: it is surely worse than the undistilled student" in open_.findings
    assert not any("every distilled" in finding for finding in open_.findings)
    assert not any("hurts" in f for f in only(boards([*none, *finals("kd", [95.0, 97.7, 97.0])])).findings)
    assert only(boards(none)).best_distilled is None


@pytest.mark.parametrize(("teacher", "said"), [(97.42, True), (97.66, True), (97.7, False)])
def test_a_teacher_that_is_no_better_than_the_undistilled_student_is_a_finding(finals, teacher: float, said: bool) -> None:
    board = only(boards([*finals("none", [97.66, 97.66]), *finals("kd", [95.0, 98.0], teacher_metric=teacher)]))

    assert (f"the teacher ({teacher:.2f}) is no better than the undistilled student (97.66)" in board.findings) is said
    assert any("the teacher's lead over the undistilled student is below 0.5" in note for note in board.notes) is not said


def test_a_teacher_whose_error_is_lower_is_better(finals) -> None:
    common = {"primary": "rmse", "higher_is_better": False}
    found = [only(boards(finals("none", [4.0, 4.2], teacher_metric=metric, **common))).findings for metric in (2.0, 5.0)]

    assert [any(f.startswith("the teacher (5.00) is no better than the undistilled student (4.10)") for f in each) for each in found] == [
        False,
        True,
    ]


def test_a_method_whose_seeds_all_failed_has_no_figures_and_no_rank(finals, make_record) -> None:
    lost = [make_record(method="w", seed=seed, status="failed", test_metric=None) for seed in range(3)]
    board = only(boards([*finals("none", [90.0, 90.1, 90.2]), *finals("kd", [90.0, 90.5, 89.9]), *lost]))

    w = row(board, "w")
    assert (w.rank, w.mean, w.gain, w.vs_control, w.vs_control_p, w.seeds, w.failed) == (None, None, None, None, None, 0, 3)
    assert board.rows[-1] is w
    assert "not ranked, every seed failed: w (3)" in board.notes
    assert not any("failed seeds count" in note or "fewer than" in note for note in board.notes)


def test_a_control_whose_seeds_all_failed_is_compared_with_nothing(finals, make_record) -> None:
    """The undistilled student's values stood in for kd's, so methods seemed to beat kd."""
    nkd, lost = finals("nkd", [92.0, 92.1, 92.2]), {"status": "failed", "test_metric": None}
    no_kd = only(boards([*finals("none", [90.0, 90.1, 90.21]), *nkd, *(make_record(method="kd", seed=s, **lost) for s in range(3))]))
    no_none = only(boards([*finals("kd", [90.0, 90.1, 90.21]), *nkd, *(make_record(method="none", seed=s, **lost) for s in range(3))]))

    assert (row(no_kd, "nkd").vs_control, row(no_kd, "nkd").gain) == (None, pytest.approx(2.0, abs=0.01))
    assert no_kd.findings[-1] == "no seed of kd finished: whether a method beats it is not known"
    assert row(no_none, "nkd").gain is None
    assert no_none.findings[0] == "no seed of the undistilled student (none) finished: gains can't be given"


def test_missing_controls_are_findings(finals) -> None:
    board = only(boards(finals("nkd", [92.0, 92.5])))

    assert [("undistilled" in f, "no kd" in f) for f in board.findings] == [(True, False), (False, True)]
    assert (board.rows[0].gain, board.rows[0].vs_control, board.rows[0].gap_recovered) == (None, None, None)


def test_unequal_search_budgets_are_shouted(finals) -> None:
    equal = only(boards([*finals("none", [90.0], trials=8, sampler="tpe", scheduler="asha"), *finals("kd", [91.0], trials=8)]))
    unequal = only(boards([*finals("none", [90.0]), *finals("kd", [91.0], trials=8)]))

    assert equal.notes[0] == "1 seed a method; search: 8 trials a method (asha, tpe)"
    assert unequal.notes[0] == "1 seed a method; search budgets DIFFER: kd 8, none 0"


def test_cost_is_the_mean_training_plus_the_whole_search(finals) -> None:
    records = finals("kd", [91.0], device_hours=1.0, search_device_hours=5.0, latency_ms_p50=3.0, params_count=78042)
    records += [record.model_copy(update={"seed": 1, "device_hours": 2.0, "run_id": "second", "latency_ms_p50": 5.0}) for record in records]
    kd = only(boards(records)).rows[0]

    assert (kd.device_hours, kd.latency_ms_p50, kd.params_count) == (6.5, 4.0, 78042)
    assert kd.run_ids == (records[0].run_id, "second")


def test_published_figures_stand_beside_and_change_nothing(finals) -> None:
    records = [*finals("none", [90.0]), *finals("nkd", [91.0])]
    board = only(boards(records, published=load_published()))

    assert {figure.method for figure in board.published} == {"nkd"}
    assert board.rows == only(boards(records)).rows


# --- what few seeds and many methods allow to say --------------------------------------------------------------------


@pytest.fixture
def crowded(finals):
    """kd and five methods on three seeds."""
    values = {
        "none": [90.0, 90.1, 90.2],
        "kd": [91.0, 91.2, 91.1],
        "a": [92.4, 92.5, 92.6],
        "b": [91.6, 91.9, 91.4],
        "c": [91.5, 90.7, 91.2],
        "d": [90.8, 91.5, 91.1],
        "e": [89.6, 89.9, 89.8],
    }
    return [record for label, of in values.items() for record in finals(label, of)], values


def test_a_verdict_is_an_interval_that_leaves_out_0_among_all_comparisons_with_kd(crowded) -> None:
    records, values = crowded
    board = only(boards(records))

    block = [*values.values()]
    expected = dict(zip([label for label in values if label != "kd"], differences(block, 1, spreads(block)).values(), strict=True))
    for label, one in expected.items():
        assert row(board, label).shown_difference == pytest.approx((one.middle, one.low, one.high))
        assert row(board, label).over_control.p == pytest.approx(one.p)
        alone = oracle.ttest_rel(values[label], values["kd"])
        assert row(board, label).vs_control_p == pytest.approx(alone.pvalue)
    assert {r.label: r.verdict for r in board.rows} == {"a": 1, "b": 0, "c": 0, "d": 0, "e": -1, "none": -1, "kd": 0}
    assert board.findings[1:] == (
        "worse than kd, each as tuned or configured here (kd is not tuned): e",
        "better than kd, each as tuned or configured here (kd is not tuned): a",
    )


def test_the_detectable_difference_is_said_with_what_more_seeds_would_find(crowded) -> None:
    records, values = crowded
    board = only(boards(records))

    known = spreads([*values.values()])
    assert board.detectable == pytest.approx(smallest_found(7, 3, known))
    (said,) = (note for note in board.notes if note.startswith("a true difference from kd below"))
    assert f"below {board.detectable:.2g} is missed more than one time in 5" in said
    assert f"with 6 seeds {smallest_found(7, 6, known.with_seeds(6)):.2g}" in said
    needed = int(said.rpartition("to find 1: ")[2].split()[0])
    assert smallest_found(7, needed, known.with_seeds(needed)) <= 1
    assert needed == 2 or smallest_found(7, needed - 1, known.with_seeds(needed - 1)) > 1


def test_a_method_whose_seeds_scatter_is_judged_by_its_own_and_the_others_keep_their_intervals(finals) -> None:
    rows = dict(zip(["none", "kd", "m1", "m2", "m3", "m4", "m5"], WIDE[:7], strict=True))
    calm = only(boards([record for label, of in rows.items() for record in finals(label, of)]))
    with_wild = only(boards([record for label, of in (rows | {"wild": [71.9, 40, 72]}).items() for record in finals(label, of)]))

    assert "wild's seeds scatter far more than the others': it is judged by its own alone" in with_wild.notes
    assert with_wild.errors is not None
    assert with_wild.errors.wide == ("wild",)
    assert row(with_wild, "wild").verdict == 0
    width = {
        name: row(board, "m1").over_control.high - row(board, "m1").over_control.low
        for name, board in (("calm", calm), ("wild", with_wild))
    }
    assert width["wild"] < 1.1 * width["calm"]
    wild_kd = only(boards([record for label, of in (rows | {"kd": [71.9, 40, 72]}).items() for record in finals(label, of)]))
    assert any(note.startswith("kd's own seeds scatter far more than the others'") for note in wild_kd.notes)


def test_spreads_that_differ_are_said_to(finals) -> None:
    rows = dict(zip(["none", "kd", "a", "b", "c", "d"], UNEVEN, strict=True))
    board = only(boards([record for label, of in rows.items() for record in finals(label, of)]))

    assert "the methods' spreads differ: intervals are taken wider (9 degrees of freedom instead of 15)" in board.notes


def test_seeds_that_agree_exactly_give_no_interval_and_no_verdict_unless_the_metric_moves_in_steps(finals) -> None:
    rows = {"none": [90.0] * 3, "kd": [91.0] * 3, "nkd": [92.0] * 3}
    blind = only(boards([record for label, of in rows.items() for record in finals(label, of)]))
    scale = {"step": 0.5, "low": 0.0, "high": 100.0, "smallest_gap": 0.5}
    stepped = only(boards([record for label, of in rows.items() for record in finals(label, of, primary_scale=scale)]))

    assert "all seeds agree exactly: nothing is told apart" in blind.notes
    assert {(r.rank, r.rank_high, r.low, r.verdict) for r in blind.rows} == {(1, 3, None, 0)}
    assert row(blind, "nkd").shown_gain == (2.0, None, None)
    assert row(stepped, "nkd").verdict == 1
    assert row(stepped, "nkd").high - row(stepped, "nkd").mean == pytest.approx(oracle.t.ppf(0.975, 2) * (0.5**2 / 12 / 3) ** 0.5)


def test_an_interval_of_a_mean_ends_at_the_bounds_of_the_metric(finals) -> None:
    scale = {"step": 0.05, "low": 0.0, "high": 100.0}
    board = only(boards([*finals("none", [99.0, 99.9, 99.5], primary_scale=scale), *finals("kd", [0.1, 1.9, 0.4], primary_scale=scale)]))

    assert row(board, "none").high == 100.0
    assert row(board, "kd").low == 0.0
    assert row(board, "none").low < 99.0


def test_the_smallest_lead_that_is_shared_out_is_the_tasks(finals) -> None:
    scale = {"step": 0.0, "low": 0.0, "high": 1.0, "smallest_gap": 0.005}
    values = {"none": [0.700, 0.701, 0.702], "kd": [0.710, 0.7105, 0.712], "nkd": [0.7111, 0.712, 0.713]}
    with_scale = [r for label, of in values.items() for r in finals(label, of, primary_scale=scale, teacher_metric=0.75)]
    without = [r for label, of in values.items() for r in finals(label, of, teacher_metric=0.75)]

    assert row(only(boards(with_scale)), "kd").gap_recovered == pytest.approx((0.71083333 - 0.701) / (0.75 - 0.701), rel=1e-4)
    assert row(only(boards(without)), "kd").gap_recovered is None


def test_any_method_may_be_the_control(crowded) -> None:
    records, values = crowded
    board = only(boards(records, control="a"))
    block = [*values.values()]
    expected = dict(zip([label for label in values if label != "a"], differences(block, 2, spreads(block)).values(), strict=True))

    assert board.control == "a"
    assert row(board, "kd").shown_difference == pytest.approx((expected["kd"].middle, expected["kd"].low, expected["kd"].high))
    assert any(finding.startswith("worse than a") and finding.endswith("e") for finding in board.findings)
    missing = only(boards(records, control="nothing"))
    assert missing.control is None
    assert any(note.startswith("nothing is not on this board") for note in missing.notes)


def test_without_kd_or_with_one_seed_no_effect_is_called_detectable(finals) -> None:
    one_seed = only(boards([*finals("kd", [91.0]), *finals("nkd", [92.0])]))
    no_kd = only(boards(finals("nkd", [92.0, 92.5])))

    assert (one_seed.detectable, no_kd.detectable) == (None, None)
    assert (row(one_seed, "nkd").vs_control_p, row(one_seed, "nkd").verdict) == (None, 0)


def test_a_board_names_the_rows_that_gains_and_differences_are_over(finals) -> None:
    board = only(boards([*finals("plain", [90.0], method="none"), *finals("hinton", [91.0], method="kd")]))

    assert (board.undistilled, board.control) == ("plain", "hinton")
    assert (only(boards(finals("nkd", [92.0]))).undistilled, only(boards(finals("nkd", [92.0]))).control) == (None, None)


def test_a_row_keeps_the_values_that_count_by_seed(finals, make_record) -> None:
    records = [*finals("none", [90.0, 80.0]), *finals("kd", [91.0]), make_record(method="kd", seed=1, status="failed", test_metric=None)]

    assert row(only(boards(records)), "kd").values == {0: 91.0, 1: 80.0}


def test_rows_that_deploy_one_network_have_one_latency(finals) -> None:
    same = {"params_count": 100, "flops": 1000}
    records = [
        *finals("none", [90.0, 90.1], latency_ms_p50=1.0, **same),
        *finals("kd", [91.0, 91.1], latency_ms_p50=1.4, **same),
        *finals("nkd", [92.0], latency_ms_p50=1.2, **same),  # too few seeds to be ranked; its measurement is of the same network
        *finals("pruned", [90.2, 90.3], latency_ms_p50=0.5, params_count=50, flops=500),
        *finals("odd", [90.2, 90.3], latency_ms_p50=7.0, params_count=50, flops=None),
        *finals("other", [90.2, 90.3], latency_ms_p50=8.0, params_count=50, flops=None),
        *finals("unknown", [90.2, 90.3], latency_ms_p50=None),
    ]

    latencies = {r.label: r.latency_ms_p50 for r in only(boards(records)).rows}
    assert latencies == {"none": 1.2, "kd": 1.2, "nkd": 1.2, "pruned": 0.5, "odd": 7.0, "other": 8.0, "unknown": None}


def test_the_front_of_a_cost_holds_what_nothing_better_undercuts(finals) -> None:
    same = {"params_count": 100, "flops": 1000}
    records = [
        *finals("none", [90.0, 90.1], device_hours=1.0, latency_ms_p50=1.0, **same),
        *finals("kd", [91.0, 91.1], device_hours=2.0, search_device_hours=3.0, latency_ms_p50=1.2, **same),
        *finals("nkd", [90.5, 90.6], device_hours=6.0, latency_ms_p50=0.9, **same),  # faster by the noise of measuring alone
        *finals("pruned", [90.2, 90.3], device_hours=9.0, latency_ms_p50=0.5, params_count=50, flops=500),
        *finals("few", [99.0], device_hours=0.1, latency_ms_p50=0.1, params_count=1, flops=1),  # too few seeds to be compared
    ]
    board = only(boards(records))

    assert {r.label: r.pareto for r in board.rows} == {
        "kd": ("latency_ms_p50", "params_count", "device_hours"),
        "nkd": (),
        "pruned": ("latency_ms_p50", "params_count"),
        "none": ("device_hours",),
        "few": (),
    }
    for r in board.rows:
        assert not set(r.pareto_sure) & set(r.pareto_off)
    assert row(board, "none").pareto_sure == ("device_hours",)  # nothing else is as cheap
    assert row(board, "kd").pareto_off == ()
    assert row(board, "few").pareto_sure == row(board, "few").pareto_off == ()
