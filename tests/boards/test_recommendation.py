"""The answer keeps to the budget, has the best metric first, says how sure its gain is, and what comes nearest where nothing qualifies."""

from __future__ import annotations

import json

import pytest
from scipy import stats as oracle

from kdbench.boards.leaderboard import boards
from kdbench.boards.recommendation import Answer, Budget, Option, answer_data, milliseconds, parameter_count, recommend
from kdbench.boards.simultaneous import differences, spreads
from kdbench.cli.pages import recommendation_page
from kdbench.errors import UserError

SMALL = {"student": "small", "latency_ms_p50": 2.0, "params_count": 20_000, "latency_device": "cpu"}
LARGE = {"student": "large", "latency_ms_p50": 8.0, "params_count": 300_000, "latency_device": "cpu"}
NONE, KD, NKD, WILD = [70.0, 70.4, 69.8], [72.0, 72.3, 71.9], [71.5, 71.8, 71.35], [80.0, 65.5, 72.5]


@pytest.fixture
def records(make_record):
    """Two students; on each `none`, and kd and nkd that are surely better, and a wild method that is better on average."""

    def finals(method: str, values: list[float], shift: float, **fields):
        given = {"device_hours": 1.0, "search_device_hours": 3.0, "teacher_metric": 80.0, "params": {"temperature": 4.0}, **fields}
        return [make_record(method=method, seed=seed, test_metric=value + shift, **given) for seed, value in enumerate(values)]

    methods = {"none": NONE, "kd": KD, "nkd": NKD, "dkd": WILD}
    return [
        record
        for student, shift in ((SMALL, 0.0), (LARGE, 3.0))
        for method, values in methods.items()
        for record in finals(method, values, shift, **student)
    ]


def answer(records, **budget) -> Answer:
    [found] = recommend(boards(records), records, Budget(**budget))
    return found


def names(found: Answer) -> list[tuple[str, str]]:
    return [(option.board.student, option.row.label) for option in found.options]


def test_the_rows_of_all_students_are_ordered_by_their_mean(records) -> None:
    found = answer(records)

    assert names(found) == [(student, label) for student in ("large", "small") for label in ("dkd", "kd", "nkd", "none")]
    assert [option.row.mean for option in found.options] == sorted((option.row.mean for option in found.options), reverse=True)
    assert [option.sure for option in found.options[:4]] == [False, True, True, False]
    assert found.verdict == "unsure"


def test_an_undistilled_student_that_is_better_than_every_distilled_one_is_the_answer(make_record) -> None:
    """A better student without a teacher was left out, and a worse baseline's gain was preferred."""
    values = {("large", "none"): [98.6, 98.7, 98.65], ("small", "none"): [92.0, 92.1, 92.05], ("small", "kd"): [97.3, 97.2, 97.37]}
    records = [
        make_record(method=method, seed=seed, test_metric=value, student=student, protocol_hash=student, latency_ms_p50=0.16)
        for (student, method), metrics in values.items()
        for seed, value in enumerate(metrics)
    ]

    assert [(*name, round(option.row.mean, 2)) for name, option in zip(names(answer(records)), answer(records).options, strict=True)] == [
        ("large", "none", 98.65),
        ("small", "kd", 97.29),
        ("small", "none", 92.05),
    ]
    assert any("the first option is an undistilled student" in note for note in answer(records).notes)
    assert names(answer(records, min_gain=1.0)) == [("small", "kd")]  # a filter on gains: it leaves no undistilled student
    assert names(answer(records, min_gain=0.0)) == names(answer(records))  # over itself it gains 0
    hurts = [record for record in records if record.student == "large" or record.method == "none"]
    assert names(answer(hurts, latency_ms_p50=0.2))[0] == ("large", "none")  # said "nothing qualifies"


def test_lower_is_better_puts_the_lowest_first(make_record) -> None:
    values = {"none": [4.0, 4.2], "kd": [3.0, 3.3]}
    records = [
        make_record(method=method, seed=seed, test_metric=value, higher_is_better=False, primary="rmse")
        for method, metrics in values.items()
        for seed, value in enumerate(metrics)
    ]

    assert names(answer(records)) == [("cifar_resnet8", "kd"), ("cifar_resnet8", "none")]


def test_limits_on_cost_leave_what_keeps_to_them(records) -> None:
    assert names(answer(records, latency_ms_p50=5.0))[0] == ("small", "dkd")
    assert {student for student, _ in names(answer(records, params_count=20_000))} == {"small"}
    assert names(answer(records, device_hours=3.9)) == []
    assert len(names(answer(records, device_hours=4.0))) == 8


def test_the_latency_that_a_limit_is_held_against_is_that_of_the_board(make_record) -> None:
    """One network was within the limit or not by the weather: each row had its own measurement."""
    latencies = {"none": [8.55, 8.7], "kd": [4.22, 4.3], "nkd": [9.93, 8.75]}
    records = [
        make_record(method=method, seed=seed, test_metric=90.0 + seed, latency_ms_p50=value, params_count=100, flops=1000)
        for method, measured in latencies.items()
        for seed, value in enumerate(measured)
    ]
    median = (8.55 + 8.7) / 2

    assert {row.label: row.latency_ms_p50 for row in boards(records)[0].rows} == dict.fromkeys(latencies, median)
    assert names(answer(records, latency_ms_p50=5.0)) == []
    assert len(names(answer(records, latency_ms_p50=median))) == 3
    assert {option["latency_ms_p50"] for option in answer_data(answer(records))["options"]} == {median}


def test_confidence_is_one_sided_with_the_error_that_the_board_prints(records) -> None:
    found = answer(records, min_gain=1.6, latency_ms_p50=5.0)

    block = [NONE, KD, NKD, WILD]
    gains = differences(block, 0, spreads(block))
    expected = {label: oracle.t.cdf((gains[row].middle - 1.6) / gains[row].error, df) for label, row, df in (("kd", 1, 4), ("dkd", 3, 2))}
    by_label = {option.row.label: option for option in found.options}
    assert {label: option.confidence for label, option in by_label.items()} == pytest.approx(expected)
    assert (by_label["kd"].sure, by_label["dkd"].sure) == (True, False)


def test_sure_means_that_the_whole_interval_lies_above(records) -> None:
    low = next(
        row.over_undistilled.low for board in boards(records) for row in board.rows if board.student == "small" and row.label == "kd"
    )

    def kd(min_gain: float) -> Option:
        return next(option for option in answer(records, min_gain=min_gain, latency_ms_p50=5.0).options if option.row.label == "kd")

    assert [kd(low + by).sure for by in (-1e-6, 1e-6)] == [True, False]


def test_confidence_counts_the_seeds_that_the_gain_is_over(make_record) -> None:
    gains = [2.0, 2.3]  # the undistilled student has two of the three seeds
    records = [make_record(method="none", seed=seed, test_metric=70.0 + seed / 10) for seed in range(2)]
    records += [make_record(method="kd", seed=seed, test_metric=70.0 + gain) for seed, gain in enumerate([*gains, 2.1])]
    records += [make_record(method="nkd", seed=seed, test_metric=69.0 + gain) for seed, gain in enumerate([*gains, 2.2])]

    option = answer(records, min_gain=1.0).options[0]
    gain = option.row.over_undistilled
    assert (option.row.label, gain.degrees, gain.middle) == ("kd", 1, pytest.approx(2.1))
    assert option.confidence == pytest.approx(oracle.t.cdf((gain.middle - 1.0) / gain.error, 1))


def test_a_gain_that_is_only_there_on_average_is_an_unsure_answer(records) -> None:
    found = answer(records, min_gain=2.3, latency_ms_p50=5.0)

    assert (found.verdict, names(found)) == ("unsure", [("small", "dkd")])
    assert "dkd for small: not sure of a gain of at least 2.3 (" in recommendation_page([found], Budget(min_gain=2.3))


def test_where_nothing_qualifies_the_nearest_says_what_it_misses(records) -> None:
    found = answer(records, min_gain=2.7, latency_ms_p50=1.9)

    assert (found.verdict, found.options) == ("none", ())
    assert found.nearest is not None
    assert (found.nearest.board.student, found.nearest.row.label) == ("small", "dkd")
    assert found.nearest.missed == ("its gain of +2.60 is 0.10 short", "2 ms are over the limit of 1.9")
    assert "nothing qualifies; the nearest misses it: its gain of +2.60 is 0.10 short" in recommendation_page([found], Budget(2.7, 1.9))


def test_an_unknown_cost_keeps_to_no_limit(records) -> None:
    unknown = [record.model_copy(update={"latency_ms_p50": None}) for record in records if record.student == "small"]
    found = answer(unknown, latency_ms_p50=5.0)

    assert found.verdict == "none"
    assert found.nearest is not None
    assert found.nearest.missed == ("its ms are not known",)
    assert len(answer(unknown).options) == 4


def test_no_number_of_seeds_is_called_entirely_sure(make_record) -> None:
    values = {"none": [70.0, 70.001, 70.0], "kd": [90.0, 90.0, 90.0]}
    found = answer([make_record(method=m, seed=s, test_metric=v) for m, by in values.items() for s, v in enumerate(by)])

    assert "kd for cifar_resnet8: sure of a gain (over 99.9%)" in recommendation_page([found], Budget())


def test_one_seed_is_never_sure(records) -> None:
    found = answer([record for record in records if record.seed == 0], min_gain=1.0)

    assert (found.verdict, found.options[0].confidence) == ("unsure", None)
    assert "one seed tells nothing" in recommendation_page([found], Budget(1.0))


def test_incomplete_rows_are_not_recommended(records, make_record) -> None:
    lucky = make_record(method="vid", test_metric=99.0, **SMALL)

    assert ("small", "vid") not in names(answer([*records, lucky]))


def test_what_can_not_be_told_apart_is_named(records) -> None:
    found = answer(records, latency_ms_p50=5.0)

    assert found.options[0].alike == ("kd", "nkd", "none")
    assert "no difference was found from: kd, nkd, none" in recommendation_page([found], Budget(latency_ms_p50=5.0))


def test_tasks_data_and_teachers_get_answers_of_their_own(records, make_record) -> None:
    other = [make_record(method=m, seed=s, test_metric=v, data="cifar100") for m, v in (("none", 50.0), ("kd", 55.0)) for s in range(2)]

    assert [found.data for found in recommend(boards([*records, *other]), records, Budget())] == ["cifar100", "fashion_mnist"]


def test_other_content_under_one_name_of_a_data_set_gets_an_answer_of_its_own(records, make_record) -> None:
    """Everybody's own images are called image_folder: metrics on different images do not compare."""
    other = [make_record(method="none", seed=s, test_metric=99.0, data_hash="d2", protocol_hash="p2") for s in range(2)]
    found = recommend(boards([*records, *other]), records, Budget())

    assert [(each.data, each.data_hash, len(each.options)) for each in found] == [("fashion_mnist", "d1", 8), ("fashion_mnist", "d2", 1)]
    assert "fashion_mnist (content d2), teacher" in recommendation_page(found, Budget())
    assert "content" not in recommendation_page(found[:1], Budget())


def test_the_page_has_a_line_for_each_option_with_its_gain(records) -> None:
    lines = recommendation_page([answer(records, latency_ms_p50=5.0)], Budget(latency_ms_p50=5.0)).splitlines()

    table = [line.split() for line in lines if line.startswith("    small  ")]
    assert [cells[1] for cells in table] == ["dkd", "kd", "nkd", "none"]
    assert [cells[5] for cells in table[:3]] == ["+2.60", "+2.00", "+1.48"]
    assert table[3][5] == "-"
    assert "  dkd for small: not sure of a gain (" in "\n".join(lines)


def test_the_answer_as_data_holds_parameters_intervals_and_runs(records) -> None:
    data = json.loads(json.dumps(answer_data(answer(records, latency_ms_p50=5.0, min_gain=1.0)), allow_nan=False))

    best = data["options"][1]
    assert ("sure" if best["sure"] else "", best["method"], best["student"], best["params"]) == (
        "sure",
        "kd",
        "small",
        {"temperature": 4.0},
    )
    assert best["gain_low"] > 1.0
    assert best["latency_device"] == "cpu"
    assert len(best["run_ids"]) == 3


@pytest.mark.parametrize(("text", "value"), [("5ms", 5.0), ("5", 5.0), ("0.005 s", 5.0), ("800us", 0.8), (".5MS", 0.5)])
def test_latencies_are_read_as_people_write_them(text, value) -> None:
    assert milliseconds(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("1M", 1e6), ("250k", 2.5e5), ("24100", 24100), ("1.5g", 1.5e9)])
def test_counts_are_read_as_people_write_them(text, value) -> None:
    assert parameter_count(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "5min", "-5ms", "0ms", "5 5ms", "nan", "1e3"])
def test_what_is_no_latency_or_count_says_what_is_expected(text) -> None:
    with pytest.raises(UserError, match=r"--latency .*: expected a time such as 5ms"):
        milliseconds(text)
    with pytest.raises(UserError, match=r"--params .*: expected a count such as 250k"):
        parameter_count(text if text != "1e3" else "1e3x")
