"""A run that may take so long ends as by Ctrl-C, and what it has is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kdbench.cli.watching import watched
from tests.console import Kdbench

EXPERIMENT = """
name: long
task: {name: classification, data: {name: shapes, target: class, train: 60, test: 20, size: 16}, val_size: 20}
students: [{name: tiny_cnn, width: 4}]
methods: [none]
recipe: {epochs: 100000, batch_size: 20, precision: fp32, memory_format: contiguous, compile: false}
runtime: {checkpoint_seconds: 0}
seeds: 1
"""


def test_a_run_ends_when_its_hours_are_over_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "kdbench.cli", "run", "long.yaml", "--results", "r", "--no-mlflow", "--max-hours", "0.004"]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 130, ended.stderr
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith("The 0.004 hours of --max-hours are over. What is finished is kept; to go on: kdbench run long.yaml")
    assert list((tmp_path / "r" / "checkpoints").rglob("*.pt")), "what the next command goes on from"


def test_the_alarm_is_off_once_the_work_is_done(tmp_path: Path) -> None:
    file = tmp_path / "long.yaml"
    file.write_text(EXPERIMENT)
    before = signal.getsignal(signal.SIGALRM)
    with watched(file, None, str(tmp_path / "r"), max_hours=1.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) == before


def test_its_end_is_another_than_that_of_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "long.yaml"
    file.write_text(EXPERIMENT)
    with pytest.raises(typer.Exit) as ended, watched(file, None, str(tmp_path / "r"), max_hours=2e-6):
        signal.pause()
    assert ended.value.exit_code == 130
    assert "of --max-hours are over" in capsys.readouterr().err
    with pytest.raises(typer.Exit), watched(file, None, str(tmp_path / "r"), max_hours=1.0):
        raise KeyboardInterrupt
    assert "Stopped. What is finished is kept" in capsys.readouterr().err


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "1e9"])
def test_hours_that_can_not_be_are_refused(kdbench: Kdbench, hours: str) -> None:
    ended = kdbench("run", "missing.yaml", "--max-hours", hours)
    assert ended.code == 2
    assert "--max-hours" in ended.err
    assert "expected a number from" in ended.err
