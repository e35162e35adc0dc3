"""Boards are fair: one protocol each, controls found, failures counted, ranks shared where nothing tells two methods apart."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
from scipy import stats as oracle

from kdbench.boards.leaderboard import Board, Row, boards
from kdbench.boards.published import load_published
from kdbench.boards.stats import detectable_effect


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


def test_methods_that_nothing_tells_apart_share_a_rank(finals) -> None:
    records = [
        *finals("a", [92.0, 93.0, 94.0]),
        *finals("b", [93.0, 92.0, 93.5]),  # crosses a: the interval of the difference holds 0
        *finals("c", [91.0, 92.0, 93.1]),  # a point below a on every seed, yet closer to b
        *finals("d", [91.1, 91.9, 93.0]),
    ]
    board = only(boards(records))

    assert [(r.label, r.rank) for r in board.rows] == [("a", 1), ("b", 1), ("c", 3), ("d", 3)]


def test_methods_that_are_equal_often_get_several_ranks_as_the_docs_say(finals) -> None:
    """A rank is no statement about a difference: 12 equal methods with 3 seeds get several on 60% of boards (2,000 boards)."""
    generator, count = random.Random(0), 100
    records = [
        record
        for number in range(count)
        for method in range(12)
        for record in finals(f"m{method}", [generator.gauss(80, 1) for _ in range(3)], protocol_hash=f"p{number}")
    ]
    several = sum(len({r.rank for r in board.rows}) > 1 for board in boards(records))

    spread = math.sqrt(0.6 * 0.4 / count)
    assert abs(several / count - 0.6) < 4 * spread


def test_one_seed_ranks_nobody_above_another_and_says_so(finals) -> None:
    board = only(boards([*finals("none", [90.0]), *finals("kd", [95.0])]))

    assert [r.rank for r in board.rows] == [1, 1]
    assert row(board, "kd").gain == 5.0
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
    board = only(boards([*finals("none", [90.0, 90.1, 90.2]), *finals("kd", [91.0, 91.1, 91.2]), *finals("nkd", [99.0, 99.0])]))

    assert [(r.label, r.rank) for r in board.rows] == [("kd", 1), ("none", 2), ("nkd", None)]
    assert any("not ranked, fewer than 3 seeds: nkd (2)" in note for note in board.notes)


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
        *finals("dkd", [91.0, 91.5, 90.9], trials=8),
        *finals("at", [90.5, 90.6, 90.71], trials=8),
        *finals("label_smoothing", [90.0, 90.1, 90.2], trials=8),
    ]
    board = only(boards(records))

    assert board.findings == ("worse than tuned kd: at", "beats tuned kd: nkd")
    assert "no difference from tuned kd was found, which does not show that there is none: dkd" in board.notes


def test_kd_that_was_not_tuned_is_not_called_tuned(finals) -> None:
    board = only(boards([*finals("none", [90.0, 90.1]), *finals("kd", [91.0, 91.0]), *finals("nkd", [92.0, 92.1])]))

    assert board.findings == ("beats kd (not tuned): nkd",)


def test_one_seed_finds_nothing_about_a_method(finals) -> None:
    board = only(boards([*finals("none", [90.0]), *finals("kd", [91.0]), *finals("nkd", [92.0])]))

    assert board.findings == ()
    assert not any("no difference" in note for note in board.notes)


def test_distilling_that_makes_every_student_worse_is_a_finding(finals) -> None:
    none = finals("none", [97.7, 97.6, 97.68])
    records = [*none, *finals("kd", [95.3, 95.2, 95.4]), *finals("fragile", [95.7, 95.6, 95.8]), *finals("label_smoothing", [98.0] * 3)]

    board = only(boards(records))
    assert "distilling hurts here: every distilled method is surely worse than the undistilled student" in board.findings
    assert board.best_distilled is not None
    assert board.best_distilled.label == "fragile"
    open_ = only(boards([*records, *finals("dkd", [97.0, 98.0, 97.5])]))
    assert "distilling with kd (not tuned) hurts here: it is surely worse than the undistilled student" in open_.findings
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
    assert no_kd.findings == ("no seed of kd finished: whether a method beats it is not known",)
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
    """kd and five methods on three seeds; only `a` beats kd when one asks how many were tried, `b` when one does not."""
    kd = [91.0, 91.2, 91.1]
    differences = {"a": [1.0, 1.02, 1.01], "b": [1.0, 1.3, 0.8], "c": [0.5, -0.5, 0.1], "d": [-0.2, 0.3, 0.0], "e": [-1.0, -1.02, -1.01]}
    methods = [finals(label, [x + y for x, y in zip(kd, by, strict=True)]) for label, by in differences.items()]
    return [*finals("none", [90.0, 90.1, 90.2]), *finals("kd", kd), *(record for records in methods for record in records)], differences


def test_verdicts_against_kd_are_corrected_for_the_number_of_methods(crowded) -> None:
    records, differences = crowded
    board = only(boards(records))

    plain = {label: oracle.ttest_1samp(by, 0.0).pvalue for label, by in differences.items()}
    p_values = {r.label: r.vs_control_p for r in board.rows}
    assert p_values["b"] == pytest.approx(3 * plain["b"])  # the third smallest of five
    assert min(plain["a"], plain["e"]) * 5 == pytest.approx(min(p_values["a"], p_values["e"]), rel=1e-6)
    assert (p_values["kd"], p_values["none"]) == (None, None)
    assert {r.label: r.verdict for r in board.rows} == {"a": 1, "b": 0, "c": 0, "d": 0, "e": -1, "none": -1, "kd": 0}
    assert board.findings == ("worse than kd (not tuned): e", "beats kd (not tuned): a")
    assert row(board, "b").vs_control_low > 0
    assert any(note == "the interval to kd leaves out 0, but not after Holm's correction for 5 methods: b" for note in board.notes)


def test_the_detectable_effect_is_that_of_the_pooled_spread_and_of_holms_first_step(crowded) -> None:
    records, differences = crowded
    board = only(boards(records))

    spread = math.sqrt(sum(statistics.variance(by) for by in differences.values()) / 5)
    assert board.detectable == pytest.approx(detectable_effect(3, spread, comparisons=5))
    said = f"with 3 seeds, this board has less than 80% power to detect a difference from kd smaller than {board.detectable:.2g}"
    assert said in board.notes


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
