"""Code of the user's own that can't be used, or fails, is named with its file and line; a traceback is in a log and not on the screen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.benchmark import teacher
from kdbench.cli import app as cli
from kdbench.data.sources import _opened
from kdbench.errors import in_one_line
from kdbench.own_code import TRUST_VARIABLE
from kdbench.records.store import ResultStore
from kdbench.tasks.build import _built
from tests.bad_input.tiny_experiment import assert_mistake, assert_one_line, results, run
from tests.console import Kdbench

OWN_CODE = """
import os
import torch
from torch import nn
from kdbench.data.sources import Source

class Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(784 * in_channels, num_classes)

    def forward(self, images):
        return self.fc(images.flatten(1))

class NeverRuns(Net):
    def forward(self, images):
        raise KeyError("logits\\nand more")

class FailsLater(Net):
    steps = 0

    def forward(self, images):
        self.steps += self.training
        return self.fc(images.flatten(1)) if self.steps < 2 else {}["logits"]

class NeverBuilt(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        open("weights that are nowhere")

def data() -> Source:
    return {}["images"]

def unannotated(num_classes: int, in_channels: int):
    return os.mkdir("called")
"""


@pytest.fixture
def own_code(kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules in the working directory."""
    Path("own_code.py").write_text(OWN_CODE)
    Path("raises.py").write_text("import torch\n\n1 / 0\n")
    Path("leaves.py").write_text("import sys\nsys.exit(0)\n")
    yield
    for name in ("own_code", "raises", "leaves"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"students": ["nowhere.at_all:Net"]}, "model 'nowhere.at_all:Net': there is no module 'nowhere' on the Python path"),
        ({"students": ["own_code:Nett"]}, "model 'own_code:Nett': module 'own_code' has no 'Nett'; did you mean 'Net'?"),
        ({"students": ["own_code:"]}, "model 'own_code:': expected package.module:attribute"),
        ({"students": ["raises:Net"]}, "importing 'raises' failed: ZeroDivisionError: division by zero (raises.py, line 3)"),
        ({"students": ["leaves:Net"]}, "importing 'leaves' failed: SystemExit: 0 (leaves.py, line 2)"),
        ({"students": ["os:path"]}, "model 'os:path': 'os' belongs to the standard library"),
        ({"students": ["own_code:os"]}, "found a module, which was not called: expected a subclass of nn.Module, or a function"),
        (
            {"students": ["own_code:unannotated"]},
            "the function unannotated has no return annotation, so it was not called: write `def unann",
        ),
        (
            {"students": ["own_code:NeverRuns"]},
            "doesn't work on images [1, 28, 28] of data 'fashion_mnist': KeyError: 'logits\\nand more' (own_code",
        ),
        (
            {"students": ["own_code:NeverBuilt"]},
            "FileNotFoundError: [Errno 2] No such file or directory: 'weights that are nowhere' (own_code.py",
        ),
        ({"methods": ["none", "raises:Method"]}, "method 'raises:Method': importing 'raises' failed"),
        ({"methods": ["none", "own_code:os"]}, "method 'own_code:os' is no subclass of kdbench.methods.base.Method"),
        ({"task": "own_code:os"}, "task 'own_code:os' must be a subclass of kdbench.tasks.base.Task"),
        ({"task.data": "own_code:data"}, "data 'own_code:data': KeyError: 'images' (own_code.py, line 31)"),
    ],
)
def test_own_code_that_can_not_be_used_is_named_with_file_and_line(
    kdbench: Kdbench, own_code: None, changes: dict[str, Any], said: str
) -> None:
    assert_mistake(run(kdbench, changes), said)


def test_a_model_that_fails_at_its_second_step_is_one_line_and_its_traceback_is_in_a_log(kdbench: Kdbench, own_code: None) -> None:
    ended = run(kdbench, {"students": ["own_code:FailsLater"], "methods": ["none"]})
    assert ended.code == 1
    assert "Traceback" not in ended.out + ended.err
    told = ended.err.splitlines()[-1]
    assert told.startswith("  none seed 0: KeyError: 'logits' (own_code.py, line 24); traceback in ")
    assert "Traceback (most recent call last)" in Path(told.rpartition(" ")[2]).read_text()
    assert results() == ["teacher teacher ok"]  # code that fails is no property of a method: the next run tries again


def test_a_teacher_that_fails_at_its_second_step_ends_the_run(kdbench: Kdbench, own_code: None) -> None:
    ended = run(kdbench, {"teacher.model": "own_code:FailsLater"})
    assert_one_line(ended, 1, "teacher own_code:FailsLater: KeyError: 'logits' (own_code.py, line 24); traceback in ")
    assert results() == []


def test_a_fault_that_nobody_foresaw_is_one_line_and_its_traceback_is_in_a_file(
    kdbench: Kdbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(teacher, "teacher_unit", lambda *_: 1 / 0)
    ended = run(kdbench)
    assert_one_line(ended, 1, "ZeroDivisionError: division by zero", "; traceback in ")
    assert "ZeroDivisionError" in Path(ended.err.strip().rpartition(" ")[2]).read_text()


def test_the_installed_script_finds_a_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kdbench").write_text("from kdbench.cli.app import main\nmain()\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own_net.py").write_text(OWN_CODE)
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "bin" / "kdbench"), "taps", "own_net:Net", "--image", "1x28x28"]
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("own_net:Net on images 1x28x28")


def test_the_place_of_an_error_is_the_users_last_line_and_not_a_librarys() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.nn.functional.conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 1, 1))
    told = in_one_line(caught.value)
    assert told.startswith("RuntimeError: ")
    assert "(test_own_code.py, line " in told
    assert len(told.splitlines()) == 1


def test_what_a_record_names_is_left_out_by_verify_and_refused_by_export_unless_it_is_trusted(
    kdbench: Kdbench, own_code: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_data.py").write_text(
        "from kdbench.data.shapes import shapes\nfrom kdbench.data.sources import Source\n\n"
        "def mine() -> Source:\n    return shapes(train=120, test=20, target='class')\n"
    )
    monkeypatch.setenv(TRUST_VARIABLE, "0")  # put back when the test ends: --trust-code sets it in this process
    task = {"name": "classification", "data": "own_data:mine", "val_size": 20}
    ended = run(kdbench, {"task": task, "teacher": None, "methods": ["none"], "recipe.batch_size": 50})
    assert ended.code == 0, ended.err
    [record] = ResultStore("results").scan()
    _built.cache_clear()  # a command is a process of its own: it has nothing open
    _opened.cache_clear()

    verified = kdbench("verify", "--results", "results")
    assert verified.code == 0, verified
    assert "left out" in verified.out
    assert "'own_data' is not imported" in verified.out
    assert "1 records: 0 with metrics derived again" in verified.out
    assert_one_line(kdbench("export", record.run_id, "--results", "results"), 2, "comes from a stored record", "--trust-code")

    assert kdbench("export", record.run_id, "--results", "results", "--trust-code").code == 0
    assert "1 records: 1 with metrics derived again" in kdbench("verify", "--results", "results", "--trust-code").out
