"""Part boxes: a detector's step against a hand-written one, cached pyramids against a live teacher, and how long boxes take to measure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cache import share_of_ceiling, steps_of
from benchmarks.loop import LOOP_GOAL, resolved
from benchmarks.minimal_detector_step import MinimalDetectorStep
from benchmarks.part import Bench
from benchmarks.report import Row, at_most
from benchmarks.timing import Sample, arm, interleave, timed
from benchmarks.trainings import begun, random_teacher, unit, with_cache
from kdbench.data.columns import several
from kdbench.models.inputs import InputSpec
from kdbench.tasks.average_precision import average_precision

METRIC_GOAL = at_most(30)
SIZE, BATCH, STEPS = 64, 16, 4
TEACHER, STUDENT = {"name": "tiny_fcos", "width": 16}, {"name": "tiny_fcos", "width": 8}
METHODS: dict[str, str | dict[str, Any]] = {
    "kd": "kd",
    "mgd on both levels": {"name": "mgd", "student_taps": ["level:0", "level:1"], "teacher_taps": ["level:0", "level:1"], "mask": "pixel"},
}


def measure(bench: Bench) -> Iterator[Row]:
    """The step, the cache, the metric."""
    bench.say("a detector's step")
    yield _steps_against_hand_written(bench, bench.seconds * 0.3)
    for name, method in METHODS.items():
        bench.say(f"cached pyramids: {name}")
        yield _of_the_ceiling(bench, name, method, bench.seconds * 0.25)
    bench.say("average precision")
    yield _metric(bench)


def _task(bench: Bench) -> dict[str, Any]:
    data = {"name": "shapes", "target": "boxes", "size": SIZE, "train": BATCH * STEPS + 20, "test": 20}
    return {"name": "detection", "data": data, "val_size": 20}


def _steps_against_hand_written(bench: Bench, seconds: float) -> Row:
    """Both on the same batches, with networks of one kind, on one thread."""
    run = begun(unit(_task(bench), STUDENT, "none", batch_size=BATCH, views=1))
    network = run.task.build_model(run.unit.student)
    spec = network.input_spec
    assert isinstance(spec, InputSpec)
    by_hand = MinimalDetectorStep(network.train(), (4, 8), SIZE, spec.mean, spec.std, run.unit.recipe.lr)
    batches = list(run.loader.batches(0))

    def steps() -> None:
        for batch in batches:
            assert isinstance(batch.inputs, Tensor)
            by_hand(batch.inputs, several(batch.target))

    rounds = interleave({"kdbench": steps_of(run), "minimal": arm(steps, BATCH * len(batches))}, seconds, enough=resolved)
    wall = rounds.ratio("minimal", "kdbench", "wall").median
    what = "a step of a detector: kdbench / hand-written, samples/s"
    return Row(what, rounds.ratio("minimal", "kdbench"), goal=LOOP_GOAL, wall=wall, note=f"tiny_fcos of width 8, {SIZE} px, batch {BATCH}")


def _of_the_ceiling(bench: Bench, name: str, method: str | dict[str, Any], seconds: float) -> Row:
    """live / (live - teacher) is the ceiling, live / cached what is reached."""
    end = time.monotonic() + seconds
    folder = bench.scratch / name.replace(" ", "_")
    folder.mkdir()
    task = _task(bench)
    live = random_teacher(folder, task, TEACHER)
    one = unit(task, STUDENT, method, live, batch_size=BATCH, views=1)
    cached = unit(task, STUDENT, method, with_cache(live, one, folder / "cache"), batch_size=BATCH, views=1)
    return share_of_ceiling(f"cached pyramids, {name}", begun(one), begun(cached), end - time.monotonic())


def _metric(bench: Bench) -> Row:
    """Stored boxes and the truth of COCO's size: 7 objects of 80 classes a picture, 100 boxes that were kept."""
    images = bench.pick(quick=250, usual=5_000, full=5_000)
    draw = torch.Generator().manual_seed(0)
    corner = 500 * torch.rand(images, 7, 2, generator=draw)
    boxes = torch.cat([corner, corner + 10 + 120 * torch.rand(images, 7, 2, generator=draw)], -1)
    target = {"boxes": boxes, "labels": torch.randint(80, (images, 7), generator=draw)}
    near = torch.randint(7, (images, 100), generator=draw)
    found = boxes.gather(1, near[..., None].expand(-1, -1, 4)) + 12 * torch.randn(images, 100, 4, generator=draw)
    classes = torch.where(torch.rand(images, 100, generator=draw) < 0.7, target["labels"].gather(1, near), 3)
    kept = {"boxes": found, "scores": torch.rand(images, 100, generator=draw).clamp(min=0.05), "classes": classes}
    names = tuple(f"class {number}" for number in range(80))
    times = [timed(lambda: average_precision(kept, target, names)) for _ in range(bench.pick(quick=1, usual=3, full=5))]
    what = f"average precision by class and by size of {images:,} images with 100 boxes"
    value = Sample(tuple(one.cpu for one in times))
    return Row(what, value, "s", goal=METRIC_GOAL, wall=min(one.wall for one in times))
