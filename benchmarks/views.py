"""Part d, beside the sweep: what it costs in quality to train on K frozen augmented copies instead of fresh ones every epoch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.part import Bench
from benchmarks.report import Row
from benchmarks.sweep import QUALITY_VAL, trained_teacher
from benchmarks.timing import Sample
from benchmarks.trainings import QUICKSTART
from kdbench.benchmark.run import run
from kdbench.benchmark.watch import Unwatched
from kdbench.boards.stats import t_interval
from kdbench.experiment import Experiment, Recipe
from kdbench.records.store import ResultStore

KEPT_VIEWS = (1, 2, 4, 8)
WORTH = 0.3  # points of accuracy below fresh views that are taken for none


def measure(bench: Bench) -> Iterator[Row]:
    """Test accuracy of `kd` with each K and with fresh views, and the differences, paired by seed."""
    weights = trained_teacher(bench)
    seeds, epochs, images = bench.pick(quick=(2, 2, 300), usual=(3, 24, 1_000), full=(10, 48, 2_000))
    kept = bench.pick(quick=(1, 4), usual=KEPT_VIEWS, full=KEPT_VIEWS)
    bench.say(f"views: fresh every epoch, {seeds} seeds")
    fresh = _accuracies(bench, weights, None, seeds, epochs, images)
    note = f"{images:,} images x {epochs} epochs, batch 64, crop 2 and flip"
    yield Row("views: test accuracy of kd, fresh views every epoch", Sample(fresh), "%", note=note)
    close = []
    for count in kept:
        bench.say(f"views: {count} frozen, {seeds} seeds")
        values = _accuracies(bench, weights, count, seeds, epochs, images)
        differences = tuple(value - other for value, other in zip(values, fresh, strict=True))
        mean, low, high = t_interval(differences)
        close += [count] if mean >= -WORTH else []
        said = f"mean {mean:+.2f}, 95% [{low or mean:+.2f}, {high or mean:+.2f}]; accuracy {statistics.fmean(values):.2f}"
        yield Row(f"views: {count} frozen - fresh, paired by seed", Sample(differences), "points", note=said)
    default = Recipe().views
    least = f"the least K within {WORTH} points of fresh views by its mean is {min(close)}" if close else f"no K is within {WORTH} points"
    yield Row("views: the default K", Sample((float(default or 0),)), "", note=least)


def _accuracies(bench: Bench, weights: Path, views: int | None, seeds: int, epochs: int, images: int) -> tuple[float, ...]:
    settings: dict[str, Any] = {
        "name": f"views-{views}",
        "task": {"name": "classification", "data": "fashion_mnist", "val_size": QUALITY_VAL, "transfer_size": images},
        "teacher": {"model": QUICKSTART.teacher, "weights": str(weights)},
        "students": ["tiny_cnn"],
        "methods": ["kd"],
        "recipe": {"epochs": epochs, "batch_size": 64, "lr": 0.1, "augment": {"crop": 2, "flip": True}, "views": views},
        "seeds": seeds,
    }
    results = bench.scratch / "results"
    run(Experiment.model_validate(settings), results, Unwatched())
    records = ResultStore(results).scan(role="final", experiment=settings["name"])
    return tuple(float(record.test_metric or 0) for record in sorted(records, key=lambda record: record.seed))
