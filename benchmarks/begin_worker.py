"""Makes starts of trainings and says what they took: a process of `benchmarks.begin`, also with the kdbench of an earlier commit.

On each line of its input, `KIND COUNT`, it answers with seconds by the clock and of CPU. It imports nothing that an earlier commit lacks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainings import CPU, QUICKSTART, image_task, random_teacher, unit, with_cache
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.experiment import Experiment
from kdbench.training import loop
from kdbench.training.session import LocalSession

IMAGES = 512
FIXED = {"precision": "fp32", "memory_format": "contiguous", "compile": False}


class Begun(BaseException):
    """The first step would be next. No error of a training, so that nobody handles it."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    loop.train_step = _stop
    starts = _starts(folder)
    for line in sys.stdin:
        kind, count = line.split()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(count)):
            _begin(starts[kind])
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def _stop(*arguments: Any, **more: Any) -> Any:
    raise Begun


def _begin(start: Callable[[], object]) -> None:
    try:
        start()
    except Begun:
        return
    raise AssertionError("a start ended without a first step")


def _starts(folder: Path) -> dict[str, Callable[[], object]]:
    layout = _layout()
    task = image_task(QUICKSTART, IMAGES)
    teacher = random_teacher(folder, task, QUICKSTART.teacher)
    none, kd = (unit(task, QUICKSTART.student, method, of, epochs=2) for method, of in (("none", None), ("kd", teacher)))
    kd = kd.model_copy(update={"teacher": with_cache(teacher, kd, folder / "cache")})
    experiment = Experiment.model_validate(
        {
            "name": "begin",
            "task": task,
            "teacher": {"model": QUICKSTART.teacher, "weights": str(teacher.weights)},
            "students": [QUICKSTART.student],
            "methods": ["none", "kd"],
            "recipe": {"epochs": 2, "batch_size": 128, "augment": {"crop": 2}, "views": None, **FIXED},
            "seeds": 1,
        }
    )
    made = iter(range(10**9))
    return {
        "none": lambda: loop.fit(none, LocalSession(device=CPU, threads=1), layout(folder)),
        "kd": lambda: loop.fit(kd, LocalSession(device=CPU, threads=1), layout(folder)),
        "run": lambda: run(experiment, folder / f"results-{next(made)}", Unwatched()),
    }


def _layout() -> Any:
    """Where the commit at hand has it."""
    for module in ("kdbench.storage.layout", "kdbench.results.layout"):
        try:
            return import_module(module).Layout
        except ModuleNotFoundError:
            continue
    raise AssertionError("no layout")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
