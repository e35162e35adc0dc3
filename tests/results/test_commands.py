"""The commands around results, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdbench.results.store import ResultStore
from tests.console import Kdbench


@pytest.fixture
def folder(make_record, tmp_path: Path) -> Path:
    """Two pairs, three methods, three seeds."""
    store = ResultStore(tmp_path / "results")
    values = {"none": [90.0, 90.2, 90.1], "kd": [91.0, 91.3, 91.1], "nkd": [92.0, 92.31, 92.1]}
    for student, latency in (("small", 2.0), ("large", 8.0)):
        for method, metrics in values.items():
            for seed, value in enumerate(metrics):
                facts = {"student": student, "protocol_hash": f"p-{student}", "latency_ms_p50": latency, "params": {"weight": 0.5}}
                store.append(make_record(method=method, seed=seed, test_metric=value, **facts))
    return tmp_path / "results"


def test_the_board_of_several_pairs_ends_with_what_they_say_together(kdbench: Kdbench, folder: Path) -> None:
    ended = kdbench("leaderboard", "--results", folder)

    assert ended.out.index("-> small\n") < ended.out.index("classification across 2 pairs")
    assert "beats kd (not tuned): nkd" in ended.out
    assert "across" not in kdbench("leaderboard", "--results", folder, "--student", "small").out


def test_a_methods_rows_alone_keep_their_summary(kdbench: Kdbench, folder: Path) -> None:
    data = json.loads(kdbench("leaderboard", "--results", folder, "--method", "nkd", "--format", "json").out)

    assert [[row["method"] for row in board["rows"]] for board in data["boards"]] == [["nkd"], ["nkd"]]
    assert [row["method"] for row in data["across_pairs"][0]["rows"]] == ["nkd"]
    assert data["boards"][0]["rows"][0]["values"] == {"0": 92.0, "1": 92.31, "2": 92.1}
    assert 0 < data["boards"][0]["rows"][0]["vs_kd_p"] < 0.05


def test_explain_traces_a_row_in_words_and_as_json(kdbench: Kdbench, folder: Path) -> None:
    shown = kdbench("leaderboard", "--results", folder, "--explain", "nkd", "--student", "small")
    [explained] = json.loads(kdbench("leaderboard", "--results", folder, "--explain", "nkd", "--student", "small", "--format", "json").out)[
        "explanations"
    ]

    assert shown.out.startswith("nkd: classification on fashion_mnist: cifar_resnet56 -> small (protocol p-small)\n")
    assert "= (92.00 + 92.31 + 92.10) / 3; 92.14 ± 4.303" in shown.out
    assert all(run["run_id"] in shown.out for run in explained["runs"])
    assert kdbench("leaderboard", "--results", folder, "--explain", "nkdd").code == 2


def test_recommend_answers_for_a_budget(kdbench: Kdbench, folder: Path) -> None:
    ended = kdbench("recommend", "--results", folder, "--latency", "5ms", "--min-gain", "1.5")

    assert ended.code == 0
    assert "  nkd for small: sure of a gain of at least 1.5 (" in ended.out
    assert "    parameters: weight=0.5\n" in ended.out
    assert "large" not in ended.out
    data = json.loads(kdbench("recommend", "--results", folder, "--latency", "5ms", "--min-gain", "1.5", "--format", "json").out)
    assert [(option["student"], option["method"]) for option in data["answers"][0]["options"]] == [("small", "nkd")]


def test_recommend_says_plainly_that_nothing_qualifies(kdbench: Kdbench, folder: Path) -> None:
    ended = kdbench("recommend", "--results", folder, "--latency", "1500us", "--min-gain", "1.5")

    assert ended.code == 1
    assert "nothing qualifies; the nearest misses it: 2 ms are over the limit of 1.5" in ended.out
    assert ended.err == ""


def test_recommend_without_results_says_how_to_start(kdbench: Kdbench, tmp_path: Path) -> None:
    ended = kdbench("recommend", "--results", tmp_path / "empty")

    assert (ended.code, ended.out) == (1, "")
    assert "no results in" in ended.err


def test_export_and_import_carry_a_folder_and_verify_finds_what_was_edited(kdbench: Kdbench, folder: Path, tmp_path: Path) -> None:
    archive, copy = tmp_path / "boards.zip", tmp_path / "copy"

    exported = kdbench("results", "export", archive, "--results", folder, "--student", "small")
    assert exported.out.startswith(f"{archive}: 9 records, 0 searches, 0 predictions, 0 weights files, ")
    assert kdbench("results", "import", archive, "--results", copy).out == "9 records and 0 files taken in, 0 records were here already\n"
    assert kdbench("results", "import", archive, "--results", copy).out == "0 records and 0 files taken in, 9 records were here already\n"
    path = next(copy.rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    ended = kdbench("verify", "--results", copy)
    assert ended.code == 1
    assert "is not a readable Parquet file" in ended.out.splitlines()[0]
    assert "9 problems" in ended.err  # and eight records that say that they have a metric and no predictions


def test_verify_of_nothing_has_no_problem(kdbench: Kdbench, tmp_path: Path) -> None:
    assert kdbench("verify", "--results", tmp_path / "empty")[:2] == (
        0,
        "0 records: 0 with metrics derived again, 0 compared with their teacher, no problems\n",
    )
