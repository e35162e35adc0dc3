"""What a training step of each method costs beside one of the undistilled student, with the teacher's outputs cached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.part import Bench
from benchmarks.peers import VITS
from benchmarks.report import Row, not_measured
from benchmarks.timing import interleave
from benchmarks.trainings import QUICKSTART, ModelPair, begun, epochs, image_task, random_teacher, unit, with_cache
from kdbench.errors import UserError
from kdbench.experiment import TeacherRef
from kdbench.methods import METHODS
from kdbench.training.assembly import Training

WHAT = "{}: a step / a step of none"
_STEPS = 8  # an epoch of it is one measurement
_PAIRS = {"vitkd": VITS}  # of the methods that can't work on the quickstart's


@dataclass(frozen=True)
class _Begun:
    """A pair of models with its undistilled student, ready to train."""

    pair: ModelPair
    task: dict[str, Any]
    teacher: TeacherRef
    none: Training


def measure(bench: Bench) -> Iterator[Row]:
    """Every method in turn beside `none`, on the quickstart's pair or the one that it needs, in float32."""
    begun_on: dict[str, _Begun] = {}
    names = bench.pick(quick=["kd", "fitnet"], usual=list(METHODS), full=list(METHODS))
    for name in names:
        bench.say(f"methods: {name}")
        pair = _PAIRS.get(name, QUICKSTART)
        if pair.title not in begun_on:
            begun_on[pair.title] = _begin(pair, bench.scratch / f"pair-{len(begun_on)}")
        on = begun_on[pair.title]
        try:
            run = _training(bench, on, name)
        except UserError as unfit:
            yield not_measured(WHAT.format(name), str(unfit))
            continue
        rounds = interleave({"method": epochs(run), "none": epochs(on.none)}, bench.seconds / len(names), least=3)
        note = "" if pair is QUICKSTART else pair.title
        yield Row(WHAT.format(name), rounds.ratio("method", "none"), wall=rounds.ratio("method", "none", "wall").median, note=note)


def _begin(pair: ModelPair, folder: Path) -> _Begun:
    task = image_task(pair, _STEPS * pair.batch)
    folder.mkdir()
    teacher = random_teacher(folder, task, pair.teacher)
    return _Begun(pair, task, teacher, begun(unit(task, pair.student, "none", teacher, views=1)))


def _training(bench: Bench, on: _Begun, name: str) -> Training:
    """The method on the pair. A first training with the live teacher finds its taps, which are what is then cached."""
    first = begun(unit(on.task, on.pair.student, name, on.teacher, views=1))
    if not first.distiller.method.needs_teacher:
        return first
    method = {"name": name, **first.distiller.method.params.model_dump(mode="json")}
    cached = with_cache(on.teacher, unit(on.task, on.pair.student, method, on.teacher, views=1), bench.scratch / f"cache-{name}")
    return begun(unit(on.task, on.pair.student, method, cached, views=1))
