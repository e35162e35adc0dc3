"""Part e: how time grows with trials, images, classes and workers: the exponent p of seconds ~ size^p. 1 is linear."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.images import RANDOM_IMAGES
from benchmarks.part import Bench
from benchmarks.report import Row, at_most
from benchmarks.timing import Arm, Rounds, Sample, arm, growth_exponent, interleave, timed
from benchmarks.trainings import ModelPair, begun, epochs, image_task, random_teacher, unit, with_cache
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.distributed.cluster import available_cpus, started
from kdbench.experiment import Experiment, Runtime, Unit
from kdbench.records.record import RunRecord
from kdbench.records.store import ResultStore
from kdbench.training.loop import close_epoch, train_epoch

LINEAR = at_most(1.05)  # linear, and 5% for noise
WORKERS = at_most(-0.9)  # of time: -1 is twice as fast with two
_SMALL = ModelPair("tiny_cnn of width 8 -> tiny_cnn", {"name": "tiny_cnn", "width": 8}, "tiny_cnn", 1, 28, 128)


def measure(bench: Bench) -> Iterator[Row]:
    """Trials, images, classes, workers."""
    bench.say("growth with trials")
    yield _trials(bench)
    yield from _images(bench)
    yield _classes(bench)
    if bench.scale != "quick":
        yield _workers(bench)


def exponent_row(what: str, sizes: Sequence[float], samples: Sequence[Sample], note: str = "", goal: Any = LINEAR) -> Row:
    """Fitted to the medians; the range is that of the exponents of single rounds, where there are as many of each size."""
    rounds = zip(*(sample.values for sample in samples), strict=True)
    fits = Sample(tuple(growth_exponent(sizes, one) for one in rounds))
    medians = ", ".join(f"{size:g}: {1000 * sample.median:.3g} ms" for size, sample in zip(sizes, samples, strict=True))
    return Row(what, fits, "exponent", goal, note=f"{medians}{'; ' if note else ''}{note}")


class _Clocked(Unwatched):
    """When each trial ended, in seconds since the first was asked for."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.ends: list[float] = []

    def progress(self, phase: str, done: int, total: int) -> None:
        if phase == "search" and done == 0:
            self.begun = time.perf_counter()

    def finished(self, unit: Unit, record: RunRecord) -> None:
        if unit.role == "trial":
            self.ends.append(time.perf_counter() - self.begun)


def _trials(bench: Bench) -> Row:
    """One search of many short trials on a running Ray: when its 8th, 16th, ... trial was done, after two that warm the actors."""
    sizes = bench.pick(quick=(4, 8), usual=(8, 16, 32, 64), full=(8, 16, 32, 64))
    warm = 2
    settings = {
        "name": "growth",
        "task": image_task(_SMALL, 1_280),
        "students": ["tiny_cnn"],
        "methods": ["none"],
        "recipe": {"epochs": 1, "batch_size": 64, "precision": "fp32", "memory_format": "contiguous"},
        "search": {
            "trials": sizes[-1] + warm,
            "scheduler": "none",
            "top_k": 1,
            "also": {"recipe.lr": {"low": 0.01, "high": 0.5, "log": True}},
        },
        "seeds": 1,
    }
    watch = _Clocked()
    with started(Runtime()):
        run(Experiment.model_validate(settings), bench.scratch / "trials", watch, search_only=True)
    seconds = [Sample((watch.ends[size + warm - 1] - watch.ends[warm - 1],)) for size in sizes]
    return exponent_row("time of a search against its trials", sizes, seconds, "Ray's start and the first two trials left out")


def _images(bench: Bench) -> Iterator[Row]:
    """A cached trial's epoch with its validation, and building the cache."""
    sizes = bench.pick(quick=(1_280, 2_560), usual=(6_000, 15_000, 30_000, 60_000), full=(6_000, 15_000, 30_000, 60_000))
    arms: dict[str, Arm] = {}
    building: list[Sample] = []
    for size in sizes:
        bench.say(f"growth with images: {size:,}")
        folder = bench.scratch / f"images-{size}"
        folder.mkdir()
        task = image_task(_SMALL, size)
        live = random_teacher(folder, task, _SMALL.teacher)
        one = unit(task, _SMALL.student, "kd", live, views=2)
        built: list[Any] = []
        building.append(Sample((timed(lambda: built.append(with_cache(live, one, folder / "cache"))).cpu,)))  # noqa: B023
        arms[str(size)] = _whole_epoch(unit(task, _SMALL.student, "kd", built[0], views=2))
    rounds = interleave(arms, bench.seconds * 0.25, least=bench.pick(quick=1, usual=2, full=5))
    yield exponent_row("time of a cached epoch against its images", sizes, _samples(rounds, arms), "CPU seconds")
    yield exponent_row("time of building the cache against its images", sizes, building, "CPU seconds, 2 views")


def _whole_epoch(of: Unit) -> Arm:
    training = begun(of)

    def train_and_validate() -> None:
        train_epoch(training, training.epoch)
        close_epoch(training)

    return arm(train_and_validate)


def _samples(rounds: Rounds, arms: Mapping[str, Any]) -> list[Sample]:
    return [rounds.seconds(name) for name in arms]


def _classes(bench: Bench) -> Row:
    """An epoch of cached kd, whose loss and cache grow with the classes."""
    sizes = bench.pick(quick=(10, 100), usual=(10, 100, 1_000), full=(10, 100, 1_000))
    arms = {}
    for size in sizes:
        bench.say(f"growth with classes: {size:,}")
        folder = bench.scratch / f"classes-{size}"
        folder.mkdir()
        task = image_task(_SMALL, 2_560, classes=size)
        live = random_teacher(folder, task, _SMALL.teacher)
        one = unit(task, _SMALL.student, "kd", live, views=1)
        arms[str(size)] = epochs(begun(unit(task, _SMALL.student, "kd", with_cache(live, one, folder / "cache"), views=1)))
    rounds = interleave(arms, bench.seconds * 0.15)
    return exponent_row(
        "time of a cached epoch of 2,560 images against its classes", sizes, _samples(rounds, arms), "a sample, CPU seconds"
    )


def _workers(bench: Bench) -> Row:
    """Epochs of one training with one worker and with two, by wall clock; the first epoch, which warms up, left out."""
    sizes = (1, 2)
    samples = []
    what = "time of an epoch against workers (DDP over gloo, global batch 128)"
    if available_cpus() < max(sizes):
        return Row(what, None, goal=WORKERS, note=f"{available_cpus()} CPU is not enough for {max(sizes)} workers")
    for workers in sizes:
        bench.say(f"growth with workers: {workers}")
        images, count = bench.pick(quick=(640, 3), usual=(2_560, 5), full=(5_120, 9))
        samples.append(Sample(_epoch_seconds(bench.scratch / f"workers-{workers}", workers, images, count)))
    return exponent_row(what, sizes, samples, "cifar_resnet8, one thread a worker", WORKERS)


def _epoch_seconds(results: Path, workers: int, images: int, count: int) -> tuple[float, ...]:
    settings = {
        "name": "workers",
        "task": {"name": "classification", "data": {"name": RANDOM_IMAGES, "train": images + 128, "test": 32}, "val_size": 128},
        "students": ["cifar_resnet8"],
        "methods": ["none"],
        "recipe": {"epochs": count, "batch_size": 128, "lr": 0.01, "precision": "fp32", "memory_format": "contiguous"},
        "seeds": 1,
        "runtime": {"workers": workers},
    }
    run(Experiment.model_validate(settings), results, Unwatched())
    curve = ResultStore(results).scan(role="final")[0].curve
    seconds = [row["seconds"] for row in curve]
    return tuple(after - before for before, after in pairwise(seconds))
