"""Part g: seconds from a command to its first optimizer step, alone and with Ray; between two trials; what listing and importing cost."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from benchmarks.part import Bench, child_environment, kdbench_command, run_quietly
from benchmarks.report import Row, at_most
from benchmarks.timing import Sample, Spent, interleave
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.data.batch import Batch
from kdbench.data.fashion_mnist import EMBEDDED
from kdbench.experiment import Experiment
from kdbench.methods.base import Progress
from kdbench.methods.none import Undistilled
from kdbench.models.outputs import Outputs
from kdbench.models.tiny import tiny_cnn

STAMP = "KDBENCH_BENCHMARK_STAMP"  # names the file that gets the time of the first step
BETWEEN_TRIALS = at_most(0.3)  # seconds
LISTING = at_most(2.0)  # times a command of the same libraries that prints one word
ONE_WORD = """
import typer
from rich.console import Console

app = typer.Typer()


@app.command()
def say(word: str) -> None:
    Console().print(word)


app(["kd"])
"""
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
    bench.say("start: between two trials")
    yield Row("between two trials on one actor of a search", _between_trials(bench), "s", BETWEEN_TRIALS)
    bench.say("start: kdbench list methods")
    listing = {
        "list": lambda: _process(kdbench_command("list", "methods")),
        "one word": lambda: _process([sys.executable, "-c", ONE_WORD]),
    }
    rounds = interleave(listing, 0, least=bench.pick(quick=3, usual=9, full=21))
    yield Row(
        "kdbench list methods / a command of typer and rich that prints one word",
        rounds.ratio("list", "one word"),
        goal=LISTING,
        wall=rounds.ratio("list", "one word", "wall").median,
    )
    for module in MODULES if bench.scale != "quick" else MODULES[:1]:
        bench.say(f"start: import {module}")
        command = [sys.executable, "-c", f"import {module}"]
        seconds = interleave({"import": lambda: _process(command)}, 0, least=repeats, warm_up=False)  # noqa: B023
        yield Row(f"import {module}, whole process", seconds.seconds("import", "wall"), "s")


def noted_student(num_classes: int, in_channels: int, log: Path) -> nn.Module:
    """A tiny_cnn that notes when its process made it and when it was measured: a trial begins with the one and ends with the other."""

    def note(what: str) -> None:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()} {time.time()!r} {what}\n")

    note("made")
    model: nn.Module = tiny_cnn(num_classes=num_classes, in_channels=in_channels)
    model.register_forward_pre_hook(lambda module, _: None if module.training else note("measured"))
    return model


def _between_trials(bench: Bench) -> Sample:
    """From the last validation of a trial to the beginning of the next one in the same process, in a search on Ray."""
    folder = bench.scratch / "between-trials"
    folder.mkdir()
    log, trials = folder / "log", bench.pick(quick=6, usual=16, full=48)
    settings = {
        "name": "between-trials",
        "task": {"name": "classification", "data": "fashion_mnist", "val_size": 1000, "transfer_size": 1000},
        "students": [{"name": f"{noted_student.__module__}:{noted_student.__name__}", "log": str(log), "label": "noted"}],
        "methods": ["none"],
        "recipe": {"epochs": 2, "batch_size": 64, "precision": "fp32", "memory_format": "contiguous", "compile": False},
        "search": {"trials": trials, "scheduler": "asha", "top_k": 1, "also": {"recipe.lr": {"low": 0.01, "high": 0.5, "log": True}}},
        "seeds": 1,
    }
    run(Experiment.model_validate(settings), folder / "results", Unwatched(), search_only=True)
    return Sample(tuple(gaps(log.read_text())))


def gaps(log: str) -> list[float]:
    """Seconds between the last `measured` of one trial and the `made` of the next, process by process."""
    found: list[float] = []
    measured: dict[str, float] = {}
    for line in sorted(log.splitlines(), key=lambda line: float(line.split()[1])):
        process, moment, what = line.split()
        if what == "measured":
            measured[process] = float(moment)
        elif process in measured:
            found.append(float(moment) - measured.pop(process))
    return found


def _process(command: list[str]) -> Spent:
    """What a process spends from its start to its end."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run_quietly(command, child_environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.perf_counter() - begun, cpu)


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
