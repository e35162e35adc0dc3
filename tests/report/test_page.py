"""The report is one safe file that says what the records say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdbench.errors import RunFailed, UserError
from kdbench.records.folders import Folders
from kdbench.records.store import ResultStore
from kdbench.report.files import Report
from kdbench.storage.layout import Layout
from tests.console import Kdbench
from tests.report.conftest import GAINS, final, write_board

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&{{ 7 * 7 }}"


class Seen(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside[-1]] = self.texts.get(self._inside[-1], "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return Report(Folders([twelve])).write(tmp_path_factory.mktemp("report") / "report.html").read_text()


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_file_needs_and_allows_nothing_from_elsewhere(html: str) -> None:
    seen = Seen(html)
    policy = next(a["content"] for a in seen.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    for kind in ("style", "script"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert {tag for tag, _ in seen.elements} & {"link", "img", "iframe", "object", "embed", "form", "base"} == set()
    assert [a for _, a in seen.elements if "style" in a or any(name.startswith("on") for name in a)] == []
    assert [a["href"] for a in seen.all("a") if not (a["href"] or "").startswith(("#", "http://127.0.0.1:5000/#/runs/"))] == []


def test_it_holds_the_boards_as_json(html: str) -> None:
    (board,) = data_of(html)["boards"]
    assert {row["method"] for row in board["rows"]} == set(GAINS)
    assert board["teacher"]["metric"] == 94.2


def test_every_method_has_a_row_its_runs_its_parameters_and_its_marks(html: str) -> None:
    for method in GAINS:
        assert html.count(f'<tr data-method="{method}" data-search=') == 1
        assert f"{method}: 5 runs</summary>" in html
    marks = [a["data-tip"] or "" for tag, a in Seen(html).elements if tag == "g" and "data-tip" in a]
    assert any(re.match(r"kd: accuracy 87\.\d+ \[87\.\d+, 88\.\d+\], 0\.14 device-hours", tip) for tip in marks)
    assert any(re.match(r"reviewkd: accuracy 8\d\.\d+ after 20 epochs, ", tip) for tip in marks)
    assert sum(tip.startswith("trial 1: accuracy ") for tip in marks) == 11
    assert sum(", failed;" in tip for tip in marks) == 11
    assert sum("stopped early" in tip for tip in marks) == 11 * 5


def test_importance_is_optunas_and_finds_the_parameter_that_matters(html: str) -> None:
    shares = re.findall(
        r'<th scope="row">(recipe\.lr|temperature)</th><td class="bar-cell">.*?</td><td class="number">(\d+)%</td>', html, re.DOTALL
    )
    assert len(shares) == 2 * 11
    assert shares[0][0] == "recipe.lr"
    assert int(shares[0][1]) > 80
    assert "From 18 finished trials: a hint." in html


def test_a_study_that_is_gone_leaves_a_sentence(html: str) -> None:
    assert html.count("The study of its search is not in this results folder") == 1


def test_reading_studies_changes_no_file(twelve: Path, tmp_path: Path) -> None:
    journals = sorted((twelve / "studies").iterdir())
    before = [(path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in journals]
    Report(Folders([twelve])).write(tmp_path / "again.html")
    assert [(path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in sorted((twelve / "studies").iterdir())] == before


def test_a_search_that_is_under_way_or_damaged_does_not_stop_a_report(tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd", "dkd"), seeds=2)
    journal = Layout(tmp_path).study("study-kd")
    whole = journal.read_bytes()
    lock = journal.with_name(journal.name + ".lock")
    lock.write_text("held")
    journal.write_bytes(whole + b'{"op_code": 4, "worker')
    Layout(tmp_path).study("study-dkd").write_bytes(b'{"op_code": 99}\nnonsense\n')
    text = Report(Folders([tmp_path])).write(tmp_path / "r.html").read_text()
    assert text.count("24 trials</summary>") == 2
    assert text.count("The journal of the search is damaged") == 1
    assert lock.read_text() == "held"
    assert journal.read_bytes().endswith(b'"worker')


def test_texts_of_records_stay_texts(tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd"), seeds=2, searched=False)
    store = ResultStore(tmp_path)
    for seed in range(2):
        hostile = {
            "label": HOSTILE,
            "unit_key": f"hostile-{seed}",
            "params": {HOSTILE: HOSTILE, "odd": float("inf")},
            "experiment": HOSTILE,
            "config": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
            "devices": [HOSTILE],
            "mlflow_run_id": 'x" onclick="alert(3)',
            "study_id": "../../etc/passwd",
        }
        store.append(final("dkd", seed, 88.0 + seed, **hostile))
    store.append(final("at", 0, None, failure=HOSTILE))
    text = Report(Folders([tmp_path])).write(tmp_path / "r.html").read_text()
    seen = Seen(text)
    assert len(seen.all("script")) == 2
    assert seen.all("img") == []
    assert [a for _, a in seen.elements if any(name.startswith("on") for name in a)] == []
    assert "49" not in re.findall(r"&amp;(\S+)", text)
    assert any(row["method"] == HOSTILE for row in data_of(text)["boards"][0]["rows"])
    assert "quot; onclick" not in text
    assert "/#/runs/x%22%20onclick%3D%22alert%283%29" in text


def test_records_of_one_time_give_one_report_whenever_it_is_made(html: str, twelve: Path, tmp_path: Path) -> None:
    assert Report(Folders([twelve])).write(tmp_path / "again.html").read_text() == html


def test_what_a_method_costs_alike_is_said_and_not_drawn(html: str) -> None:
    assert "Parameters: 78k for every method, so there is no trade-off." in html
    assert "Latency: 0.54 ms for every method, so there is no trade-off." in html  # they deploy one network
    assert 'aria-label="accuracy against device-hours, search included, 12 methods' in html


def test_students_of_one_protocol_are_weighed_together(tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd", "dkd"), seeds=2, searched=False)
    write_board(tmp_path, ("none", "kd", "dkd"), seeds=2, searched=False, student="cifar_resnet20", params_count=270_000)
    text = Report(Folders([tmp_path])).write(tmp_path / "r.html").read_text()
    assert "circle for cifar_resnet20, square for cifar_resnet8" in text
    assert 'aria-label="accuracy against parameters, 6 methods' in text
    assert re.search(r"each method's students alone: dkd \d+%, kd \d+%, none \d+%\.", text)


def test_six_pairs_get_a_critical_difference_diagram_and_one_says_what_it_needs(html: str, tmp_path: Path) -> None:
    for pair in range(6):
        given = {"teacher": f"teacher{pair}", "protocol_hash": f"{pair}" * 16, "searched": False}
        write_board(tmp_path, ("none", "kd", "dkd", "reviewkd"), seeds=2, **given)
    text = Report(Folders([tmp_path])).write(tmp_path / "r.html").read_text()
    ranks = re.findall(r'aria-label="average ranks, best first: (.*?); critical difference (\d\.\d\d)"', text)
    assert len(ranks) == 1
    assert ranks[0][0].startswith("reviewkd 1.")
    assert ranks[0][1] == "1.91"  # Demsar 2006: q = 2.569 for four methods, times sqrt(4 * 5 / (6 * 6))
    assert "No critical-difference diagram: it needs 6 pairs" in html


def test_several_folders_are_read_as_one_and_the_later_record_of_a_training_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_board(first, ("none", "kd"), seeds=2, searched=False)
    write_board(second, ("dkd",), seeds=2)
    ResultStore(second).append(final("kd", 0, 95.0, created_at="2031-01-01T00:00:00Z"))
    text = Report(Folders([first, second])).write(tmp_path / "r.html").read_text()
    rows = {row["method"]: row for row in data_of(text)["boards"][0]["rows"]}
    assert set(rows) == {"none", "kd", "dkd"}
    assert rows["kd"]["values"]["0"] == 95.0
    assert "24 trials</summary>" in text  # of the second folder's study


def test_a_site_has_an_index_and_a_page_a_board_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    write_board(tmp_path / "a", ("none", "kd"), seeds=2, searched=False)
    write_board(tmp_path / "b", ("none", "kd"), seeds=2, searched=False, teacher="../wrn/40 2", protocol_hash="b" * 16)
    site = tmp_path / "site"
    assert Report(Folders([tmp_path / "a", tmp_path / "b"])).write_site(site) == site / "index.html"
    pages = {path.name: Seen(path.read_text()) for path in site.iterdir()}
    assert len(pages) == 3
    for name, seen in pages.items():
        links = [a["href"] or "" for a in seen.all("a")]
        anchors = {a["id"] for _, a in seen.elements if "id" in a}
        assert [link for link in links if link.startswith("#") and link[1:] not in anchors] == [], name
        assert [link for link in links if not link.startswith(("#", "http://127.0.0.1:5000/")) and link not in pages] == [], name
    assert len({a["href"] for a in pages["index.html"].all("a")} & set(pages)) == 2


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [("folder", UserError, "is a folder"), ("empty", UserError, "no results in"), ("unwritable", RunFailed, "could not be written")],
)
def test_what_can_not_be_written_is_said_and_leaves_nothing(
    twelve: Path, tmp_path: Path, target: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "file").write_text("")
    path = {"folder": tmp_path, "empty": tmp_path / "r.html", "unwritable": tmp_path / "file" / "r.html"}[target]
    folder = tmp_path / "nothing" if target == "empty" else twelve
    with pytest.raises(error, match=message):
        Report(Folders([folder])).write(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_writes_a_report_and_a_site_and_says_where(kdbench: Kdbench, twelve: Path) -> None:
    for option, target, said in (("--html", "out/report.html", "report: out/report.html"), ("--site", "site", "site: site/index.html")):
        ended = kdbench("leaderboard", "--results", twelve, option, target, "--method", "dkd")
        assert (ended.code, ended.out, ended.err) == (0, f"{said}\n", "")
        page = Path(said.split(": ")[1]).read_text()
        assert "dkd" in page
        assert 'data-method="crd"' not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--html .", "--html .: is a folder, expected a file name such as report.html"),
        ("--html report.html --task nothing", "--task nothing: no result has this task; there is: classification"),
        ("--html report.html --method kdd", "--method kdd: no board has this method; did you mean 'kd'?"),
        ("--site boards --data fashion", "--data fashion: no result has this data; did you mean 'fashion_mnist'?"),
        ("--html report.html --format json", "--format is of what is printed, and --html, --site and --serve print nothing"),
        ("--site boards --explain kd", "--explain is of what is printed, and --html, --site and --serve print nothing"),
        ("--serve --picture gains.png", "--picture is of what is printed, and --html, --site, --serve and --explain print no board"),
        ("--explain kd --picture gains.png", "--picture is of what is printed, and --html, --site, --serve and --explain print no board"),
    ],
)
def test_a_mistake_ends_in_one_line_and_writes_nothing(kdbench: Kdbench, twelve: Path, arguments: str, message: str) -> None:
    ended = kdbench("leaderboard", "--results", twelve, *arguments.split())
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith(f"kdbench: {message}")
    assert len(ended.err.splitlines()) == 1
    assert list(Path.cwd().iterdir()) == []
