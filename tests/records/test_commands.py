"""The commands around results, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdbench.records.store import ResultStore
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
    assert "better than kd, each as tuned or configured here (kd is not tuned): nkd" in ended.out
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


@pytest.fixture
def harmed(make_record, tmp_path: Path) -> Path:
    """A student that its teacher, which is no better, makes worse; nothing decides between two of the methods; one has no finished seed."""
    store = ResultStore(tmp_path / "harmed")
    values = {"none": [97.7, 97.6, 97.68], "kd": [95.3, 95.2, 95.4], "dkd": [95.0, 95.6, 95.2], "fragile": [93.1, 93.0, 93.21]}
    for method, metrics in {**values, "w": [None] * 3}.items():
        for seed, value in enumerate(metrics):
            status = {"status": "failed", "failure": "the loss became nan in epoch 1"} if value is None else {}
            store.append(make_record(method=method, seed=seed, test_metric=value, teacher_metric=97.42, **status))
    return tmp_path / "harmed"


def test_every_output_of_a_board_has_the_same_findings(kdbench: Kdbench, harmed: Path) -> None:
    board = json.loads(kdbench("leaderboard", "--results", harmed, "--format", "json").out)["boards"][0]
    assert board["findings"] == [
        "the teacher (97.42) is no better than the undistilled student (97.66)",
        "distilling hurts here: every distilled method is surely worse than the undistilled student",
        "may be the best: none",
        "worse than kd, each as tuned or configured here (kd is not tuned): fragile",
    ]
    kdbench("leaderboard", "--results", harmed, "--html", "report.html")
    shown = {
        "table": kdbench("leaderboard", "--results", harmed).out,
        "markdown": kdbench("leaderboard", "--results", harmed, "--format", "markdown").out,
        "html": Path("report.html").read_text(),
        "explain": kdbench("leaderboard", "--results", harmed, "--explain", "kd").out,
    }
    missing = {name: [finding for finding in board["findings"] if finding not in text] for name, text in shown.items()}
    assert not any(missing.values()), missing
    [explained] = json.loads(kdbench("leaderboard", "--results", harmed, "--explain", "kd", "--format", "json").out)["explanations"]
    assert explained["findings"] == board["findings"]
    open_ = "no difference from kd was found, which does not show that there is none: dkd"
    assert [open_ in shown[name] for name in ("table", "markdown", "html")] == [True] * 3
    assert [row["rank"] for row in board["rows"] if row["method"] == "w"] == [None]
    assert "= every seed failed" in kdbench("leaderboard", "--results", harmed, "--explain", "w").out


def test_any_method_may_be_the_control_and_rows_may_be_chosen(kdbench: Kdbench, harmed: Path) -> None:
    whole = json.loads(kdbench("leaderboard", "--results", harmed, "--format", "json").out)["boards"][0]
    [board] = json.loads(kdbench("leaderboard", "--results", harmed, "--only", "kd, fragile", "--format", "json").out)["boards"]
    assert [row["method"] for row in board["rows"]] == ["kd", "fragile"]
    by_method = {row["method"]: row for row in whole["rows"]}
    assert all(row == by_method[row["method"]] for row in board["rows"])
    [other] = json.loads(kdbench("leaderboard", "--results", harmed, "--control", "fragile", "--format", "json").out)["boards"]
    rows = {row["method"]: row for row in other["rows"]}
    assert other["control"] == "fragile"
    assert rows["kd"]["vs_kd_all"] == pytest.approx(-by_method["fragile"]["vs_kd_all"])
    assert rows["kd"]["gain_all_low"] == by_method["kd"]["gain_all_low"]
    assert "vs fragile [all at once]" in kdbench("leaderboard", "--results", harmed, "--control", "fragile", "--format", "markdown").out
    assert kdbench("leaderboard", "--results", harmed, "--html", "control.html", "--control", "fragile").code == 0
    assert "vs fragile" in Path("control.html").read_text()
    for options, said in (
        (("--only", "kd,fragil"), "--only fragil: no board has this method; did you mean 'fragile'?"),
        (("--control", "fragil"), "--control fragil: no board has this method; did you mean 'fragile'?"),
        (("--only", "kd", "--method", "kd"), "--only and --method both choose rows; give one of the two"),
        (("--only", "kd", "--by", "student"), "--only is of methods; with --by student"),
    ):
        ended = kdbench("leaderboard", "--results", harmed, *options)
        assert (ended.code, said in ended.err) == (2, True), ended.err


def test_the_report_names_the_best_distilled_row_and_says_where_it_is_not_the_best(kdbench: Kdbench, harmed: Path) -> None:
    """The tile `best distilled` showed the undistilled student's number."""
    for name, filters in (("all.html", ()), ("one.html", ("--method", "fragile"))):
        kdbench("leaderboard", "--results", harmed, "--html", name, *filters)
        text = Path(name).read_text()
        assert "<dt>best distilled: kd</dt><dd>95.30</dd>" in text
        assert "<dt>undistilled student</dt><dd>97.66</dd>" in text
        assert "none has the best mean top1, 97.66, without any distilling; the best distilled is kd, 95.30." in text


@pytest.mark.parametrize(
    "command", ["leaderboard", "leaderboard --explain kd", "leaderboard --format json", "recommend", "results export x.zip"]
)
@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("--data fashion", "--data fashion: no result has this data; did you mean 'fashion_mnist'?"),
        ("--task clasification", "--task clasification: no result has this task; did you mean 'classification'?"),
        ("--teacher resnet56", "--teacher resnet56: no result has this teacher; did you mean 'cifar_resnet56'?"),
        ("--student smal", "--student smal: no result has this student; did you mean 'small'?"),
        ("--experiment zzz", "--experiment zzz: no result has this experiment; there is: other, quick"),
        ("--experiment other --student large", "no result has --student large and --experiment other together"),
    ],
)
def test_a_filter_that_leaves_nothing_is_a_mistake(
    kdbench: Kdbench, folder: Path, make_record, command: str, filters: str, message: str
) -> None:
    ResultStore(folder).append(make_record(student="small", experiment="other", protocol_hash="p-other"))
    ended = kdbench(*command.split(), "--results", folder, *filters.split())

    assert (ended.code, ended.out, ended.err) == (2, "", f"kdbench: {message}\n")
    assert not Path("x.zip").exists()


def test_a_method_that_no_board_has_is_a_mistake(kdbench: Kdbench, folder: Path) -> None:
    """It printed nothing and ended with 0."""
    for options in ((), ("--format", "json"), ("--html", "x.html"), ("--site", "x")):
        ended = kdbench("leaderboard", "--results", folder, "--method", "nosuch", *options)
        assert (ended.code, ended.out, ended.err) == (
            2,
            "",
            "kdbench: --method nosuch: no board has this method; there is: kd, nkd, none\n",
        )
    assert not list(Path.cwd().glob("x*"))


def test_an_empty_folder_has_no_value_to_be_mistaken_about(kdbench: Kdbench, tmp_path: Path) -> None:
    ended = kdbench("leaderboard", "--results", tmp_path / "empty", "--data", "fashion", "--method", "nosuch")

    assert ended.code == 0
    assert "no results in" in ended.err


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


def test_verify_names_what_is_gone_and_says_what_files_can_not_show(kdbench: Kdbench, folder: Path, tmp_path: Path) -> None:
    kdbench("results", "compact", "--results", folder)
    assert "18 as they were sealed" in kdbench("verify", "--results", folder).err  # with a problem each: they have no predictions
    kdbench("results", "export", tmp_path / "all.zip", "--results", folder)
    kdbench("results", "import", tmp_path / "all.zip", "--results", tmp_path / "copy")
    path = next((tmp_path / "copy").glob("v1/**/*.parquet"))
    path.unlink()

    ended = kdbench("verify", "--results", tmp_path / "copy")
    assert ended.code == 1
    assert f"run {path.stem} (" in ended.out
    assert "is missing: kdbench results compact sealed it, " in ended.out
    assert "not checked, as files can't show it: whether predictions, record and seal were forged together" in ended.out


def test_records_that_became_a_file_are_one_line(kdbench: Kdbench, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "v1").write_bytes(b"")

    for command in (["verify"], ["leaderboard"]):
        ended = kdbench(*command, "--results", tmp_path / "results")
        assert ended.code == 2
        assert ended.err == (
            f"kdbench: {tmp_path}/results/v1 is a file, expected a folder; restore the folder from a copy, or move the file away\n"
        )


def test_verify_of_nothing_has_no_problem(kdbench: Kdbench, tmp_path: Path) -> None:
    assert kdbench("verify", "--results", tmp_path / "empty")[:2] == (
        0,
        "0 records: 0 with metrics derived again, 0 compared with their teacher, 0 with keys derived again (0 can't be), "
        "0 with parameters counted in their weights (0 can't be), 0 as they were sealed, no problems\n",
    )
