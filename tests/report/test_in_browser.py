"""The report in a real browser: what a reader does with it works, on a desk, on a phone, in the dark and on paper."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kdbench.records.folders import Folders
from kdbench.records.store import ResultStore
from kdbench.report.files import Report
from kdbench.report.serve import report_server
from tests.browser import look_at
from tests.report.conftest import GAINS, final, write_board

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

PATIENCE = 30  # seconds until what must come has come

# The contrast of a text with what is painted behind it, WCAG 2: (L1 + 0.05) / (L2 + 0.05).
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d");
const rgb = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = (colour) => {
  const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
  return [255, 255, 255, 255];
};
const low = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.tagName !== "SCRIPT";
  if (!own || e.matches(".inside, #tip")) continue;
  const drawn = e.closest("svg");
  const text = rgb(drawn ? getComputedStyle(e).fill : getComputedStyle(e).color);
  const [a, b] = [luminance(text), luminance(behind(drawn ? drawn.parentElement : e))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) low.push([e.outerHTML.slice(0, 90), (a + 0.05) / (b + 0.05)]);
}
return low;
"""


@pytest.fixture(scope="module")
def address(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return Report(Folders([twelve])).write(tmp_path_factory.mktemp("report") / "report.html").as_uri()


@pytest.fixture
def page(browser: Chrome, address: str) -> Chrome:
    browser.get(address)
    return browser


def one(driver: Chrome, selector: str) -> WebElement:
    return driver.find_element("css selector", selector)


def shown(driver: Chrome, selector: str) -> list[str]:
    """The texts of the elements that can be seen."""
    seen = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).map((e) => e.innerText)"
    return driver.execute_script(seen, selector)


def methods(driver: Chrome) -> list[str]:
    return shown(driver, "section.one-board table.board tbody th")


def header(driver: Chrome, text: str) -> WebElement:
    return next(e for e in driver.find_elements("css selector", "table.board thead button") if e.text.strip() == text)


def eventually(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)
    return value


def press(driver: Chrome, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def test_a_column_sorts_at_a_press_and_turns_round_at_the_next(page: Chrome) -> None:
    board = methods(page)
    assert board[0] == "reviewkd"
    assert board[-1] == "none"
    header(page, "method").click()
    assert methods(page) == sorted(GAINS)
    header(page, "method").click()
    assert methods(page) == sorted(GAINS, reverse=True)
    cell = header(page, "method").find_element("xpath", "..")
    assert cell.get_attribute("aria-sort") == "descending"
    header(page, "vs kd").click()
    assert methods(page)[0] == "reviewkd"
    assert methods(page)[-1] == "kd"  # its own difference to itself is unknown, and that comes last
    header(page, "vs kd").click()
    assert methods(page)[0] == "none"
    assert methods(page)[-1] == "kd"
    assert cell.get_attribute("aria-sort") is None
    header(page, "№").click()
    assert methods(page) == board


def test_a_header_is_reached_and_pressed_with_keys(page: Chrome) -> None:
    page.execute_script("arguments[0].focus()", header(page, "device-h"))
    press(page, "\ue007")
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert methods(page)[0] == "reviewkd"  # the dearest
    press(page, "\ue007")
    assert methods(page)[0] == "none"


def test_the_filter_leaves_matching_rows_and_fades_the_others_marks(page: Chrome) -> None:
    one(page, "#filter").send_keys("KD temperature=4.123")
    assert set(methods(page)) == {"kd", "nkd", "dkd", "tf_nkd", "reviewkd"}
    opacity = "return getComputedStyle(document.querySelector(`.plot g[data-method=${arguments[0]}]`)).opacity"
    assert float(page.execute_script(opacity, "crd")) < 0.5
    assert float(page.execute_script(opacity, "dkd")) == 1.0
    assert one(page, "#status").get_attribute("textContent") == "5 rows match"
    one(page, "#filter").clear()
    one(page, "#filter").send_keys(" ")
    assert len(methods(page)) == 12


def test_hover_and_focus_show_what_a_mark_means(page: Chrome) -> None:
    from selenium.webdriver import ActionChains

    spot = one(page, 'figure[id^="cost-"][id$="device_hours"] g[data-method="reviewkd"] .spot')
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", spot)
    ActionChains(page).move_to_element(spot).perform()
    tip = one(page, "#tip")
    assert re.fullmatch(r"reviewkd: accuracy 8\d\.\d+ \[.*\], 0\.195 device-hours; on the Pareto front", tip.text)
    assert shown(page, "table.board tr.lit th") == ["reviewkd"]
    ActionChains(page).move_to_element(one(page, "h1")).perform()
    assert not tip.is_displayed()
    first = one(page, ".plot .mark[tabindex='0']")
    page.execute_script("arguments[0].focus()", first)
    before = tip.text
    assert before
    press(page, "\ue014")
    assert tip.text
    assert tip.text != before
    press(page, "\ue00c")
    assert not tip.is_displayed()


def test_a_chart_is_one_stop_of_the_tab_key(page: Chrome) -> None:
    stops = "return [...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('[tabindex=\"0\"]').length)"
    counts = page.execute_script(stops)
    # Device-hours (all networks are alike, and so their latency), the curves, the searches, and what these were worth.
    assert len(counts) == 1 + 1 + 11 + 1
    assert set(counts) == {1}


def test_a_method_leads_to_its_runs(page: Chrome) -> None:
    one(page, "table.board tbody tr[data-method=dkd] a").click()
    runs = one(page, "details[id^=runs-][data-method=dkd]")
    assert runs.get_attribute("open") is not None
    assert len(runs.find_elements("css selector", "tbody tr")) == 5
    link = runs.find_element("css selector", "a").get_attribute("href")
    assert link == "http://127.0.0.1:5000/#/runs/00000000000000000000000000000000"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_texts_stand_out_in_light_and_dark(browser: Chrome, address: str, scheme: str) -> None:
    look_at(browser, width=1280, scheme=scheme)
    browser.get(address)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    brightness = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(brightness) < 60) == (scheme == "dark")
    assert browser.execute_script(CONTRASTS) == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_makes_the_page_itself_scroll_sideways(browser: Chrome, address: str, width: int) -> None:
    look_at(browser, width=width)
    browser.get(address)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert methods(browser)[0] == "reviewkd"


def test_paper_gets_what_is_folded_away_and_no_tools(page: Chrome) -> None:
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 4 <= pages <= 12
    look_at(page, width=1280, media="print")
    eventually(lambda: not one(page, "#filter").is_displayed())  # the browser takes up another medium when it gets to it
    height = "return document.querySelector('details[id^=yaml-] pre').getBoundingClientRect().height"
    eventually(lambda: page.execute_script(height) > 30)


def test_everything_that_is_embedded_can_be_saved(page: Chrome) -> None:
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "deny"})
    saved = """
    const [done, make, made] = [arguments[0], URL.createObjectURL, []];
    URL.createObjectURL = (blob) => { made.push(blob); return make.call(URL, blob); };
    document.getElementById("save").click();
    made[0].text().then(done);
    """
    (board,) = json.loads(page.execute_async_script(saved))["boards"]
    assert {row["method"] for row in board["rows"]} == set(GAINS)


def test_no_script_of_a_label_runs(browser: Chrome, tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd"), seeds=2, searched=False)
    label = "</script><img src=x onerror=document.title='broken'><script>document.title='broken'</script>"
    for seed in range(2):
        ResultStore(tmp_path).append(final("dkd", seed, 88.0, label=label, unit_key=f"u{seed}", params={label: label}))
    browser.get(Report(Folders([tmp_path])).write(tmp_path / "r.html").as_uri())
    assert browser.title == "Leaderboard"
    assert label in methods(browser)


def test_a_site_is_walked_without_a_server(browser: Chrome, tmp_path: Path) -> None:
    write_board(tmp_path, ("none", "kd"), seeds=2, searched=False)
    write_board(tmp_path, ("none", "dkd"), seeds=2, searched=False, teacher="wrn", protocol_hash="b" * 16)
    browser.get(Report(Folders([tmp_path])).write_site(tmp_path / "site").as_uri())
    assert len(shown(browser, "#table-index tbody tr")) == 2
    one(browser, "#filter").send_keys("wrn")
    (row,) = [e for e in browser.find_elements("css selector", "#table-index tbody tr") if e.is_displayed()]
    row.find_element("css selector", "a").click()
    assert one(browser, "h1").text == "fashion_mnist: wrn → cifar_resnet8"
    assert set(methods(browser)) == {"none", "dkd"}
    one(browser, "header a").click()
    assert len(shown(browser, "#table-index tbody tr")) == 2


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    write_board(tmp_path, ("none", "kd", "dkd"), seeds=2)
    with report_server(Report(Folders([tmp_path])).source, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", tmp_path
        server.shutdown()
        thread.join()


def test_a_served_report_renews_itself_and_keeps_what_the_reader_had_set(browser: Chrome, served: tuple[str, Path]) -> None:
    address, folder = served
    browser.get(address)
    header(browser, "method").click()
    one(browser, "#filter").send_keys("kd")
    one(browser, "details[id^=runs-][data-method=kd] summary").click()
    browser.execute_script("scrollTo(0, 400)")
    assert methods(browser) == ["dkd", "kd"]
    for seed in range(2):
        ResultStore(folder).append(final("reviewkd", seed, 91.0 + seed))
    assert eventually(lambda: methods(browser) if "reviewkd" in methods(browser) else None) == ["dkd", "kd", "reviewkd"]
    assert header(browser, "method").find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    assert one(browser, "details[id^=runs-][data-method=kd]").get_attribute("open") is not None
    assert browser.execute_script("return scrollY") == 400
    assert one(browser, "#filter").get_property("value") == "kd"
    assert browser.execute_script("return document.activeElement.closest('details')?.dataset.method") in ("kd", None)
