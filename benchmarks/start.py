"""Part g: seconds from a command to its first optimizer step, alone and with Ray, and what importing costs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from benchmarks.part import Bench, child_environment, kdbench_command, run_quietly
from benchmarks.report import Row
from benchmarks.timing import Spent, interleave
from kdbench.data.batch import Batch
from kdbench.data.fashion_mnist import EMBEDDED
from kdbench.methods.base import Progress
from kdbench.methods.none import Undistilled
from kdbench.models.outputs import Outputs

STAMP = "KDBENCH_BENCHMARK_STAMP"  # names the file that gets the time of the first step
MODULES = ("torch", "timm", "ray.tune", "optuna", "mlflow", "kdbench.cli", "kdbench.training.loop", "kdbench.benchmark.run")


class Stamped(Undistilled):
    """The undistilled student, which writes down when its first optimizer step was done: at its second forward pass."""

    def forward(self, s: Outputs, t: Outputs | None, batch: Batch, at: Progress) -> dict[str, Tensor]:
        stamp = Path(os.environ[STAMP])
        if at.step == 1 and not stamp.exists():
            stamp.write_text(repr(time.time()))
        return super().forward(s, t, batch, at)


def measure(bench: Bench) -> Iterator[Row]:
    """Starts take turns, then imports."""
    repeats = bench.pick(quick=1, usual=2, full=7)
    arms = {
        "hand-written": lambda: _hand_written(bench),
        "local": lambda: _kdbench(bench, searching=False),
        "ray": lambda: _kdbench(bench, searching=True),
    }
    if bench.scale == "quick":
        del arms["ray"]
    bench.say("start: commands")
    rounds = interleave(arms, 0, least=repeats, warm_up=False)
    titles = {
        "hand-written": "a hand-written script (torch and the data only): command to first step",
        "local": "kdbench run, one process: command to first step",
        "ray": "kdbench tune, with Ray: command to first step",
    }
    for name in arms:
        yield Row(titles[name], rounds.seconds(name, "wall"), "s")
    for module in MODULES if bench.scale != "quick" else MODULES[:1]:
        bench.say(f"start: import {module}")
        command = [sys.executable, "-c", f"import {module}"]
        seconds = interleave({"import": lambda: _process(command)}, 0, least=repeats, warm_up=False)  # noqa: B023
        yield Row(f"import {module}, whole process", seconds.seconds("import", "wall"), "s")


def _process(command: list[str]) -> Spent:
    begun = time.perf_counter()
    run_quietly(command, child_environment())
    return Spent(time.perf_counter() - begun, 0.0)


def _kdbench(bench: Bench, searching: bool) -> Spent:
    """`kdbench run` or `tune` on the embedded images, until the first step of the first training."""
    folder = bench.scratch / f"start-{time.monotonic_ns()}"
    folder.mkdir()
    settings: dict[str, Any] = {
        "name": "start",
        "task": {"name": "classification", "data": "fashion_mnist", "val_size": 500, "transfer_size": 128},
        "students": ["tiny_cnn"],
        "methods": [{"name": "benchmarks.start:Stamped", "label": "none"}],
        "recipe": {"epochs": 1, "batch_size": 64, "precision": "fp32", "memory_format": "contiguous"},
        "seeds": 1,
    }
    if searching:
        settings["search"] = {"trials": 1, "scheduler": "none", "top_k": 1, "also": {"recipe.lr": {"low": 0.01, "high": 0.5}}}
    path = folder / "start.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = kdbench_command("tune" if searching else "run", str(path), "--results", str(folder / "results"), "--no-mlflow")
    return _until_stamp(command, folder / "stamp")


def _hand_written(bench: Bench) -> Spent:
    stamp = bench.scratch / f"stamp-{time.monotonic_ns()}"
    return _until_stamp([sys.executable, "-m", "benchmarks.hand_written", str(EMBEDDED), STAMP], stamp)


def _until_stamp(command: list[str], stamp: Path) -> Spent:
    begun = time.time()
    run_quietly(command, child_environment(**{STAMP: str(stamp)}))
    return Spent(float(stamp.read_text()) - begun, 0.0)
