"""Own code that changed is in no key, so what was trained with it is found; a line says that the code is another one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdbench.benchmark import emptying
from kdbench.records.store import ResultStore
from tests.bad_input.tiny_experiment import TINIER, run
from tests.console import Kdbench

NET = """
from torch import nn
from {blocks} import head

class Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), head(num_classes))

    def forward(self, images):
        return self.body({factor} * images)
"""
BLOCKS = """
from torch import nn

def head(num_classes):
    return nn.Linear(3 * 32 * 32, num_classes{more})
"""
EXPERIMENT = {**TINIER, "students": [{"name": "mended_net:Net"}], "methods": ["none", "kd"]}


def write(factor: str = "1.0", more: str = "", comment: str = "") -> None:
    """The user's two modules, and a new process as far as they are concerned."""
    Path("mended_net.py").write_text(comment + NET.format(blocks="mended_blocks", factor=factor))
    Path("mended_blocks.py").write_text(BLOCKS.format(more=more))
    for name in ("mended_net", "mended_blocks"):
        sys.modules.pop(name, None)
        for compiled in Path("__pycache__").glob(f"{name}.*"):
            compiled.unlink()


@pytest.fixture
def trained(kdbench: Kdbench) -> Kdbench:
    write()
    assert run(kdbench, EXPERIMENT).code == 0
    return kdbench


def said(kdbench: Kdbench) -> list[str]:
    ended = run(kdbench, EXPERIMENT)
    assert ended.code == 0
    return " ".join(ended.out.split()).split("the code of ")[1:]


def test_changed_code_is_said_in_one_line_with_its_file_and_what_was_trained_with_it(trained: Kdbench) -> None:
    before = ResultStore("results").scan()
    assert {record.role: set(record.code or {}) for record in before} == {"teacher": set(), "final": {"mended_net", "mended_blocks"}}
    write(factor="2.0")
    (line,) = said(trained)
    assert line.startswith("mended_net.py has changed")
    assert "Net · none, " in line
    assert ResultStore("results").scan() == before


def test_changed_code_in_a_module_that_the_users_code_imports_is_noticed(trained: Kdbench) -> None:
    write(more=", bias=False")
    (line,) = said(trained)
    assert line.startswith("mended_blocks.py has changed")


def test_a_comment_changes_nothing(trained: Kdbench) -> None:
    assert said(trained) == []
    write(comment="# in other words\n")
    assert said(trained) == []


SEARCHED = {**EXPERIMENT, "methods": ["kd"], "search": {"trials": 1, "sampler": "random", "scheduler": "none"}}


def test_a_search_that_goes_on_with_changed_code_says_so(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it found so far was found with the other code."""
    # the Ray that tests share was started where nobody knew of the module
    monkeypatch.setattr(emptying, "needs_ray", lambda *_: False)
    write()
    assert "the code of" not in run(kdbench, SEARCHED).out
    write(factor="2.0")
    ended = run(kdbench, {**SEARCHED, "search": {**SEARCHED["search"], "trials": 2}})
    assert ended.code == 0
    (line,) = " ".join(ended.out.split()).split("the code of ")[1:]
    assert line.startswith("mended_net.py has changed")
    assert "Net · kd (search)" in line
