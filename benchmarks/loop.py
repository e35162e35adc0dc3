"""Part a: kdbench's loop against the one that a person would write, and its data path against PIL images and a DataLoader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.minimal_loop import MinimalLoop, Settings, Teacher, from_arrays
from benchmarks.part import Bench
from benchmarks.pil_images import PilImages, usual_loader, usual_transform
from benchmarks.report import Row, at_least
from benchmarks.timing import Rounds, arm, interleave
from benchmarks.trainings import QUICKSTART, begun, epochs, fastest_precision, image_task, random_teacher, unit, with_cache
from kdbench.data.batch import Batch
from kdbench.models.inputs import InputSpec, model_inputs
from kdbench.models.outputs import Outputs
from kdbench.training.assembly import Training
from kdbench.training.precision import DTYPES, FORMATS

STAGE = "stage:-1"
FITNET: dict[str, Any] = {"name": "fitnet", "student_taps": [STAGE], "teacher_taps": [STAGE]}
METHODS: dict[str, str | dict[str, Any]] = {"none": "none", "kd": "kd", "fitnet": FITNET}
LOOP_GOAL, DATA_GOAL = at_least(0.97), at_least(20)
_RESOLVED = 0.015  # half the width of the median's interval: 3% is then told apart from nothing


def measure(bench: Bench) -> Iterator[Row]:
    """The loop with each of METHODS, then the data path alone."""
    images = bench.pick(quick=2_560, usual=5_120, full=5_120)
    task = image_task(QUICKSTART, images)
    precision = fastest_precision(task, QUICKSTART.student, QUICKSTART.batch, bench.scratch / "choice.json")
    teacher = random_teacher(bench.scratch, task, QUICKSTART.teacher)
    for name, method in METHODS.items():
        bench.say(f"loop: {name}")
        end = time.monotonic() + bench.seconds * 0.3
        cached = with_cache(teacher, unit(task, QUICKSTART.student, method, teacher, **precision), bench.scratch / "cache")
        run = begun(unit(task, QUICKSTART.student, method, cached, **precision))
        rounds = interleave({"kdbench": epochs(run), "minimal": _minimal(run, name)}, end - time.monotonic(), enough=resolved)
        yield _row(f"loop with {name}: kdbench / hand-written, samples/s", rounds, "minimal", "kdbench", note=f"{_said(precision)}")
    bench.say("data path")
    yield _data_path(bench, task)


def _row(what: str, rounds: Rounds, above: str, below: str, note: str) -> Row:
    """A ratio of speeds is the inverse ratio of seconds."""
    return Row(what, rounds.ratio(above, below), goal=LOOP_GOAL, wall=rounds.ratio(above, below, "wall").median, note=note)


def resolved(rounds: Rounds) -> bool:
    return rounds.ratio("minimal", "kdbench").resolution < _RESOLVED


def _said(precision: dict[str, str]) -> str:
    return f"{precision['precision']}, {precision['memory_format']}"


def _minimal(run: Training, name: str) -> Any:
    """The hand-written loop on the same images with a network of the same kind, as an arm in seconds a sample."""
    recipe, source = run.unit.recipe, run.splits.transfer
    student = run.task.build_model(run.unit.student)
    spec = student.input_spec
    assert isinstance(spec, InputSpec)
    method = run.distiller.method.params.model_dump()
    settings = Settings(
        mean=spec.mean,
        std=spec.std,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        crop=recipe.augment.crop,
        flip=recipe.augment.flip,
        dtype=DTYPES[recipe.precision],
        memory_format=FORMATS[recipe.memory_format],
        task_weight=method["task_weight"],
        kd_weight=method.get("kd_weight", 0.0),
        temperature=method.get("temperature", 1.0),
        hint_weight=method["weight"] if name == "fitnet" else 0.0,
    )
    hint = (student.get_submodule("layer3"), _regressor(run)) if name == "fitnet" else None
    loop = MinimalLoop(student, source.pixels, source.labels, settings, _teacher_of(run), hint)
    views = recipe.views or 1
    return arm(lambda: loop.train_epoch(loop.epoch % views), run.loader.steps_per_epoch * recipe.batch_size)


def _regressor(run: Training) -> nn.Module:
    """What fitnet brings the student's map to the teacher's with, where both are of one size."""
    shape = next(iter(_outputs(run, 0).maps.values())).shape
    return nn.Sequential(nn.LazyConv2d(shape[1], kernel_size=1), nn.BatchNorm2d(shape[1]), nn.ReLU())


def _teacher_of(run: Training) -> Teacher | None:
    """The outputs that kdbench's training reads, as plain arrays: the two loops then differ in nothing but the loop."""
    if run.teacher is None:
        return None
    views = [_outputs(run, view) for view in range(run.unit.recipe.views or 1)]
    logits = torch.stack([one.logits for one in views]).half().numpy()
    maps = [torch.stack([one.maps[tap] for one in views]).half().numpy() for tap in views[0].maps]
    return from_arrays(logits, maps[0] if maps else None)


def _outputs(run: Training, view: int) -> Outputs:
    part = run.splits.transfer
    assert run.teacher is not None
    return run.teacher(Batch(part.pixels, part.target, part.index, view))


def _data_path(bench: Bench, task: dict[str, Any]) -> Row:
    """Augmented, normalised batches and nothing else."""
    run = begun(unit(task, QUICKSTART.student, "none"))
    part, spec = run.splits.transfer, run.distiller.student.input_spec
    assert isinstance(spec, InputSpec)
    few = part.select(torch.arange(len(part) // 8))  # the slower path gets an eighth of the images, and is timed a sample
    augment, batch = run.unit.recipe.augment, run.unit.recipe.batch_size
    transform = usual_transform(QUICKSTART.size, augment.crop, augment.flip, list(spec.mean), list(spec.std))
    usual = usual_loader(PilImages(few.pixels, few.labels, transform), batch)

    def ours() -> None:
        for one in run.loader.batches(0):
            model_inputs(run.distiller.student, one.inputs)

    def theirs() -> None:
        for _ in usual:
            pass

    arms = {"kdbench": arm(ours, run.loader.steps_per_epoch * batch), "pil": arm(theirs, len(usual) * batch)}
    rounds = interleave(arms, bench.seconds * 0.1)
    value, wall = rounds.ratio("pil", "kdbench"), rounds.ratio("pil", "kdbench", "wall").median
    per_sample = f"{1e6 * rounds.seconds('kdbench').median:.1f} us against {1e6 * rounds.seconds('pil').median:.0f} us a sample"
    return Row("data path alone: kdbench / PIL + DataLoader, samples/s", value, goal=DATA_GOAL, wall=wall, note=per_sample)
