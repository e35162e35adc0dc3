"""Every figure of a row leads back to runs and to their values by seed."""

from __future__ import annotations

import json
import re

import pytest
from scipy import stats as oracle

from kdbench.boards.explanation import Explanation, Figure, explain, explanation_data
from kdbench.boards.leaderboard import boards
from kdbench.cli.pages import explanation_page
from kdbench.errors import UserError


@pytest.fixture
def records(make_record):
    """none, kd and nkd on three seeds; nkd's last seed failed. The teacher has a record."""
    values = {"none": [90.0, 90.4, 89.9], "kd": [91.0, 91.2, 90.7], "nkd": [92.5, 92.8, None]}
    cost = {"device_hours": 0.5, "search_device_hours": 2.0, "latency_ms_p50": 1.5, "params_count": 78042, "flops": 1000}
    finals = [
        make_record(
            run_id=f"{method}-{seed}",
            method=method,
            seed=seed,
            test_metric=value,
            teacher_sha="t",
            trials=8,
            study_id=f"study-{method}",
            status="ok" if value else "failed",
            failure=None if value else "loss is nan",
            predictions_uri=f"predictions/{method}-{seed}.safetensors" if value else None,
            predictions_sha256="abc" if value else None,
            **cost,
        )
        for method, metrics in values.items()
        for seed, value in enumerate(metrics)
    ]
    return [make_record(run_id="the-teacher", role="teacher", label="teacher", teacher=None, teacher_sha="t", test_metric=94.0), *finals]


def only(records, method: str) -> Explanation:
    [found] = explain(boards(records), records, method)
    return found


def figures(explanation: Explanation) -> dict[str, Figure]:
    return {figure.name: figure for figure in explanation.figures}


def test_every_known_figure_of_the_row_is_there_with_its_runs(records) -> None:
    found = figures(only(records, "nkd"))

    assert set(found) == {
        "rank", "mean", "gain", "gain_all", "gap_recovered", "vs_kd", "vs_kd_p", "vs_kd_all",
        "latency_ms_p50", "params_count", "flops", "device_hours", "params",
    }  # fmt: skip
    known = {record.run_id for record in records}
    assert all(figure.run_ids and set(figure.run_ids) <= known for figure in found.values())
    assert found["mean"].run_ids == ("nkd-0", "nkd-1", "none-2")
    assert set(found["vs_kd"].run_ids) == {"nkd-0", "nkd-1", "none-2", "kd-0", "kd-1", "kd-2"}
    assert "the-teacher" in found["gap_recovered"].run_ids


def test_a_failed_seed_says_what_counts_in_its_place(records) -> None:
    failed = only(records, "nkd").runs[2]

    assert (failed.run_id, failed.value, failed.counted, failed.failure) == ("nkd-2", 89.9, "none-2", "loss is nan")
    assert failed.control == ("kd-2", 90.7)
    assert "failed: loss is nan; counts as none-2" in explanation_page(only(records, "nkd"))


def test_how_a_figure_follows_gives_the_figure_again(records) -> None:
    found = figures(only(records, "kd"))

    assert found["mean"].how.startswith("(91.00 + 91.20 + 90.70) / 3; ")
    assert eval(found["mean"].how.partition(";")[0]) == pytest.approx(float(found["mean"].value.split()[0]), abs=0.005)
    assert found["gain"].how.startswith("mean of the differences to none by seed: +1.00, +0.80, +0.80; ")
    middle, quantile, sd, n = (float(x) for x in re.findall(r"(?<=[ √])[\d.]+", found["gain"].how.rpartition(";")[2]))
    low, high = (float(x) for x in re.findall(r"[+-][\d.]+(?=[,\]])", found["gain"].value))
    assert (middle - quantile * sd / n**0.5, middle + quantile * sd / n**0.5) == pytest.approx((low, high), abs=0.01)
    assert found["gap_recovered"].how.startswith("(90.97 - 90.10) / (94.00 - 90.10)")
    assert found["device_hours"].value == "2.5"
    assert found["params"].how == "of the newest final; chosen by 8 trials, study study-kd"


def test_a_rank_says_who_is_surely_better_and_worse(make_record) -> None:
    values = {"kd": [91.0, 91.1, 91.2], "none": [90.0, 90.1, 90.21], "nkd": [91.05, 91.1, 91.3]}
    records = [make_record(method=m, seed=s, test_metric=v) for m, by in values.items() for s, v in enumerate(by)]

    none, kd = (figures(only(records, label))["rank"] for label in ("none", "kd"))
    assert (none.value, kd.value) == ("3", "1-2")
    assert none.how.startswith("2 (nkd, kd) surely better, nobody surely worse, of 3; by Tukey's critical value for 3 rows (4 degrees")
    assert kd.how.startswith("nobody surely better, 1 (none) surely worse, of 3")
    assert set(kd.run_ids) == {record.run_id for record in records}


def test_a_difference_among_all_follows_from_its_critical_value_and_error(records) -> None:
    found = figures(only(records, "kd"))["gain_all"]

    middle, critical, error = (float(x) for x in re.findall(r"[+-]?[\d.]+", found.how.partition(":")[0]))
    low, high = (float(x) for x in re.findall(r"[+-][\d.]+(?=[,\]])", found.value))
    assert (middle - critical * error, middle + critical * error) == pytest.approx((low, high), abs=0.01)
    assert "Dunnett's critical value for 2 comparisons with none (4 degrees of freedom)" in found.how


def test_the_latency_is_the_median_over_all_runs_of_the_network(records) -> None:
    changed = [r.model_copy(update={"latency_ms_p50": 2.5 if r.method == "none" else 1.5 + r.seed}) for r in records if r.role == "final"]
    found = figures(only(changed, "kd"))["latency_ms_p50"]

    assert found.value == "2.5"
    assert found.how.endswith("over all runs of the board that deploy the same network")
    assert set(found.run_ids) == {record.run_id for record in changed}
    unknown = [record.model_copy(update={"flops": None}) for record in changed]
    assert set(figures(only(unknown, "kd"))["latency_ms_p50"].run_ids) == {"kd-0", "kd-1", "kd-2"}


def test_the_rank_of_one_seed_says_that_nothing_is_known(make_record) -> None:
    records = [make_record(method="none"), make_record(method="kd", test_metric=91.0)]

    rank = figures(only(records, "none"))["rank"]
    assert (rank.value, rank.how) == ("1-2", "nothing is known of the error: any of the 2 places may be its own")


def test_controls_and_single_seeds_have_no_figures_that_they_cannot_have(make_record) -> None:
    records = [make_record(method="none"), make_record(method="kd", test_metric=91.0)]

    assert not {"gain", "gap_recovered"} & figures(only(records, "none")).keys()
    assert not {"vs_kd", "vs_kd_p"} & figures(only(records, "kd")).keys()
    assert figures(only(records, "kd"))["mean"].how.endswith("one seed has no interval")


def test_lower_is_better_says_that_differences_were_turned(make_record) -> None:
    records = [
        make_record(method=method, seed=seed, test_metric=value, higher_is_better=False, primary="rmse", teacher_metric=2.0)
        for method, values in {"none": [4.0, 4.2], "kd": [3.0, 3.3]}.items()
        for seed, value in enumerate(values)
    ]

    assert "turned so that positive is better: +1.00, +0.90" in figures(only(records, "kd"))["gain"].how


def test_json_holds_it_all_and_an_unknown_method_is_named(records) -> None:
    data = json.loads(json.dumps(explanation_data(only(records, "kd")), allow_nan=False))

    assert data["runs"][0]["predictions_sha256"] == "abc"
    assert {figure["name"] for figure in data["figures"]} >= {"mean", "gain", "gap_recovered"}
    with pytest.raises(UserError, match="--explain nkdd: no board has this method; did you mean 'nkd'"):
        explain(boards(records), records, "nkdd")


def traced_numbers(how: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+\.\d+", how)]


def test_of_several_searches_the_mean_is_of_searches(make_record) -> None:
    """The interval that is printed follows from the numbers that are listed."""
    plan, values = {"seeds": 2, "control_seeds": 2, "searches": 3}, [80.0, 81.0, 82.5, 82.5, 79.0, 80.5]
    records = [
        make_record(method=label, label=label, seed=seed, test_metric=value + shift, plan=plan, search_number=seed // 2)
        for label, shift in (("none", 0.0), ("kd", 1.0))
        for seed, value in enumerate(values if label == "none" else values[::-1])
    ]
    [found] = explain(boards(records), records, "kd")
    figures = {figure.name: figure for figure in found.figures}
    means = [(a + b) / 2 + 1.0 for a, b in zip(values[::-1][::2], values[::-1][1::2], strict=True)]
    assert traced_numbers(figures["mean"].how)[:3] == pytest.approx(means, abs=0.005)
    low, high = oracle.t.interval(0.95, 2, sum(means) / 3, oracle.sem(means))
    assert figures["mean"].value == f"{sum(means) / 3:.2f} [{low:.2f}, {high:.2f}]"
    assert "by search" in figures["gain"].how
    assert "spread over searches" in figures["gain_all"].how


def test_of_a_row_that_was_decided_early_the_look_is_named(make_record) -> None:
    plan = {"seeds": 3, "control_seeds": 3, "looks": [3, 6]}
    values = {"none": [70.1, 70.4, 69.8], "kd": [80.2, 80.0, 80.5], "dkd": [85.0, 85.3, 85.1]}
    records = [
        make_record(method=label, label=label, seed=seed, test_metric=value, plan=plan)
        for label, of in values.items()
        for seed, value in enumerate(of)
    ]
    [found] = explain(boards(records), records, "dkd")
    how = next(figure.how for figure in found.figures if figure.name == "vs_kd_all")
    assert "the rows that were looked at with 3 seeds, where all intervals hold at once with 0.98" in how
