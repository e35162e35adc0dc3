"""Part b: what a trial with a cached teacher costs beside the student alone, and how much of the ceiling the cache reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.loop import FITNET, STAGE
from benchmarks.part import Bench
from benchmarks.report import Row, at_least, at_most
from benchmarks.timing import Arm, Rounds, arm, interleave
from benchmarks.trainings import (
    BIG_TEACHER,
    QUICKSTART,
    ModelPair,
    begun,
    epochs,
    fastest_precision,
    image_task,
    random_teacher,
    unit,
    with_cache,
)
from kdbench.data.batch import Batch
from kdbench.models.outputs import Outputs
from kdbench.training.assembly import Training
from kdbench.training.loop import train_step
from kdbench.training.precision import placed_inputs

ALONE_GOAL, READING_GOAL, FEATURE_GOAL, CEILING_GOAL = at_most(1.05), at_most(0.01), at_most(1.25), at_least(0.95)

RESNETS = ModelPair("resnet56 -> resnet20", "cifar_resnet56", "cifar_resnet20", batch=32)
RESNETS_X4 = ModelPair("resnet32x4 -> resnet8x4", "resnet32x4", "resnet8x4", batch=16)
# The pairs of the literature, and three with a large teacher for a small student. Small batches, so that a round is short.
PAIRS = (
    QUICKSTART,
    RESNETS,
    ModelPair("timm resnet34 -> resnet18, 32 px", "resnet34", "resnet18", batch=16),
    ModelPair("timm resnet34 -> resnet18, 64 px", "resnet34", "resnet18", size=64, batch=8),
    RESNETS_X4,
    ModelPair("WRN-40-2 -> WRN-16-2", "wrn_40_2", "wrn_16_2", batch=16),
    ModelPair("deit_small -> deit_tiny, 112 px", "deit_small_patch16_224", "deit_tiny_patch16_224", size=112, batch=8),
    ModelPair("deit_base -> deit_tiny, 112 px", "deit_base_patch16_224", "deit_tiny_patch16_224", size=112, batch=8),
    ModelPair("efficientnet_lite2 -> lite0, 112 px", "tf_efficientnet_lite2", "tf_efficientnet_lite0", size=112, batch=8),
    BIG_TEACHER,
    ModelPair("cifar_resnet8 x4 -> tiny_cnn of width 8", BIG_TEACHER.teacher, {"name": "tiny_cnn", "width": 8}, 1, 28, 128),
    ModelPair("cifar_resnet8 x4 -> cifar_resnet8 of width 8", BIG_TEACHER.teacher, {"name": "cifar_resnet8", "width": 8}, 1, 28, 64),
)
_STEPS = 2  # whose batches are prepared, and looked up again and again
_ALONE_SHARE, _FEATURE_SHARE = 0.3, 0.1  # of the part's seconds; the pairs share the rest


def measure(bench: Bench) -> Iterator[Row]:
    """Whole epochs of trials with and without a cached teacher, then steps of every pair."""
    beside = bench.pick(quick=(QUICKSTART,), usual=(QUICKSTART, BIG_TEACHER, RESNETS), full=(QUICKSTART, BIG_TEACHER, RESNETS))
    for pair in beside:
        bench.say(f"cached trial beside the student alone: {pair.title}")
        yield from _beside_the_student(bench, pair, bench.seconds * _ALONE_SHARE / len(beside))
    bench.say("cached feature maps")
    yield _features(bench, bench.seconds * _FEATURE_SHARE)
    pairs = bench.pick(quick=(QUICKSTART, RESNETS), usual=PAIRS, full=PAIRS)
    for pair in pairs:
        bench.say(f"cached against live: {pair.title}")
        yield _of_the_ceiling(bench, pair, bench.seconds * (1 - _ALONE_SHARE - _FEATURE_SHARE) / len(pairs))


def _prepared(
    bench: Bench, pair: ModelPair, images: int, methods: Mapping[str, tuple[str | dict[str, Any], bool]], views: int = 4
) -> tuple[dict[str, Training], dict[str, str]]:
    """Trainings by name -> (method, whether the teacher is cached), in the precision that is fastest for the pair's student."""
    folder = bench.scratch / f"{pair.title}-{images}".replace(" ", "_")
    folder.mkdir(exist_ok=True)
    task = image_task(pair, images)
    recipe: dict[str, Any] = {"batch_size": pair.batch, "views": views}
    precision = fastest_precision(task, pair.student, pair.batch, folder / "student.json")
    live = random_teacher(folder, task, pair.teacher, **fastest_precision(task, pair.teacher, pair.batch, folder / "teacher.json"))
    runs = {}
    for name, (method, cached) in methods.items():
        one = unit(task, pair.student, method, live, **precision, **recipe)
        if cached:
            one = unit(task, pair.student, method, with_cache(live, one, folder / "cache"), **precision, **recipe)
        runs[name] = begun(one)
    return runs, precision


def _beside_the_student(bench: Bench, pair: ModelPair, seconds: float) -> Iterator[Row]:
    end = time.monotonic() + seconds
    images = pair.batch * bench.pick(quick=8, usual=16, full=32)
    runs, precision = _prepared(bench, pair, images, {"alone": ("none", False), "cached": ("kd", True)})
    reading = _reading(runs["cached"])
    rounds = interleave(
        {**{name: epochs(run) for name, run in runs.items()}, "reading": reading}, end - time.monotonic(), enough=_tells_five_percent
    )
    said = f"{precision['precision']}, {precision['memory_format']}"
    wall = rounds.ratio("cached", "alone", "wall").median
    yield Row(f"{pair.title}: cached kd / student alone, time", rounds.ratio("cached", "alone"), goal=ALONE_GOAL, wall=wall, note=said)
    yield Row(f"{pair.title}: reading the cache / a step of it", rounds.ratio("reading", "cached"), goal=READING_GOAL, note=said)


def _tells_five_percent(rounds: Rounds) -> bool:
    return rounds.ratio("cached", "alone").resolution < 0.015


def _reading(run: Training) -> Arm:
    """Looking up the teacher's outputs for an epoch's batches, in seconds a sample."""
    batches = list(run.loader.batches(0))
    return arm(lambda: [run.teacher(batch) for batch in batches if run.teacher is not None], sum(map(len, batches)))


def _features(bench: Bench, seconds: float) -> Row:
    """A step with maps from the cache against the same step with maps that are simply there: what the reading adds to the arithmetic."""
    end = time.monotonic() + seconds
    images = QUICKSTART.batch * bench.pick(quick=8, usual=16, full=32)
    runs, precision = _prepared(bench, QUICKSTART, images, {"cached": (FITNET, True), "given": (FITNET, True)})
    given = runs["given"]
    some = next(iter(given.loader.batches(0)))
    assert given.teacher is not None
    outputs = given.teacher(some)
    given.teacher = lambda batch: Outputs(outputs.prediction, outputs.maps)  # type: ignore[assignment]
    rounds = interleave({name: epochs(run) for name, run in runs.items()}, end - time.monotonic())
    shape = list(outputs.maps[STAGE].shape[1:])
    return Row(
        f"{QUICKSTART.title}: cached feature map / the method's own arithmetic, time",
        rounds.ratio("cached", "given"),
        goal=FEATURE_GOAL,
        wall=rounds.ratio("cached", "given", "wall").median,
        note=f"a map {shape} a sample; {precision['precision']}, {precision['memory_format']}",
    )


def _of_the_ceiling(bench: Bench, pair: ModelPair, seconds: float) -> Row:
    """The cache can save the teacher's forward pass and no more: live / (live - teacher) is the ceiling, live / cached what is reached."""
    end = time.monotonic() + seconds
    runs, precision = _prepared(bench, pair, pair.batch * _STEPS, {"live": ("kd", False), "cached": ("kd", True)}, views=1)
    said = f"; {precision['precision']}, {precision['memory_format']}"
    return share_of_ceiling(pair.title, runs["live"], runs["cached"], end - time.monotonic(), said)


def share_of_ceiling(what: str, live: Training, cached: Training, seconds: float, said: str = "") -> Row:
    """What the cache of one pair reaches of its ceiling, in so many seconds. said: ends the note."""
    rounds = interleave({"live": steps_of(live), "cached": steps_of(cached), "teacher": _teacher_alone(live)}, seconds)
    value = rounds.combined(_share_of_ceiling)
    speed_up = rounds.ratio("live", "cached").median
    share = rounds.ratio("teacher", "live").median
    note = f"{speed_up:.2f}x faster, teacher {100 * share:.0f}% of a live step{said}"
    wall = rounds.combined(_share_of_ceiling, "wall").median
    return Row(f"{what}: speed-up by the cache / its ceiling", value, goal=CEILING_GOAL, wall=wall, note=note)


def _share_of_ceiling(seconds: Mapping[str, float]) -> float:
    return (seconds["live"] - seconds["teacher"]) / seconds["cached"]


def steps_of(run: Training) -> Arm:
    """Optimizer steps on prepared batches: what is compared is the teacher, not the data path."""
    batches = list(run.loader.batches(0))
    run.wrapped.train()
    return arm(_over(batches, lambda batch: train_step(run, batch)), sum(map(len, batches)))


def _teacher_alone(run: Training) -> Arm:
    recipe, teacher = run.unit.recipe, run.teacher
    assert teacher is not None
    batches = [batch_as_trained(batch, recipe.precision, recipe.memory_format) for batch in run.loader.batches(0)]
    return arm(_over(batches, teacher), sum(map(len, batches)))


def batch_as_trained(batch: Batch, precision: str, memory_format: str) -> Batch:
    """As a training step hands it to the teacher."""
    return Batch(placed_inputs(batch.inputs, precision, memory_format), batch.target, batch.index, batch.view)


def _over(batches: list[Batch], work: Callable[[Batch], object]) -> Callable[[], None]:
    def all_of_them() -> None:
        for batch in batches:
            work(batch)

    return all_of_them
