"""docs/methods.md is what the methods and the golden vectors say."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from kdbench.methods import METHODS
from tests.pages import ROOT, page_text


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "make_method_table.py"))


@pytest.mark.slow
def test_the_table_is_what_its_script_makes(script: dict[str, Any]) -> None:
    page = page_text("docs/methods.md")
    assert script["renewed"](page) == page, "run python scripts/make_method_table.py"


def test_the_table_has_a_row_for_every_method(script: dict[str, Any]) -> None:
    assert list(script["costs_of"](page_text("docs/methods.md"))) == list(METHODS)


def test_every_folder_of_golden_vectors_is_counted_for_one_method(script: dict[str, Any]) -> None:
    counted = [folder for name in METHODS for folder in script["FOLDERS"].get(name, (name,))]
    folders = {path.name for path in (ROOT / "tests" / "golden").iterdir() if any(path.glob("*.npz"))}
    assert folders <= set(counted)
    assert len(counted) == len(set(counted))
    assert script["vectors"]("kd") == sum(len(list((ROOT / "tests" / "golden" / name).glob("*.npz"))) for name in ("kd", "kd_clskd"))


@pytest.mark.slow
def test_costs_that_were_measured_stay_when_the_table_is_renewed(script: dict[str, Any]) -> None:
    page = re.sub(r"(\| `kd` .*\|)[^|\n]*\|$", r"\1 1.23 |", page_text("docs/methods.md"), flags=re.MULTILINE)
    assert script["costs_of"](page)["kd"] == "1.23"
    assert script["costs_of"](script["renewed"](page)) == script["costs_of"](page)
